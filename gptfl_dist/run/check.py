"""The pre-flight of a federation file or a silo file: what would fail in a run is tried here, before it costs hours.

Each check is a function that returns what it found or raises the error that a run would end with. `_Checklist` turns
either into a `Finding`, so no check stops the others. Nothing is left behind on disk, and no port stays open.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptfl_dist.config.document import read_document
from gptfl_dist.config.federation import FederationFile, Generator, SiloEntry
from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.silo import Coordinator, SiloFile
from gptfl_dist.errors import (
    ConfigError,
    ConnectionFailed,
    GeneratorError,
    GptflError,
    IdentityError,
    ModelError,
    PolicyError,
    StorageError,
    TrainerError,
)
from gptfl_dist.federation.orders import Order
from gptfl_dist.federation.silo import PolicyGuard
from gptfl_dist.files import storage_error
from gptfl_dist.observe.wording import size
from gptfl_dist.run.addresses import host_of, port_of, try_listening

if TYPE_CHECKING:
    from torch import nn

_EXPIRES_SOON = timedelta(days=7)
_PATIENCE = 5.0  # seconds for each answer of the coordinator
_SEARCH = 60.0  # seconds to load an MPI library in a process of its own
_WILDCARDS = ("", "0.0.0.0", "::")

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `exit_code` is 0 unless `status` is failed; `hint` says what to do about it."""

    checked: str
    status: Status
    found: str
    hint: str = ""
    exit_code: int = 0

    def line(self) -> str:
        """The finding for people; a second line holds the hint."""
        hint = f"\n         {self.hint}" if self.hint else ""
        return f"{self.status:8} {self.checked}: {self.found}{hint}"

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


class _Doubt(Exception):
    """Raised by a check whose finding is a warning."""

    def __init__(self, found: str, hint: str) -> None:
        super().__init__(found)
        self.found = found
        self.hint = hint


class _Checklist:
    """Runs checks and keeps what they found."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def run(self, checked: str, check: Callable[[], str]) -> None:
        """Notes what `check` returns, the _Doubt or the GptflError that it raises, or what nobody foresaw."""
        try:
            finding = Finding(checked, "ok", check())
        except _Doubt as doubt:
            finding = Finding(checked, "warning", doubt.found, doubt.hint)
        except GptflError as error:
            finding = Finding(checked, "failed", error.message, error.hint, error.exit_code)
        except Exception as error:  # of a library or of the user's code: the other checks shall still be made
            finding = Finding(checked, "failed", f"{type(error).__name__}: {error}", "", GptflError.exit_code)
        self.findings.append(finding)


def check_file(path: Path) -> list[Finding]:
    """Makes every check that fits the federation file or silo file at `path`, each of which gives one finding."""
    checks = _Checklist()
    try:
        file = _load(path)
    except ConfigError as error:
        return [Finding("file", "failed", error.message, error.hint, error.exit_code)]
    if isinstance(file, FederationFile):
        sizes = f"{len(file.silos)} silos and {len(file.labels)} labels"
        checks.findings.append(Finding("file", "ok", f"{path} is a federation file of {sizes}"))
        _check_federation(checks, path, file)
    else:
        checks.findings.append(Finding("file", "ok", f"{path} is the silo file of {file.name}"))
        _check_silo(checks, path, file)
    return checks.findings


def _load(path: Path) -> FederationFile | SiloFile:
    """The file, of the kind that more of its keys belong to. Raises ConfigError."""
    value = read_document(path).value
    keys = set(value) if isinstance(value, dict) else set()
    federation, silo = set(FederationFile.model_fields), set(SiloFile.model_fields)
    of_federation, of_silo = len(keys & (federation - silo)), len(keys & (silo - federation))
    if of_federation == of_silo == 0:
        raise ConfigError(
            f"{path} has the keys {', '.join(sorted(keys)) or '(none)'}: neither a federation file nor a silo file",
            hint="a federation file has labels and silos, a silo file has data; `gptfl init` prints either",
        )
    return load_federation(path) if of_federation >= of_silo else load_silo(path)


@contextlib.contextmanager
def _code_of(path: Path) -> Iterator[None]:
    """Lets modules beside the file at `path` be imported, then forgets them: another silo's may be named alike."""
    folder = path.absolute().parent
    path_before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path_before
        for name in set(sys.modules) - known:
            top = name.partition(".")[0]
            origin = getattr(sys.modules.get(top), "__file__", None)
            if top != "gptfl_dist" and origin is not None and Path(origin).parent in (folder, folder / top):
                del sys.modules[name]


