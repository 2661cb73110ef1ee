"""The audit log of a run as others look at it: verified, compared with the ledger, picked from, written as a table.

The ledger is read first and the log after it, so beside a coordinator at work the log is never behind what it is
compared with, but for the events that the ledger itself says are waiting.
"""

from __future__ import annotations

import csv
import io
import json
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptfl_dist.errors import AuditError, ConfigError, IdentityError
from gptfl_dist.files import write_file
from gptfl_dist.ledger.reader import LedgerReader, read
from gptfl_dist.ledger.records import ArmRecord, Waiting
from gptfl_dist.run.auditor import ledger_head, missing
from gptfl_dist.run.folder import run_folder_of
from gptfl_dist.security.audit import (
    BEGUN,
    BROKEN,
    CHECKPOINT,
    Entry,
    Fault,
    Head,
    Verification,
    fingerprint,
    public_key,
    verify,
)
from gptfl_dist.security.audit_log import LOG, read_log
from gptfl_dist.security.credentials import identity_in
from gptfl_dist.security.signing import require_signed

EVENTS = frozenset(
    {
        BEGUN, CHECKPOINT, BROKEN, "half line cut off", "run started", "run resumed", "run ended", "run deleted",
        "silo connected", "silo disconnected", "silo invited", "invitation revoked", "enrolment approved",
        "silo enrolled", "certificate renewed", "certificate revoked", "root replaced", "old root dropped",
        "issuing certificate installed", "signer known", "arm begun", "arm finished", "round begun", "round committed",
        "round abandoned", "update accepted", "evaluation accepted", "update refused", "order failed",
        "order recalled", "update lost", "pause asked", "resume asked", "abort asked", "epoch begun",
        *(f"{role} {what}" for role in ("operator", "observer") for what in ("invited", "enrolled")),
        "asked from afar", "not done", "refused",
    }
)  # fmt: skip
"""The kinds of entries, as docs/reference.md explains them."""

_FOR_PROGRAMS = ("number", "time", "event", "previous", "hash", "outbox", "statement", "certificate")
_CUT = 12  # characters that are left of what is cut short

_COLUMNS = ("number", "time", "event", "silo", "arm", "round", "details", "hash", "verdict")


@dataclass(frozen=True, slots=True)
class Audit:
    """A log and what came of it. `faults` are those of the chain and of the comparison, by line; `notes` are what an
    operator should know beside them."""

    file: Path
    verification: Verification
    faults: list[Fault]
    notes: list[str]

    def told(self) -> dict[str, Any]:
        """The result for programs."""
        found = self.verification
        return {
            "file": str(self.file),
            "whole": not self.faults,
            "entries": len(found.entries),
            "signed": found.signed,
            "key": found.fingerprint,
            "faults": [asdict(fault) for fault in self.faults],
            "notes": self.notes,
        }


def audit_of(path: Path, key: str | None = None) -> Audit:
    """Verifies the log of the run whose federation file, or run folder, is at `path`, and compares it with the ledger.

    `key` is the file or the fingerprint of the key that must have signed it. Raises ConfigError where there is no log,
    or no such key; StorageError where one cannot be read.
    """
    folder = run_folder_of(path)
    pinned = "" if key is None else _pinned(key)
    ledger = read(folder, _told)
    content = read_log(folder)
    if not content and (ledger is None or not ledger.head.number):
        raise ConfigError(
            f"{folder}: there is no audit log here", hint="name the federation file of a run, or its folder"
        )
    found = verify(content, pinned)
    faults, notes = [*found.faults, *_not_theirs(found)], []
    if found.half_written:
        notes.append("the last line is half-written: its writer was killed; the next start of the run sees to it")
    if found.signed < found.head.number and not faults:
        notes.append(f"entries {found.signed + 1} to {found.head.number} are chained, and not signed yet")
    if key is None:
        notes.append("the key was not pinned: compare its fingerprint with the one that you noted, or give it by --key")
    if ledger is None:
        notes.append("there is no ledger beside it to compare it with")
    else:
        faults += _differences(ledger, found, content)
        if ledger.waiting:
            notes.append(f"{len(ledger.waiting)} events stand in the ledger and are not known to be in the log yet")
    return Audit(folder / LOG, found, sorted(faults, key=lambda fault: fault.line), notes)


def entries_of(
    audit: Audit, *, silo: str | None, round_: int | None, event: str | None, last: int | None
) -> list[Entry]:
    """The entries that fit, the last so many of them. Signatures are left out where they are not asked for.

    Raises ConfigError where no log has such an `event`.
    """
    there = {str(entry["event"]) for entry in audit.verification.entries.values()}
    if event is not None and event not in EVENTS | there:
        raise ConfigError(
            f"--event {event}: there is no such kind of entry", hint=f"one of: {', '.join(sorted(EVENTS))}"
        )
    fitting = [
        entry
        for entry in audit.verification.entries.values()
        if silo in (None, entry.get("silo"))
        and round_ in (None, entry.get("round"))
        and (entry["event"] != CHECKPOINT if event is None else entry["event"] == event)
    ]
    return fitting if last is None else fitting[-last:]


def entry_text(entry: Entry) -> str:
    """An entry for people, on one line: digests and signatures cut short, and left out what only programs read."""
    told = " ".join(f"{name}={_short(value, name)}" for name, value in entry.items() if name not in _FOR_PROGRAMS)
    return f"{entry['number']:>6}  {entry['time'][:19]}Z  {_short(entry['event']):<20}  {told}".rstrip()


