"""The silo file: one silo's side, written and owned by its operator.

It names the data, the way to the coordinator and the silo's own policy, which wins over anything the coordinator
asks for. The commented default of every setting is `defaults/silo.yaml`. Paths are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from gptfl_dist.config.at_rest import AtRest
from gptfl_dist.config.base import Address, Device, Name, Section, Share
from gptfl_dist.config.units import Duration, Size


class Coordinator(Section):
    """Where the coordinator is and how both sides prove who they are."""

    address: Address
    authority: Path
    certificate: Path
    key: Path


class Data(Section):
    """The private data: a folder with one sub-folder a label, a Parquet or `datasets` folder, or an .npz file.

    `labels` renames the data's own label names to the federation's. `samples` is a text file of the numbers of the
    samples that are used, from 0, one a line.
    """

    path: Path
    format: Literal["auto", "folder", "parquet", "npz"] = "auto"
    samples: Path | None = None
    validation_share: Share = 0.1
    labels: dict[str, str] = Field(default={})


class Code(Section):
    """Code of the silo's own, which only its operator can name.

    `function` takes the place of the built-in local training, `model` builds the federation's model where that is no
    built-in one, `script` is an existing training script that calls `gptfl_dist.join`.
    """

    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    model: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    script: Path | None = None

    @model_validator(mode="after")
    def _script_stands_alone(self) -> Self:
        if self.script is not None and (self.function is not None or self.model is not None):
            raise ValueError("code.script brings its own training and model: give it without code.function, code.model")
        if self.script is None and self.function is None and self.model is None:
            raise ValueError("code is empty: give code.function or code.model (package.module:function) or code.script")
        return self


class Torchrun(Section):
    """`torchrun` on the agent's machine."""

    processes: PositiveInt = 1
    options: list[str] = Field(default=[])


class Mpirun(Section):
    """An MPI's own launcher on the agent's machine, which may start ranks on others."""

    command: str = "mpiexec"
    ranks: PositiveInt = 1
    options: list[str] = Field(default=[])


class Slurm(Section):
    """A job, held until the federation is over, or one for each order."""

    hold: Literal["run", "round"] = "run"
    options: list[str] = Field(default=[])

    @field_validator("options")
    @classmethod
    def _not_what_the_agent_sets(cls, options: list[str]) -> list[str]:
        for option in options:
            name = option.partition("=")[0] if option.startswith("--") else option[:2]
            if not option.startswith("-") or " " in option.partition("=")[0]:
                raise ValueError(f"expected options of sbatch such as --time=04:00:00, found {option!r}")
            if name in _AGENTS_OWN:
                raise ValueError(f"launch.slurm.options must not hold {name}: the agent sets it, or would lose its job")
        return options


_AGENTS_OWN = {
    *("--job-name", "-J", "--comment", "--output", "-o", "--error", "-e", "--open-mode", "--requeue", "--no-requeue"),
    *("--array", "-a", "--wait", "-W", "--wrap", "--parsable", "--chdir", "-D", "--hold", "-H"),
}


class Launch(Section):
    """How the training process is started. What is lost (killed, cancelled, preempted) is started again."""

    how: Literal["child", "torchrun", "mpirun", "slurm"] = "child"
    folder: Path | None = None
    lease: Annotated[Duration, Field(ge=1.0)] = 60.0
    retries: NonNegativeInt = 1
    pause: Duration = 1.0
    torchrun: Torchrun = Torchrun()
    mpirun: Mpirun = Mpirun()
    slurm: Slurm = Slurm()


class Policy(Section):
    """What the coordinator may ask of this silo. More than this is refused."""

    max_rounds: PositiveInt = 10_000
    max_epochs_per_round: PositiveInt = 100
    max_seconds_per_round: Duration = 24 * 3600.0
    max_model: Size = 8 * 2**30
    class_means: bool = False
    max_synthetic: Size = 2**30
    metrics: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]] = Field(
        default=["accuracy", "loss", "samples", "seconds", "train_loss"]
    )


class SiloFile(Section):
    """The whole silo file."""

    name: Name
    coordinator: Coordinator | None = None
    data: Data | None = None
    code: Code | None = None
    policy: Policy = Policy()
    launch: Launch = Launch()
    model_source: str | None = None
    device: Device = "auto"
    work_folder: Path | None = None
    at_rest: AtRest | None = None

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.data is None and (self.code is None or self.code.script is None):
            raise ValueError("data is missing: name the data folder or file (only code.script may load its own data)")
        return self