# The federation file


def _check_federation(checks: _Checklist, path: Path, file: FederationFile) -> None:
    checks.run("device", lambda: _federation_devices(file))
    checks.run("model", lambda: _model(path, file))
    if _synthesises(file):
        checks.run("generator", lambda: _generator(file.synthesis.generator, file.labels))
    checks.run("run folder", lambda: _writable(file.run_folder))
    if _synthesises(file):
        checks.run("synthesis.folder", lambda: _writable(file.synthesis.folder))
    checks.run("disk space", lambda: _space(path, file))
    checks.run("test data", lambda: _test_data(file))
    for entry in file.silos:
        silo_path = entry.file
        if silo_path is not None:
            checks.run(f"silo file of {entry.name}", lambda e=entry, p=silo_path: _silo_file(path, file, e, p))  # type: ignore[misc]
            checks.run(f"training of {entry.name}", lambda e=entry, p=silo_path: _silo_training(path, file, e, p))  # type: ignore[misc]
    checks.run("silo files", lambda: _silo_entries(file))
    checks.run("credentials", lambda: _coordinator_credentials(file))
    checks.run("exchange.listen", lambda: _listen(file.exchange.listen))
    checks.run("MPI", _mpi)


def _synthesises(file: FederationFile) -> bool:
    return bool({"synthetic_only", "gptfl"} & set(file.arms))


def _federation_devices(file: FederationFile) -> str:
    if not _synthesises(file):
        return "none needed: no arm generates or pre-trains"
    from gptfl_dist.learning.device import resolve_device
    from gptfl_dist.synthesis.generator import place

    placement = place(file.synthesis.generator)
    return (
        f"synthesis on {placement.device} in {placement.dtype}, "
        f"pre-training on {resolve_device(file.pretraining.device)}"
    )


def _built(path: Path, file: FederationFile) -> nn.Module:
    """The federation's model as the coordinator builds it."""
    from gptfl_dist.learning.models import build_model

    with _code_of(path):
        return build_model(file.model, file.task, len(file.labels), file.seed)


