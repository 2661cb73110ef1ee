"""The pre-flight of a federation file: model, generator, disk, data, the silos' files, certificates, port, MPI."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptfl_dist.aggregation.rules import rule_of
from gptfl_dist.aggregation.server import moment_names
from gptfl_dist.config.base import EVERYWHERE, host_of, port_of
from gptfl_dist.config.federation import FederationFile, SiloEntry
from gptfl_dist.config.load import load_silo
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.strategy import ROBUST
from gptfl_dist.config.synthesis import Filter, Generator
from gptfl_dist.errors import (
    ConfigError,
    GeneratorError,
    IdentityError,
    ModelError,
    PolicyError,
    StorageError,
    first_line,
)
from gptfl_dist.federation.orders import Order
from gptfl_dist.federation.silo import PolicyGuard
from gptfl_dist.ledger.lock import at_work
from gptfl_dist.observe.wording import size
from gptfl_dist.run.addresses import PortInUse, try_listening
from gptfl_dist.run.at_rest import try_at_rest
from gptfl_dist.run.candidates import candidate_files
from gptfl_dist.run.check.common import (
    check_credentials,
    code_beside,
    ending_soon,
    host_names,
    launcher_found,
    nearest,
    parse_script,
    valid_until,
    writable,
)
from gptfl_dist.run.check.findings import Checklist, Doubt
from gptfl_dist.run.credentials import kept_authority
from gptfl_dist.run.filter import FILTER_SOURCE, load_judge
from gptfl_dist.run.handout import travelling
from gptfl_dist.security.vault import Vault
from gptfl_dist.weights import Codec
from gptfl_dist.weights.samples import samples_layout

if TYPE_CHECKING:
    from torch import nn

_PATIENCE = 5.0  # seconds for an answer of the hub
_SEARCH = 60.0  # seconds to load an MPI library in a process of its own


def check_federation(checks: Checklist, path: Path, file: FederationFile) -> None:
    checks.run("device", lambda: _federation_devices(file))
    checks.run("model", lambda: _model(path, file))
    if file.synthesises:
        for name, candidate in (candidate_files(file) or {"": file}).items():
            _synthesis(checks, candidate, f" of {name}" if name else "")
    checks.run("training", lambda: _recipe(file))
    checks.run("strategy", lambda: _strategy(path, file))
    checks.run("compression", lambda: _compression(path, file))
    checks.run("run folder", lambda: writable(file.run_folder))
    checks.run("at_rest", lambda: try_at_rest(file.at_rest, file.run_folder))
    if file.synthesises:
        checks.run("synthesis.folder", lambda: writable(file.synthesis.folder))
    checks.run("disk space", lambda: _space(path, file))
    checks.run("test data", lambda: _test_data(file))
    for entry in file.silos:
        silo_path = entry.file
        if silo_path is not None:
            checks.run(f"silo file of {entry.name}", partial(_silo_file, path, file, entry, silo_path))
            checks.run(f"at_rest of {entry.name}", partial(_silo_at_rest, file, entry, silo_path))
            checks.run(f"training of {entry.name}", partial(_silo_training, path, file, entry, silo_path))
            if file.collective.reduction == "fast":
                checks.run(f"fast at {entry.name}", partial(_trains_in_its_rank, silo_path))
            if file.collective.trust == "tls":
                checks.run(f"credentials of {entry.name}", partial(_silo_credentials, file, entry, silo_path))
    checks.run("silo files", lambda: _silo_entries(file))
    checks.run("credentials", lambda: _coordinator_credentials(file))
    checks.run("exchange.listen", partial(_listen, file, "exchange.listen", file.exchange.listen))
    if file.enrolment is not None:
        checks.run("enrolment.listen", partial(_listen, file, "enrolment.listen", file.enrolment.listen))
    checks.run("MPI", _mpi)


def _synthesis(checks: Checklist, file: FederationFile, whose: str) -> None:
    """Prompts, generator and filter of a file, or of one of its candidates."""
    checks.run(f"prompts{whose}", lambda: _prompts(file))
    checks.run(f"generator{whose}", lambda: _generator(file.synthesis.generator, file.labels))
    settings = file.synthesis.filter
    if settings is not None:
        checks.run(f"filter{whose}", lambda: _filter(file, settings))


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


def _built(path: Path, file: FederationFile, tell: Callable[[str], None] = lambda told: None) -> nn.Module:
    """The federation's model as the coordinator builds it."""
    from gptfl_dist.learning.models import build_model

    with code_beside(path):
        return build_model(file.model, file.task, len(file.labels), file.seed, tell)


def _model(path: Path, file: FederationFile) -> str:
    """Builds the model and gives it one training batch."""
    import torch
    import torch.nn.functional as F  # noqa: N812  (torch's idiom)

    from gptfl_dist.learning.models import logits
    from gptfl_dist.weights.flat import layout_of

    notes: list[str] = []
    model = _built(path, file, notes.append)
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


