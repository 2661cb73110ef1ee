"""The pre-flight of a federation file: model, recipe, folders, data, the coordinator's certificates, its ports, MPI.

What is asked of the synthetic set, of the disk, and of the silos that the file names, stands in the modules beside it.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from gptfl_dist.aggregation.rules import rule_of
from gptfl_dist.config.base import EVERYWHERE, host_of, port_of
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_silo
from gptfl_dist.config.strategy import ROBUST
from gptfl_dist.errors import ConfigError, IdentityError, ModelError
from gptfl_dist.ledger.lock import at_work
from gptfl_dist.observe.wording import size
from gptfl_dist.run.addresses import PortInUse, try_listening
from gptfl_dist.run.at_rest import try_at_rest
from gptfl_dist.run.candidates import candidate_files
from gptfl_dist.run.check.common import (
    built_model,
    check_credentials,
    check_test_data,
    code_beside,
    ending_soon,
    host_names,
    valid_until,
    writable,
)
from gptfl_dist.run.check.findings import Checklist, Doubt
from gptfl_dist.run.check.named_silos import check_named_silos
from gptfl_dist.run.check.space import enough_space
from gptfl_dist.run.check.synthesis import check_synthesis
from gptfl_dist.run.credentials import kept_authority
from gptfl_dist.security.vault import Vault
from gptfl_dist.weights import Codec

_SEARCH = 60.0  # seconds to load an MPI library in a process of its own


def check_federation(checks: Checklist, path: Path, file: FederationFile) -> None:
    checks.run("device", lambda: _federation_devices(file))
    checks.run("model", lambda: check_model(path, file))
    if file.synthesises:
        for name, candidate in (candidate_files(file) or {"": file}).items():
            check_synthesis(checks, candidate, f" of {name}" if name else "")
    checks.run("training", lambda: _recipe(file))
    checks.run("strategy", lambda: _strategy(path, file))
    checks.run("compression", lambda: _compression(path, file))
    checks.run("run folder", lambda: writable(file.run_folder))
    checks.run("at_rest", lambda: try_at_rest(file.at_rest, file.run_folder))
    if file.synthesises:
        checks.run("synthesis.folder", lambda: writable(file.synthesis.folder))
    checks.run("disk space", lambda: enough_space(path, file))
    checks.run("test data", lambda: check_test_data(file))
    check_named_silos(checks, path, file)
    checks.run("credentials", lambda: _coordinator_credentials(file))
    checks.run("exchange.listen", partial(_listen, file, "exchange.listen", file.exchange.listen))
    if file.enrolment is not None:
        checks.run("enrolment.listen", partial(_listen, file, "enrolment.listen", file.enrolment.listen))
    checks.run("MPI", _mpi)


def _federation_devices(file: FederationFile) -> str:
    if not file.synthesises:
        return "none needed: no arm generates or pre-trains"
    from gptfl_dist.learning.device import resolve_device
    from gptfl_dist.synthesis.generator import place

    placement = place(file.synthesis.generator)
    return (
        f"synthesis on {placement.device} in {placement.dtype}, "
        f"pre-training on {resolve_device(file.pretraining.device)}"
    )


def check_model(path: Path, file: FederationFile) -> str:
    """Builds the model and gives it one training batch."""
    import torch
    import torch.nn.functional as F  # noqa: N812  (torch's idiom)

    from gptfl_dist.learning.models import logits
    from gptfl_dist.weights.flat import layout_of

    notes: list[str] = []
    model = built_model(path, file, notes.append)
    layout = layout_of(model)
    count = file.training.batch_size
    images = torch.zeros(count, *file.task.shape)
    try:
        F.cross_entropy(logits(model, images), torch.zeros(count, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]  # torch leaves it out
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"model {file.model.name} cannot train on a batch of shape {tuple(images.shape)}: {error}",
            hint="make task and training.batch_size fit the model",
        ) from error
    took = f"{file.model.name} with {layout.parameters:,} parameters ({size(layout.nbytes)}) took a batch of {count}"
    return "; ".join([took, *notes])


def _recipe(file: FederationFile) -> str:
    """Whether the rounds are enough for what the recipe does in the first of them."""
    from gptfl_dist.run.result import federated_arms

    rounds, training = file.federation.rounds, file.training
    for name in ("warm_up_rounds", "head_rounds"):
        if getattr(training, name) >= rounds and federated_arms(file):
            raise Doubt(
                f"training.{name} is {getattr(training, name)} and federation.rounds {rounds}: no round comes after it",
                hint=f"lower training.{name}, or run more rounds",
            )
    told = f"{len(training.learning_rates)} learning rate(s), {rounds} rounds"
    if file.federation.mode == "asynchronous":
        told += (
            f", each of {file.federation.wanted_of(len(file.silos))} updates of {len(file.silos)} silos, asynchronous"
        )
    return told


def _strategy(path: Path, file: FederationFile) -> str:
    """Imports the rule, and says how many malicious silos it bears."""
    strategy, quorum = file.strategy, file.federation.quorum_of(len(file.silos))
    with code_beside(path):
        rule_of(strategy)
    told = f"{strategy.rule} of {quorum} updates or more, {strategy.optimizer}"
    return f"{told}; bears {strategy.borne} malicious silo(s) a round" if strategy.rule in ROBUST else told


def _compression(path: Path, file: FederationFile) -> str:
    """How much of the model's bytes travels each way."""
    from gptfl_dist.weights.flat import layout_of

    settings = file.compression
    if settings.up == "topk" and not settings.error_feedback:
        raise Doubt(
            f"compression.up is topk without error_feedback: {1 - settings.top_share:.0%} of each update is lost",
            hint="set compression.error_feedback to true, so that the silos send it later",
        )
    layout = layout_of(built_model(path, file))
    up = Codec(settings.up, settings.top_share).layout(layout).nbytes / layout.nbytes
    down = Codec(settings.down).layout(layout).nbytes / layout.nbytes
    packed = "" if settings.lossless == "none" else f", over gRPC packed by {settings.lossless} besides"
    return f"updates take {up:.1%} and weights {down:.1%} of {size(layout.nbytes)}{packed}"