def _model(path: Path, file: FederationFile) -> str:
    """Builds the model and gives it one training batch."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from gptfl_dist.learning.models import logits
    from gptfl_dist.weights.flat import layout_of

    model = _built(path, file)
    layout = layout_of(model)
    count = file.training.batch_size
    images = torch.zeros(count, file.task.channels, file.task.size, file.task.size)
    try:
        F.cross_entropy(logits(model, images), torch.zeros(count, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"model {file.model.name} cannot train on a batch of shape {tuple(images.shape)}: {error}",
            hint="make task and training.batch_size fit the model",
        ) from error
    return f"{file.model.name} with {layout.parameters:,} parameters ({size(layout.nbytes)}) took a batch of {count}"


def _generator(settings: Generator, labels: Sequence[str]) -> str:
    """Loads the generator from its folder. One of the hub is only asked for: it may have many gigabytes."""
    from gptfl_dist.synthesis.generator import load_generator, require_known_labels

    require_known_labels(settings, labels)
    source = settings.source
    if source == "embedded" or Path(source).expanduser().exists() or source.count("/") != 1 or source.startswith("."):
        described = load_generator(settings).describe()
        return f"{described['id']} loads, digest {described['digest'][:12]}"
    return _hub_generator(settings)


def _hub_generator(settings: Generator) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    from gptfl_dist.synthesis.generator import load_generator

    cached = try_to_load_from_cache(settings.source, "model_index.json")
    if isinstance(cached, str):
        load_generator(settings.model_copy(update={"source": str(Path(cached).parent)}))
        return f"{settings.source} loads from this machine's cache of the hub"
    try:
        files = HfApi().model_info(settings.source, timeout=_PATIENCE, files_metadata=True).siblings or []
    except Exception as error:  # the hub client and its HTTP library raise unrelated types
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GeneratorError(
            f"generator.source is {settings.source}: there is no such folder, it is not in this machine's cache of the "
            f"hub, and the hub cannot be asked ({first_line}): gptfl generate would fail to download it",
            hint="check the name and the connection, or download it elsewhere and name its folder",
        ) from error
    total = sum(file.size or 0 for file in files if not file.rfilename.endswith((".bin", ".ckpt", ".msgpack")))
    if "model_index.json" not in {file.rfilename for file in files}:
        raise GeneratorError(
            f"generator.source is {settings.source}, which the hub has without model_index.json: no diffusers pipeline",
            hint="name a diffusers pipeline",
        )
    return f"{settings.source} is on the hub; gptfl generate will download up to {size(total)}"


def _writable(folder: Path) -> str:
    """Writes a file into the folder, or into the nearest one above that exists."""
    existing = _nearest(folder)
    if not existing.is_dir():
        raise StorageError(f"{existing} is a file, expected a folder", hint="name another folder, or move the file")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise storage_error(error, existing) from None
    return f"{folder} is writable" if existing == folder else f"{folder} can be made, {existing} is writable"


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _space(path: Path, file: FederationFile) -> str:
    """Compares free space with an upper estimate of what the whole run keeps, by file system."""
    from gptfl_dist.run.result import federated_arms
    from gptfl_dist.weights.flat import layout_of

    model = layout_of(_built(path, file)).nbytes
    rates = len(file.training.learning_rates)
    arms = len(federated_arms(file))
    kept = 3 * arms * (1 + (rates if rates > 1 else 0)) + 1  # start, best, newest of each; the next being written
    named = 2 * arms + 2  # models/ARM, models/ARM-final; random and pretrained weights
    spools = len(file.silos)
    silos = 2 * sum(entry.file is not None for entry in file.silos)  # received weights and update of silos run here
    wanted = {file.run_folder: model * (kept + named + spools + silos)}
    if _synthesises(file):
        image = file.task.size**2 * file.task.channels
        wanted[file.synthesis.folder] = file.synthesis.images_per_label * len(file.labels) * image
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, most in wanted.items():
        there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
        place = _nearest(folder)
        first, sum_ = by_disk.get(place.stat().st_dev, (place, 0))
        by_disk[place.stat().st_dev] = (first, sum_ + max(0, most - there))
    told = []
    for place, needed in by_disk.values():
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"{size(free)} free at {place}, and the run may need {size(needed)} more",
                hint="free some space, or set run_folder and synthesis.folder to a larger disk",
            )
        told.append(f"{size(free)} free at {place}, at most {size(needed)} more needed")
    return "; ".join(told)


def _test_data(file: FederationFile) -> str:
    if file.test_data is None:
        return "none named: accuracy is measured on the silos' validation data alone"
    from gptfl_dist.config.silo import Data
    from gptfl_dist.learning.data import load_images

    images = load_images(Data(path=file.test_data), file.task, file.labels)
    counts = images.labels.bincount(minlength=len(file.labels)).tolist()
    absent = [label for label, count in zip(file.labels, counts, strict=True) if not count]
    if absent:
        raise _Doubt(
            f"{len(images)} images in {file.test_data}, none of {', '.join(absent)}",
            "accuracy will say nothing of these labels",
        )
    return f"{len(images)} images of all {len(counts)} labels in {file.test_data}"


def _silo_entries(file: FederationFile) -> str:
    apart = [entry.name for entry in file.silos if entry.file is None]
    if apart:
        raise _Doubt(
            f"{', '.join(apart)} named without a file, so nothing of them was checked",
            "gptfl run and mpiexec need the files; with gptfl coordinator each silo runs: gptfl check SILO_FILE",
        )
    return f"all {len(file.silos)} silos have one"


def _silo_file(path: Path, file: FederationFile, entry: SiloEntry, silo_path: Path) -> str:
    """The silo file loads, is this silo's, and its policy allows what the federation asks."""
    silo = load_silo(silo_path)
    if silo.name != entry.name:
        raise ConfigError(
            f"{silo_path}: name is {silo.name}, {path} expects {entry.name}", hint="make the two names the same"
        )
    training = LocalTraining.of(file, file.training.learning_rates[0])
    PolicyGuard(silo.policy).check(Order("train", "", file.arms[0], 1, "", file.federation.deadline, training))
    from gptfl_dist.run.federate import rounds_planned

    if rounds_planned(file) > silo.policy.max_rounds:
        raise PolicyError(
            f"{silo_path}: policy.max_rounds is {silo.policy.max_rounds}, the federation has up to "
            f"{rounds_planned(file)} rounds of training in all its arms and trials",
            hint="lower federation.rounds, or ask the silo's operator",
        )
    return f"{silo_path} fits"