def _prompts(file: FederationFile) -> str:
    from gptfl_dist.synthesis.generator import unknown_words
    from gptfl_dist.synthesis.prompts import build_prompts

    prompts = build_prompts(file.synthesis.prompts, file.labels)
    unknown = unknown_words(file.synthesis.generator, (text for texts in prompts.values() for text in texts))
    if unknown:
        raise Doubt(
            f"the embedded generator has never read {', '.join(unknown[:8])}{' ...' if unknown[8:] else ''}, and draws "
            "a digit of its own choice for what it does not understand",
            hint='keep to "a handwritten digit {label}" with the styles of its model card, or name another generator',
        )
    counts = [len(texts) for texts in prompts.values()]
    source = file.synthesis.prompts.file or "templates and styles"
    return f"{min(counts)} to {max(counts)} a label, from {source}"


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
    layout = layout_of(_built(path, file))
    up = Codec(settings.up, settings.top_share).layout(layout).nbytes / layout.nbytes
    down = Codec(settings.down).layout(layout).nbytes / layout.nbytes
    packed = "" if settings.lossless == "none" else f", over gRPC packed by {settings.lossless} besides"
    return f"updates take {up:.1%} and weights {down:.1%} of {size(layout.nbytes)}{packed}"


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
    from huggingface_hub import try_to_load_from_cache

    from gptfl_dist.synthesis.generator import load_generator

    cached = try_to_load_from_cache(settings.source, "model_index.json")
    if isinstance(cached, str):
        load_generator(settings.model_copy(update={"source": str(Path(cached).parent)}))
        return f"{settings.source} loads from this machine's cache of the hub"
    return _on_hub(settings.source, "generator.source", "model_index.json", "diffusers pipeline")


def _filter(file: FederationFile, settings: Filter) -> str:
    """Loads the judge from its folder. One of the hub is only asked for, unless it is in this machine's cache."""
    from huggingface_hub import try_to_load_from_cache

    from gptfl_dist.learning.cross import FOLDS
    from gptfl_dist.synthesis.source import find_model, is_folder_name

    source = settings.source
    if source is None:
        return f"cross: the model is trained {FOLDS} times, to judge the part of the images that it has not seen"
    if not is_folder_name(source) and not Path(source).is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            return _on_hub(source, FILTER_SOURCE, "config.json", "transformers model")
        source = str(Path(cached).parent)
    found = find_model(source, FILTER_SOURCE)
    load_judge(file, settings, {label: [label] for label in file.labels}, found)
    return f"the {settings.judge} {settings.source} loads and judges by {len(file.labels)} labels"


