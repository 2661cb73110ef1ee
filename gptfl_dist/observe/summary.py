"""`summary.json`: the result of a run for programs.

Accuracies are shares between 0 and 1. `curve` holds one accuracy a round, of test data where the federation has
some and else of the silos' validation data; `curve_of` says which, and without test data every test accuracy is
null. The kept model is the best on validation data, so test data choose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from gptfl_dist.config.base import Section
from gptfl_dist.config.federation import Arm
from gptfl_dist.errors import StorageError
from gptfl_dist.files import write_file

FILE_NAME = "summary.json"

Accuracy = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Seconds = Amount
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class RoundMeasures(Section):
    """What was measured of a round; round 0 is the start. docs/experiments.md defines each.

    Of the weights after it: `macro_f1`, `calibration_error` and `loss` on test data, and `silo_accuracy` on the
    validation data of each silo that was called on next. Of the updates that counted in it: the diversity and what
    belongs to it. Of its orders: `silo_seconds`, what each silo's training took. What is not known is None or left out.
    """

    macro_f1: Accuracy | None = None
    calibration_error: Accuracy | None = None
    loss: Amount | None = None
    silo_accuracy: dict[str, Accuracy] = Field(default={})
    diversity: Amount | None = None
    log_n_diversity: Finite | None = None
    mean_cosine: Finite | None = None
    mean_norm: Amount | None = None
    max_norm: Amount | None = None
    silo_seconds: dict[str, Seconds] = Field(default={})
    bytes_down: NonNegativeInt = 0
    bytes_up: NonNegativeInt = 0

    @property
    def worst_silo_accuracy(self) -> float | None:
        """Of the silo for which the weights do worst."""
        return min(self.silo_accuracy.values(), default=None)


StopCriterion = Literal["max_time", "target_accuracy", "patience"]
"""The settings of `federation` that end an arm before its last round."""


@dataclass(frozen=True)
class RoundRecord:
    """What one round of one arm came to: wall-clock seconds, bytes on the wire, accuracy of the weights after it.

    `accuracy` is on test data and None without them; `validation_accuracy` is None where no silo reported one.
    `staleness` names the silos whose updates counted, each with the number of rounds since its order was given.
    """

    round: int
    seconds: float
    bytes_down: int
    bytes_up: int
    accuracy: float | None
    validation_accuracy: float | None
    staleness: Mapping[str, int] = field(default_factory=dict)
    measures: RoundMeasures = field(default_factory=RoundMeasures)


class SyntheticArm(Section):
    """The pre-trained model as it is before any silo trains it."""

    accuracy: Accuracy | None
    validation_accuracy: Accuracy | None = None


class SiloUpdates(Section):
    """What came of one silo: how many of its updates counted, and how many rounds old they were then."""

    counted: PositiveInt
    mean_staleness: NonNegativeFloat
    max_staleness: NonNegativeInt


class FederatedArm(Section):
    """One federation from given start weights. `best_round` is that of the kept model; 0 stands for the start."""

    accuracy: Accuracy | None
    rounds: NonNegativeInt
    rounds_to_target: PositiveInt | None = None
    bytes_down: NonNegativeInt
    bytes_up: NonNegativeInt
    curve: list[Accuracy | None]
    final_accuracy: Accuracy | None
    validation_accuracy: Accuracy | None
    best_round: NonNegativeInt
    learning_rate: PositiveFloat
    validation_curve: list[Accuracy | None]
    start_accuracy: Accuracy | None
    seconds_per_round: Seconds
    updates: dict[str, SiloUpdates] = Field(default={})
    stopped_by: StopCriterion | None = None
    measures: list[RoundMeasures] = Field(default=[])

    @model_validator(mode="after")
    def _a_value_a_round(self) -> Self:
        for name, curve in (("curve", self.curve), ("validation_curve", self.validation_curve)):
            if len(curve) != self.rounds:
                raise ValueError(f"{name} has {len(curve)} values, expected one for each of the {self.rounds} rounds")
        if len(self.measures) not in (0, self.rounds + 1):
            found = f"measures has {len(self.measures)} entries"
            raise ValueError(f"{found}, expected one for the start and each of the {self.rounds} rounds, or none")
        if self.best_round > self.rounds:
            raise ValueError(f"best_round is {self.best_round}, but there are only {self.rounds} rounds")
        return self


class Arms(Section):
    """The arms that the federation file asked for; the others are absent from the file."""

    synthetic_only: SyntheticArm | None = None
    fedavg_random: FederatedArm | None = None
    gptfl: FederatedArm | None = None

    @property
    def federated(self) -> dict[Literal["fedavg_random", "gptfl"], FederatedArm]:
        """The federated arms that were run, by name."""
        found: dict[Literal["fedavg_random", "gptfl"], FederatedArm] = {}
        if self.fedavg_random is not None:
            found["fedavg_random"] = self.fedavg_random
        if self.gptfl is not None:
            found["gptfl"] = self.gptfl
        return found

    @model_serializer(mode="wrap")
    def _only_those_run(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: arm for name, arm in handler(self).items() if arm is not None}


class WeightDigests(Section):
    """BLAKE3 digests (hex) of an arm's weights: after the last round, and those of the kept model."""

    final: Digest
    best: Digest