def _silo_training(path: Path, file: FederationFile, entry: SiloEntry, silo_path: Path) -> str:
    """What the silo's trainer does before the first round: code, data, model."""
    from gptfl_dist.run.trainer import Trainer
    from gptfl_dist.weights.flat import layout_of

    silo = load_silo(silo_path)
    if silo.code is not None and silo.code.script is not None:
        return _script(silo.code.script)
    with _code_of(silo_path):
        trainer = Trainer(Plan.of(file), silo, silo_path.parent)
    expected = layout_of(_built(path, file))
    difference = expected.difference(trainer.layout)
    if difference:
        raise ModelError(
            f"the model that {silo_path} names is not the federation's: {difference}",
            hint="use the coordinator's model definition and release",
        )
    if expected.nbytes > silo.policy.max_model:
        raise PolicyError(
            f"{silo_path}: the federation's model has {size(expected.nbytes)}, policy.max_model allows "
            f"{size(silo.policy.max_model)}",
            hint="raise policy.max_model in the silo file if this is meant",
        )
    counts = trainer.label_counts()
    if trainer.samples > entry.max_samples:
        raise ConfigError(
            f"{entry.name} trains on {trainer.samples} images, but silos registers max_samples {entry.max_samples}: "
            "its updates would be refused",
            hint=f"set max_samples of {entry.name} to {trainer.samples} or more",
        )
    labels = sum(count > 0 for count in counts)
    return f"{sum(counts)} images of {labels} of {len(counts)} labels fit the federation's model"


def _coordinator_credentials(file: FederationFile) -> str:
    exchange = file.exchange
    if exchange.authority is None or exchange.certificate is None or exchange.key is None:
        return "none named: gptfl run makes its own; gptfl coordinator needs them"
    expiry = _credentials(exchange.authority, exchange.certificate, exchange.key, "coordinator", None, file.name)
    dialled = {host_of(exchange.listen): "exchange.listen"}
    for entry in file.silos:
        if entry.file is not None and entry.file.exists() and (side := load_silo(entry.file).coordinator) is not None:
            dialled[host_of(side.address)] = f"coordinator.address of {entry.name}"
    names = _hosts(exchange.certificate)
    for host, setting in dialled.items():
        if host in _WILDCARDS or host in names:
            continue
        found = f"{exchange.certificate} holds for {', '.join(sorted(names)) or 'no host'}, not for {host} ({setting})"
        hint = f"make a set for that name: gptfl credentials FEDERATION_FILE --host {host}"
        if setting != "exchange.listen":
            raise IdentityError(f"{found}: the silo would refuse it", hint=hint)
        raise _Doubt(found, f"well if silos dial another name; if not, {hint}")
    return _expiring(expiry, f"the coordinator's, for {', '.join(sorted(names))}")