def _coordinator_credentials(file: FederationFile) -> str:
    exchange = file.exchange
    if file.enrolment is not None:
        if port_of(exchange.listen) == 0:
            raise ConfigError(
                f"exchange.listen is {exchange.listen}, and silos that are invited must know the port",
                hint="set exchange.listen to 0.0.0.0:8443, say",
            )
        kept_authority(file, file.enrolment)
        if soon := Vault(file.enrolment.authority, file.name).warnings():
            raise ending_soon(str(file.enrolment.authority), soon)
        return f"{file.enrolment.authority} makes them, for {', '.join(file.enrolment.hosts)}"
    if exchange.authority is None or exchange.certificate is None or exchange.key is None:
        if file.collective.trust == "tls":
            raise IdentityError(
                "collective.trust is tls, and exchange names no authority, certificate and key",
                hint="make them with: gptfl credentials FEDERATION_FILE --host NAME, and name them in the file",
            )
        return "none named: gptfl run makes its own; gptfl coordinator needs them"
    shown = check_credentials(exchange.authority, exchange.certificate, exchange.key, "coordinator", None, file.name)
    if file.collective.trust == "tls":  # between ranks, which nobody dials
        return valid_until(shown, "the coordinator's")
    dialled = {host_of(exchange.listen): "exchange.listen"}
    for entry in file.silos:
        if entry.file is not None and entry.file.exists() and (side := load_silo(entry.file).coordinator) is not None:
            dialled[host_of(side.address)] = f"coordinator.address of {entry.name}"
    names = host_names(exchange.certificate)
    for host, setting in dialled.items():
        if host in EVERYWHERE or host in names:
            continue
        found = f"{exchange.certificate} holds for {', '.join(sorted(names)) or 'no host'}, not for {host} ({setting})"
        hint = f"make a set for that name: gptfl credentials FEDERATION_FILE --host {host}"
        if setting != "exchange.listen":
            raise IdentityError(f"{found}: the silo would refuse it", hint=hint)
        raise Doubt(found, f"well if silos dial another name; if not, {hint}")
    return valid_until(shown, f"the coordinator's, for {', '.join(sorted(names))}")


def _listen(file: FederationFile, setting: str, address: str) -> str:
    try:
        try_listening(address, setting)
    except PortInUse:
        if at_work(file.run_folder) is None:
            raise
        return f"{address} is in use, and a coordinator of this run is at work ({file.run_folder})"
    return f"{address} can be listened on" if port_of(address) else f"{host_of(address)}, any free port"


def _mpi() -> str:
    """Loads an MPI in a process of its own: some end the process where they do not find their daemon."""
    program = "from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_SEARCH)
    except subprocess.TimeoutExpired:
        raise Doubt(f"loading an MPI library took more than {_SEARCH:g} s", "try: mpiexec -n 1 hostname") from None
    if done.returncode != 0 or not done.stdout.strip():
        last = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise Doubt(
            f"no MPI library can be loaded ({last})",
            "needed for mpiexec alone: pip install 'gptfl-dist[mpi]', or load your cluster's MPI module",
        )
    return " ".join(done.stdout.strip().splitlines()[0].split())
