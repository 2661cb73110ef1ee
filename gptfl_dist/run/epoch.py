"""The epoch that a run is in, as its ledger says, and how the operator begins the next one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError
from gptfl_dist.ledger.record import EPOCH, FILE_NAME
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.ledger.requests import Facts
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.auditor import Auditor
from gptfl_dist.run.credentials import coordinator_credentials, kept_authority
from gptfl_dist.run.settings import request_of
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.epoch import Epoch, begun


@dataclass(frozen=True, slots=True)
class EpochBegun:
    """`rounds`: from which round each arm goes on. `signed` is False where the run has no certificates to sign with."""

    run_folder: Path
    epoch: int
    rounds: dict[str, int]
    signed: bool


def epoch_of(facts: Facts, file: FederationFile) -> Epoch:
    """The epoch that a ledger says its run is in."""
    known = facts.fact(EPOCH)
    kept = file.enrolment is not None
    return Epoch(kept=kept) if known is None else Epoch(**json.loads(known), kept=kept)


def begin_epoch(path: Path, reason: str) -> EpochBegun:
    """Begins the next epoch of the run of the federation file at `path`, on which no coordinator is at work.

    Raises ConfigError where there is no run, IdentityError where the key to sign it with is not there, StorageError.
    """
    file = load_federation(path)
    if not (file.run_folder / FILE_NAME).exists():
        raise ConfigError(f"{file.run_folder}: no run was started here", hint="an epoch begins where one is set back")
    return begin_epoch_in(path, file, reason)


def begin_epoch_in(path: Path, file: FederationFile, reason: str) -> EpochBegun:
    """Likewise, where `file` are the settings in force, which may say otherwise than the file where things lie."""
    signer = _signer(path, file)
    ledger = Ledger(file.run_folder, request_of(path, file), durable=True)
    try:
        records = [record for name in ledger.arms() if (record := ledger.arm(name)) is not None]
        rounds = {record.arm: _goes_on_from(record) for record in records}
        epoch = begun(
            epoch_of(ledger, file).number + 1,
            signer,
            federation=file.name,
            run=ledger.fact("run") or "",
            rounds=rounds,
            reason=" ".join(reason.split()),
            kept=file.enrolment is not None,
        )
        told = asdict(epoch)
        del told["kept"]
        ledger.set_fact(EPOCH, json.dumps(told))
        Auditor(ledger)  # which writes what waits to be told
    finally:
        ledger.close()
    return EpochBegun(file.run_folder, epoch.number, rounds, signer is not None)


def _goes_on_from(record: ArmRecord) -> int:
    """The earliest round of an arm of which an order may come."""
    pending = [] if record.finished else [round_.round for round_, _ in record.pending]
    return min([record.finished_rounds + 1, *pending])


def _signer(path: Path, file: FederationFile) -> Credentials | None:
    if file.enrolment is not None:
        return kept_authority(file, file.enrolment).own
    return None if file.exchange.certificate is None else coordinator_credentials(path, file)