def _listen(address: str) -> str:
    try_listening(address)
    return f"{address} can be listened on" if port_of(address) else f"{host_of(address)}, any free port"


def _mpi() -> str:
    """Loads an MPI in a process of its own: some end the process where they do not find their daemon."""
    program = "from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_SEARCH)
    except subprocess.TimeoutExpired:
        raise _Doubt(f"loading an MPI library took more than {_SEARCH:g} s", "try: mpiexec -n 1 hostname") from None
    if done.returncode != 0 or not done.stdout.strip():
        last = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise _Doubt(
            f"no MPI library can be loaded ({last})",
            "needed for mpiexec alone: pip install 'gptfl-dist[mpi]', or load your cluster's MPI module",
        )
    return " ".join(done.stdout.strip().splitlines()[0].split())


# The silo file


def _check_silo(checks: _Checklist, path: Path, silo: SiloFile) -> None:
    checks.run("device", lambda: _silo_device(silo))
    if silo.data is not None:
        checks.run("data", lambda: _silo_data(silo))
    if silo.code is not None:
        checks.run("code", lambda: _silo_code(path, silo))
    checks.run("work folder", lambda: _writable(silo.work_folder or path.absolute().parent / f"{silo.name}-work"))
    side = silo.coordinator
    if side is None:
        checks.run("coordinator", lambda: "none named: this silo runs under gptfl run or mpiexec alone")
        return
    checks.run("credentials", lambda: _silo_credentials(silo, side))
    checks.run("coordinator", lambda: _reach(side))


def _silo_device(silo: SiloFile) -> str:
    from gptfl_dist.learning.device import resolve_device

    return f"{silo.device} is {resolve_device(silo.device)}"


def _silo_data(silo: SiloFile) -> str:
    """Decodes every image once. The federation's size, channels and labels are not known here."""
    from gptfl_dist.config.federation import Task
    from gptfl_dist.learning.data import count_labels, load_images, split

    assert silo.data is not None
    counts = count_labels(silo.data)
    images = load_images(silo.data, Task(), tuple(counts))
    split(images, silo.data.validation_share, 0)
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())[:20])
    return f"{len(images)} images can be read: {told}{', ...' if len(counts) > 20 else ''}"


def _silo_code(path: Path, silo: SiloFile) -> str:
    from gptfl_dist.learning.code import import_function

    assert silo.code is not None
    if silo.code.script is not None:
        return _script(silo.code.script)
    named = {"code.function": silo.code.function, "code.model": silo.code.model}
    sources = [(setting, source) for setting, source in named.items() if source is not None]
    with _code_of(path):
        for setting, source in sources:
            import_function(source, setting)
    return f"{', '.join(source for _, source in sources)} can be imported"


def _script(script: Path) -> str:
    """Reads a script without running it: its syntax, and whether what it imports is here."""
    try:
        tree = ast.parse(script.read_bytes(), filename=str(script))
    except OSError as error:
        raise TrainerError(
            f"code.script {script} cannot be read: {error.strerror}", hint="check the path, relative to the silo file"
        ) from None
    except (SyntaxError, ValueError) as error:
        raise TrainerError(f"code.script {script} is no Python: {error}") from None
    modules = set(_imported(ast.walk(tree)))
    with _code_of(script):
        absent = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    if absent:
        raise TrainerError(
            f"code.script {script} imports {', '.join(absent)}, not found here",
            hint="install it for this Python, or put it beside the script",
        )
    if "gptfl_dist" not in modules:
        raise _Doubt(f"{script} does not import gptfl_dist", "it must call gptfl_dist.join to take part")
    return f"{script} and what it imports are here"


