"""What a cell cost: the coordinator's devices before the federation, the silos' training, and what travelled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gptfl_dist.observe.matrix_measures import Known
from gptfl_dist.observe.summary import FederatedArm, ServerStage, StageCost


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of all the coordinator's devices together (0 for a stage that the cell needs nothing of), of the training
    of all silos, and bytes over all rounds; None where that is not known. `hardware` names the coordinator's devices.
    """

    generate: float | None
    pretrain: float | None
    silos: float | None
    bytes: int
    hardware: tuple[str, ...] = ()


def cost_of(
    arms: Sequence[FederatedArm],
    measures: Sequence[Known],
    server: Mapping[ServerStage, StageCost],
    needed: Collection[ServerStage],
) -> Cost:
    """Of a cell that needs these stages. `server` is what they noted."""
    seconds = [one["silo_seconds"] for one in measures[1:]]
    known = [value for value in seconds if value is not None]

    def taken(stage: ServerStage) -> float | None:
        if stage not in needed:
            return 0.0
        return server[stage].device_seconds if stage in server else None

    return Cost(
        generate=taken("generate"),
        pretrain=taken("pretrain"),
        silos=sum(known) if known and len(known) == len(seconds) else None,
        bytes=sum(arm.bytes_down + arm.bytes_up for arm in arms),
        hardware=tuple(f"{stage}: {cost.hardware}" for stage, cost in server.items()),
    )