def export_log(audit: Audit, out: Path, *, force: bool) -> None:
    """Writes the log with a verdict for each line: as a table for a name that ends in .csv, as JSON lines for .jsonl.

    Raises ConfigError for another name and for a file that is there, StorageError where it cannot be written.
    """
    if out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"{out} says neither table nor JSON lines", hint="let its name end in .csv or .jsonl")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists", hint="name another file, or overwrite it with --force")
    rows = list(_judged(audit))
    if out.suffix == ".jsonl":
        text = "".join(f"{json.dumps({'verdict': verdict, 'entry': entry})}\n" for entry, verdict in rows)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for entry, verdict in rows:
            details = {name: value for name, value in entry.items() if name not in (*_COLUMNS, "previous", "outbox")}
            cells = {**entry, "details": json.dumps(details), "verdict": verdict}
            writer.writerow({name: _harmless(value) for name, value in cells.items()})
        text = table.getvalue()
    write_file(out, text)


def require_whole(audit: Audit) -> None:
    """Raises AuditError where something is wrong."""
    if audit.faults:
        first = audit.faults[0]
        raise AuditError(
            f"{audit.file} does not verify: line {first.line}: found {first.found}, expected {first.expected}",
            hint="keep the file as it is, and compare it with a copy; gptfl audit verify names every line",
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """What the ledger says that the log must hold."""

    head: Head
    arms: list[ArmRecord]
    waiting: list[Waiting]


def _told(ledger: LedgerReader) -> _Told:
    arms = [record for name in ledger.arms() if (record := ledger.arm(name)) is not None]
    return _Told(ledger_head(ledger), arms, ledger.waiting())


def _differences(ledger: _Told, found: Verification, content: bytes) -> Iterator[Fault]:
    """What the ledger knows and the log does not say."""
    end = content.count(b"\n") + 1
    if lost := missing(content, ledger.head):
        yield Fault(min(end, ledger.head.number), lost["found"], lost["expected"])
    updates: dict[str, tuple[int, dict[str, Any]]] = {}  # by nonce, the newest of each
    rounds: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    told = [(line, entry["event"], entry) for line, entry in found.entries.items()]
    for line, event, fields in [*told, *((end, one.event, dict(one.fields)) for one in ledger.waiting)]:
        if event == "update accepted":
            updates[str(fields.get("nonce"))] = line, fields
        elif event == "round committed":
            rounds[str(fields.get("arm")), fields.get("round", 0)] = line, fields
    for arm in ledger.arms:
        for record in arm.rounds:
            for order in record.orders if record.kind == "train" else ():
                if order.samples is not None:
                    what = f"the update of {order.silo} in round {record.round} of {arm.arm}"
                    known = {"silo": order.silo, "digest": order.digest, "samples": order.samples}
                    yield from _compared(what, known, *updates.get(order.nonce, (end, None)))
            if record.weights is not None:
                what, known = f"round {record.round} of {arm.arm}", {"weights": record.weights}
                yield from _compared(what, known, *rounds.get((arm.arm, record.round), (end, None)))


def _not_theirs(found: Verification) -> Iterator[Fault]:
    """The updates in the log whose silo did not sign what stands there of them, where they are signed."""
    certificates = {
        str(entry.get("signer")): str(entry.get("certificate")).encode()
        for entry in found.entries.values()
        if entry["event"] == "signer known"
    }
    for line, entry in found.entries.items():
        if entry["event"] != "update accepted" or entry.get("signature") is None:
            continue
        try:
            text, certificate = str(entry["statement"]), certificates[str(entry["signer"])]
            require_signed(text, b64decode(str(entry["signature"])), certificate)
            said = json.loads(text)
            signer = identity_in(certificate, "the certificate")
            told = {name: entry[name] for name in ("nonce", "digest", "samples")}
            if signer.name != entry["silo"] or said["sender"] != signer.uri or any(said[n] != told[n] for n in told):
                raise IdentityError("says something else")
        except (KeyError, ValueError, IdentityError):
            yield Fault(
                line, f"an update of {entry.get('silo')} that it did not sign as it stands", "its own statement"
            )


def _compared(what: str, known: dict[str, Any], line: int, fields: dict[str, Any] | None) -> Iterator[Fault]:
    if fields is None:
        yield Fault(line, f"no entry of {what}", "one, for the ledger has it")
    elif (told := {name: fields.get(name) for name in known}) != known:
        yield Fault(line, f"{what} with {json.dumps(told)}", f"{json.dumps(known)}, as the ledger has it")


def _judged(audit: Audit) -> Iterator[tuple[Entry, str]]:
    wrong = {fault.line: f"found {fault.found}, expected {fault.expected}" for fault in reversed(audit.faults)}
    entries, unread = audit.verification.entries, {"number": None, "time": None, "event": None}
    for line in sorted(entries.keys() | wrong.keys()):
        entry = entries.get(line, unread)
        verdict = "signed" if line <= audit.verification.signed else "chained"
        yield entry, wrong.get(line, verdict)


def _pinned(key: str) -> str:
    """The fingerprint that is meant by the name of a file or by itself."""
    path = Path(key)
    if path.is_file():
        try:
            return fingerprint(public_key(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}", hint="give the log's public key, or its fingerprint") from None
    digits = key.replace(":", "").lower()
    if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise ConfigError(
            f"--key {key} is neither a file nor a fingerprint", hint="a fingerprint has 64 hexadecimal digits"
        )
    return digits


def _short(value: object, name: str = "") -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return ",".join(_short(inner) for inner in value)
    text = str(value)
    if text.startswith("-----BEGIN "):
        return "PEM"
    if name == "signature" or (len(text) >= 32 and set(text) <= set("0123456789abcdef")):
        text = text[:_CUT]
    return text if text.isprintable() else json.dumps(text)


def _harmless(value: object) -> object:
    """A cell that no spreadsheet takes for a formula, whatever a silo said."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