def _on_hub(source: str, setting: str, index: str, kind: str) -> str:
    """Asks the hub for a model that is known by its file `index`. Raises GeneratorError: generation would end so."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(source, timeout=_PATIENCE, files_metadata=True).siblings or []
    except Exception as error:  # the hub client and its HTTP library raise unrelated types
        raise GeneratorError(
            f"{setting} is {source}: there is no such folder, it is not in this machine's cache of the "
            f"hub, and the hub cannot be asked ({first_line(error)}): gptfl generate would fail to download it",
            hint="check the name and the connection, or download it elsewhere and name its folder",
        ) from error
    total = sum(file.size or 0 for file in files if not file.rfilename.endswith((".bin", ".ckpt", ".msgpack")))
    if index not in {file.rfilename for file in files}:
        raise GeneratorError(
            f"{setting} is {source}, which the hub has without {index}: no {kind}", hint=f"name a {kind}"
        )
    return f"{source} is on the hub; gptfl generate will download up to {size(total)}"


def _space(path: Path, file: FederationFile) -> str:
    """Compares free space with an upper estimate of what the whole run keeps, by file system."""
    from gptfl_dist.run.result import federated_arms
    from gptfl_dist.weights.flat import layout_of

    model = layout_of(_built(path, file)).nbytes
    rates = len(file.training.learning_rates)
    arms = len(federated_arms(file))
    runs = arms * (1 + (rates if rates > 1 else 0))
    kept = 3 * runs + 1  # start, best, newest of each; the next being written
    if file.federation.keep == "all":
        kept += arms * file.federation.rounds
    if file.federation.mode == "asynchronous" or file.federation.late == "carry":
        kept += len(file.silos)  # what the open orders of earlier rounds start from
    control = file.strategy.rule == "scaffold"
    # The strategy's state of each newest, and the next one.
    kept += (runs + 1) * (len(moment_names(file.strategy)) + control)
    sets = len(file.synthesis.candidates) or 1
    named = 2 * arms + 2 + 2 * sets  # models/ARM, models/ARM-final; random, pretrained; each candidate's and its start
    spools = len(file.silos)
    encoded = [name for name in (file.compression.up, file.compression.down) if name != "none"]
    owed = 2 if file.compression.up != "none" and file.compression.error_feedback else 0  # the last, and the next
    # Of silos run here the received weights and the update, each in its encoded form too, and what encoding lost.
    owed += 2 * len(Plan.of(file).kept)  # likewise what the strategy keeps at a silo
    silos = (2 + len(encoded) + owed) * sum(entry.file is not None for entry in file.silos)
    spools += len(encoded) + control  # what is handed out is made once for all silos
    spools, silos = spools * (1 + control), silos * (1 + control)  # the control variate goes where the weights go
    wanted = {file.run_folder: model * (kept + named + spools + silos)}
    wanted[file.run_folder] += _handed_out(file) * (1 + sum(entry.file is not None for entry in file.silos))
    if file.synthesises:
        task = file.task
        sample = math.prod(task.shape) if task.kind == "image" else 2 * task.clip_samples
        wanted[file.synthesis.folder] = sets * file.synthesis.images_per_label * len(file.labels) * sample
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, most in wanted.items():
        there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
        place = nearest(folder)
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


def _handed_out(file: FederationFile) -> int:
    """How many bytes of synthetic samples a silo is given at most."""
    if file.mixing.samples == "none":
        return 0
    each = min(file.mixing.per_label, file.synthesis.images_per_label)
    return samples_layout(file.task.shape, each * len(file.labels)).nbytes


def _test_data(file: FederationFile) -> str:
    if file.test_data is None:
        return "none named: accuracy is measured on the silos' validation data alone"
    from gptfl_dist.config.silo import Data
    from gptfl_dist.learning.data import load_images

    images = load_images(Data(path=file.test_data), file.task, file.labels)
    counts = images.labels.bincount(minlength=len(file.labels)).tolist()
    absent = [label for label, count in zip(file.labels, counts, strict=True) if not count]
    if absent:
        raise Doubt(
            f"{len(images)} {file.task.samples} in {file.test_data}, none of {', '.join(absent)}",
            "accuracy will say nothing of these labels",
        )
    return f"{len(images)} {file.task.samples} of all {len(counts)} labels in {file.test_data}"


def _silo_entries(file: FederationFile) -> str:
    apart = [entry.name for entry in file.silos if entry.file is None]
    if apart:
        raise Doubt(
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
    training = LocalTraining.of(file, file.training.learning_rates[0], 1)
    guard = PolicyGuard(silo.policy)
    guard.check(Order("train", "", file.arms[0], 1, "", file.federation.deadline, training))
    guard.check_samples(_handed_out(file))
    from gptfl_dist.run.arm import rounds_planned

    if rounds_planned(file) > silo.policy.max_rounds:
        raise PolicyError(
            f"{silo_path}: policy.max_rounds is {silo.policy.max_rounds}, the federation has up to "
            f"{rounds_planned(file)} rounds of training in all its arms and trials",
            hint="lower federation.rounds, or ask the silo's operator",
        )
    if silo.launch.how != "child":
        return f"{silo_path} fits, launcher: {launcher_found(silo)}"
    return f"{silo_path} fits"


def _silo_at_rest(file: FederationFile, entry: SiloEntry, silo_path: Path) -> str:
    """The key of a silo that `gptfl run` starts, in the work folder that it has then."""
    return try_at_rest(load_silo(silo_path).at_rest, file.run_folder / "silos" / entry.name)


def _trains_in_its_rank(silo_path: Path) -> str:
    """Whether a silo can take part where the MPI sums the updates."""
    silo = load_silo(silo_path)
    wrong = f"launch.how: {silo.launch.how}" if silo.launch.how != "child" else ""
    if silo.code is not None and silo.code.script is not None:
        wrong = f"code.script: {silo.code.script}"
    if wrong:
        raise Doubt(
            f"collective.reduction is fast, in which a silo trains in its rank, and {silo_path} has {wrong}",
            "mpiexec and torchrun would be refused; set collective.reduction to exact",
        )
    return "trains in its rank"


def _silo_training(path: Path, file: FederationFile, entry: SiloEntry, silo_path: Path) -> str:
    """What the silo's trainer does before the first round: code, data, model."""
    from gptfl_dist.run.trainer import Trainer
    from gptfl_dist.weights.flat import layout_of

    silo = load_silo(silo_path)
    if silo.code is not None and silo.code.script is not None:
        return parse_script(silo.code.script)
    with code_beside(silo_path):
        trainer = Trainer(Plan.of(file), silo, silo_path.parent)
    expected = travelling(layout_of(_built(path, file)), file.strategy)
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
            f"{entry.name} trains on {trainer.samples} {file.task.samples}, but silos registers max_samples "
            f"{entry.max_samples}: its updates would be refused",
            hint=f"set max_samples of {entry.name} to {trainer.samples} or more",
        )
    labels = sum(count > 0 for count in counts)
    return f"{sum(counts)} {file.task.samples} of {labels} of {len(counts)} labels fit the federation's model"


def _silo_credentials(file: FederationFile, entry: SiloEntry, silo_path: Path) -> str:
    """What a silo's rank shows where the ranks speak TLS."""
    side = load_silo(silo_path).coordinator
    if side is None:
        raise IdentityError(
            f"collective.trust is tls, and {silo_path} names no certificates under coordinator",
            hint="name the files that `gptfl join` got for this silo, or that `gptfl credentials` made for it",
        )
    shown = check_credentials(side.authority, side.certificate, side.key, "silo", entry.name, file.name)
    return valid_until(shown, f"those of {entry.name}")


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