def _imported(nodes: Iterable[ast.AST]) -> Iterable[str]:
    """The top-level modules that a script's import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def _silo_credentials(silo: SiloFile, side: Coordinator) -> str:
    expiry = _credentials(side.authority, side.certificate, side.key, "silo", silo.name, None)
    return _expiring(expiry, f"those of {silo.name}")


def _reach(side: Coordinator) -> str:
    """Dials the coordinator as the silo would, up to its first word over TLS 1.3."""
    from gptfl_dist.security.credentials import load_credentials
    from gptfl_dist.security.identity import Identity

    host, port = host_of(side.address), port_of(side.address)
    _, own = load_credentials(side.authority, side.certificate, side.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(side.authority)
    context.load_cert_chain(side.certificate, side.key)
    hint = "check coordinator.address, that the coordinator runs, and that a firewall lets this machine dial out to it"
    try:
        with (
            socket.create_connection((host, port), _PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            peer: dict[str, Any] = secured.getpeercert() or {}
            # In TLS 1.3 this side is done before the other has judged its certificate: only its first word tells.
            first = secured.recv(1)
    except socket.gaierror as error:
        raise ConnectionFailed(
            f"{host} cannot be resolved: {error.strerror}", hint="check coordinator.address"
        ) from None
    except ssl.SSLCertVerificationError as error:
        raise IdentityError(
            f"the certificate of {side.address} is not one to trust: {error.verify_message}",
            hint="check coordinator.authority, and that coordinator.address is a name in the coordinator's certificate",
        ) from None
    except ssl.SSLError as error:
        raise IdentityError(
            f"no TLS 1.3 connection with {side.address}: {error.reason or error}",
            hint="check that a coordinator answers there, and that coordinator.certificate is of its federation",
        ) from None
    except OSError as error:
        raise ConnectionFailed(f"{side.address} does not answer: {error.strerror or error}", hint=hint) from None
    if not first:
        raise IdentityError(
            f"{side.address} closed the connection after the handshake: it does not take {side.certificate}",
            hint="ask the coordinator's operator for a matching set",
        )
    uris = [str(value) for kind, value in peer.get("subjectAltName", ()) if kind == "URI"]
    if uris != [Identity(own.federation, "coordinator", "coordinator").uri]:
        raise IdentityError(
            f"{side.address} is {', '.join(uris) or 'nobody'}, expected the coordinator of {own.federation}",
            hint="check coordinator.address",
        )
    return f"{side.address} answers over TLS 1.3 as the coordinator of {own.federation}"


# Shared


def _credentials(
    authority: Path, certificate: Path, key: Path, role: str, name: str | None, federation: str | None
) -> datetime:
    """Checks one side's three files; `name` and `federation` where they are known. Returns when they expire."""
    from cryptography import x509

    from gptfl_dist.security.credentials import check_dates, load_credentials

    credentials, identity = load_credentials(authority, certificate, key)
    check_dates(credentials.authority, str(authority))
    if identity.role != role or name not in (None, identity.name) or federation not in (None, identity.federation):
        whose = f"{role} {name}" if name else role
        raise IdentityError(
            f"{certificate} is the certificate of {identity.uri}, expected the {whose}"
            + (f" of {federation}" if federation else ""),
            hint="use the set that was made for this side",
        )
    both = (x509.load_pem_x509_certificate(pem) for pem in (credentials.authority, credentials.certificate))
    return min(read.not_valid_after_utc for read in both)


def _expiring(expiry: datetime, whose: str) -> str:
    left = expiry - datetime.now(UTC)
    if left < _EXPIRES_SOON:
        raise _Doubt(
            f"{whose}, expire in {left.days} days and {left.seconds // 3600} hours ({expiry:%F %T} UTC)",
            "make new sets in time: gptfl credentials FEDERATION_FILE",
        )
    return f"{whose}, valid until {expiry:%F}"


def _hosts(certificate: Path) -> set[str]:
    """The host names and addresses that a certificate holds for."""
    from cryptography import x509

    read = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *(str(a) for a in names.get_values_for_type(x509.IPAddress))}