class Choice(Section):
    """Which candidate's model was fine-tuned, and the accuracy by which the silos or held-out images chose it."""

    chosen: str
    by: Literal["silos", "synthetic"]
    accuracy: dict[str, Accuracy]


ServerStage = Literal["generate", "pretrain"]
"""What the coordinator does before the federation."""


class StageCost(Section):
    """What a stage took at the coordinator: seconds of all its devices together, and what these are called."""

    device_seconds: Seconds
    hardware: str


class Summary(Section):
    """A whole run. `seconds` are by stage, as they passed; `server` is what generating and pre-training took of which
    devices, whenever that was, and lacks what was not noted. `tuning` holds each rate's accuracy on validation data.
    """

    run: str
    transport: str
    silos: PositiveInt
    seed: NonNegativeInt
    target_accuracy: Accuracy | None = None
    seconds: dict[str, Seconds]
    server: dict[ServerStage, StageCost] = Field(default={})
    arms: Arms
    curve_of: Literal["test", "validation"]
    tuning: dict[Arm, dict[PositiveFloat, Accuracy | None]] = Field(default={})
    model_bytes: NonNegativeInt
    parameters: NonNegativeInt
    synthetic_images: NonNegativeInt
    choice: Choice | None = None
    chosen_by: Literal["silos", "synthetic"] = "silos"
    started: AwareDatetime
    finished: AwareDatetime
    weights: dict[Arm, WeightDigests] = Field(default={})


def rounds_to_target(curve: Sequence[float | None], target: float) -> int | None:
    """The first round (counted from 1) whose accuracy is at least `target`; None where no round reaches it."""
    reached = (number for number, accuracy in enumerate(curve, 1) if accuracy is not None and accuracy >= target)
    return next(reached, None)


def with_target(summary: Summary) -> Summary:
    """The summary with `target_accuracy` and each arm's `rounds_to_target` filled in from the curves.

    The target is the best accuracy in the curve of `fedavg_random`; without that arm there is none.
    """
    fedavg = summary.arms.fedavg_random
    target = max((value for value in fedavg.curve if value is not None), default=None) if fedavg else None
    arms: dict[str, FederatedArm] = {}
    for name, arm in summary.arms.federated.items():
        reached = None if target is None else rounds_to_target(arm.curve, target)
        arms[name] = arm.model_copy(update={"rounds_to_target": reached})
    return summary.model_copy(update={"target_accuracy": target, "arms": summary.arms.model_copy(update=arms)})


def federated_arm(
    records: Sequence[RoundRecord],
    *,
    best_round: int,
    learning_rate: float,
    start: RoundRecord,
    curve_of: Literal["test", "validation"],
    stopped_by: StopCriterion | None = None,
) -> FederatedArm:
    """An arm from its rounds in order and from `start`, its round 0: the start weights, with bytes of handing them out.

    `best_round` is the round of the kept model, 0 for the start weights; `stopped_by` what ended the arm early.
    """
    kept = records[best_round - 1] if best_round else start
    last = records[-1] if records else start
    validation = [record.validation_accuracy for record in records]
    return FederatedArm(
        accuracy=kept.accuracy,
        rounds=len(records),
        bytes_down=start.bytes_down + sum(record.bytes_down for record in records),
        bytes_up=start.bytes_up + sum(record.bytes_up for record in records),
        curve=[record.accuracy for record in records] if curve_of == "test" else validation,
        final_accuracy=last.accuracy,
        validation_accuracy=kept.validation_accuracy,
        best_round=best_round,
        learning_rate=learning_rate,
        validation_curve=validation,
        start_accuracy=start.accuracy,
        seconds_per_round=sum(record.seconds for record in records) / max(1, len(records)),
        updates=_updates(records),
        stopped_by=stopped_by,
        measures=[record.measures for record in (start, *records)],
    )


def _updates(records: Sequence[RoundRecord]) -> dict[str, SiloUpdates]:
    """By silo, in sorted order."""
    found: dict[str, list[int]] = {}
    for record in records:
        for silo, staleness in record.staleness.items():
            found.setdefault(silo, []).append(staleness)
    return {
        silo: SiloUpdates(counted=len(ages), mean_staleness=sum(ages) / len(ages), max_staleness=max(ages))
        for silo, ages in sorted(found.items())
    }


def write_summary(folder: Path, summary: Summary) -> Path:
    """Write `summary.json` into the run's folder, whole or not at all; returns its path. Raises StorageError."""
    path = folder / FILE_NAME
    write_file(path, summary.model_dump_json(indent=2) + "\n")
    return path


def read_summary(folder: Path) -> Summary:
    """Read `summary.json` of a run's folder. Raises StorageError where it is missing or no summary."""
    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path}: cannot be read ({error})", hint="Name the folder of a finished run: it holds a summary.json."
        ) from error
    try:
        return Summary.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StorageError(
            f"{path}: {field}: {first['msg']}", hint="The file was changed or is of another release: run again."
        ) from error
