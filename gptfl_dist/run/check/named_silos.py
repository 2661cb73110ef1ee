"""What of the pre-flight is about the silos that a federation file names: whether each one's own file fits it.

A silo that is named without a file is elsewhere, and is checked there (`run.check.silo`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gptfl_dist.config.federation import FederationFile, SiloEntry
from gptfl_dist.config.load import load_silo
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.errors import ConfigError, GptflError, IdentityError, ModelError, PolicyError
from gptfl_dist.federation.orders import Order
from gptfl_dist.federation.silo import PolicyGuard
from gptfl_dist.observe.wording import size
from gptfl_dist.run.at_rest import try_at_rest
from gptfl_dist.run.check.common import (
    built_model,
    check_credentials,
    code_beside,
    launcher_found,
    parse_script,
    require_trusted,
    valid_until,
)
from gptfl_dist.run.check.findings import Checklist, Doubt
from gptfl_dist.run.check.space import handed_out
from gptfl_dist.run.handout import travelling


def check_named_silos(checks: Checklist, path: Path, file: FederationFile) -> None:
    """Of each silo whose file the federation file names; then which silos are named without one."""
    for entry in file.silos:
        silo_path = entry.file
        if silo_path is not None:
            fits = checks.run(f"silo file of {entry.name}", partial(_silo_file, path, file, entry, silo_path))
            if not fits and not _loads(silo_path):
                continue
            checks.run(f"at_rest of {entry.name}", partial(_silo_at_rest, file, entry, silo_path))
            checks.run(f"training of {entry.name}", partial(_silo_training, path, file, entry, silo_path))
            if file.collective.reduction == "fast":
                checks.run(f"fast at {entry.name}", partial(_trains_in_its_rank, silo_path))
            if file.collective.trust == "tls":
                checks.run(f"credentials of {entry.name}", partial(_silo_credentials, file, entry, silo_path))
    checks.run("silo files", lambda: _silo_entries(file))


def _loads(silo_path: Path) -> bool:
    try:
        load_silo(silo_path)
    except GptflError:
        return False
    return True


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
    guard.check_samples(handed_out(file))
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
    expected = travelling(layout_of(built_model(path, file)), file.strategy)
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
    theirs = file.exchange
    if theirs.authority is not None and theirs.certificate is not None:
        require_trusted(side.certificate, theirs.authority)
        require_trusted(theirs.certificate, side.authority)
    return valid_until(shown, f"those of {entry.name}")


def _silo_entries(file: FederationFile) -> str:
    apart = [entry.name for entry in file.silos if entry.file is None]
    if apart:
        raise Doubt(
            f"{', '.join(apart)} named without a file, so nothing of them was checked",
            "gptfl run and mpiexec need the files; with gptfl coordinator each silo runs: gptfl check SILO_FILE",
        )
    return f"one is named for each of the {len(file.silos)} silos"
