"""A small finished run: three arms of a few rounds."""

from __future__ import annotations

from datetime import UTC, datetime

from gptfl_dist.observe.summary import (
    Arms,
    FederatedArm,
    RoundMeasures,
    RoundRecord,
    Summary,
    SyntheticArm,
    WeightDigests,
    federated_arm,
    with_target,
)


def records(curve: list[float], *, test: bool = True) -> list[RoundRecord]:
    """A round of 2 s for each accuracy, the same on test and validation data; updates of `north` are a round old."""
    ages = {"south": 0, "north": 1}
    return [
        RoundRecord(n, 2.0, 100, 90, value if test else None, value, ages, measures(value))
        for n, value in enumerate(curve, 1)
    ]


def measures(accuracy: float) -> RoundMeasures:
    """Of a round that led to this accuracy: the silos' are a tenth above and below it."""
    return RoundMeasures(
        macro_f1=accuracy,
        calibration_error=1 - accuracy,
        loss=2.0,
        silo_accuracy={"north": accuracy + 0.1 if accuracy < 0.9 else 1.0, "south": accuracy - 0.1},
        diversity=0.5,
        log_n_diversity=0.0,
        mean_cosine=1.0,
        mean_norm=3.0,
        max_norm=4.0,
        silo_seconds={"north": 1.5, "south": 0.5},
        bytes_down=100,
        bytes_up=90,
    )


def arm(curve: list[float], rate: float = 0.1, *, test: bool = True) -> FederatedArm:
    """A federated arm that starts at 10 % and keeps its best round; without rounds, its start."""
    start = RoundRecord(0, 0.0, 10, 0, 0.1 if test else None, 0.1)
    best_round = curve.index(max(curve)) + 1 if curve else 0
    return federated_arm(
        records(curve, test=test),
        best_round=best_round,
        learning_rate=rate,
        start=start,
        curve_of="test" if test else "validation",
    )


def summary_of(arms: Arms, **changes: object) -> Summary:
    """The summary of a run with these arms, its target filled in."""
    fields: dict[str, object] = {
        "run": "demo",
        "transport": "grpc+mtls",
        "silos": 4,
        "seed": 7,
        "seconds": {"synthesis": 60.5, "pretraining": 70.0},
        "arms": arms,
        "curve_of": "test",
        "tuning": {"gptfl": {0.05: 0.91, 0.1: 0.88}},
        "model_bytes": 421642,
        "parameters": 105380,
        "synthetic_images": 6000,
        "started": datetime(2025, 11, 3, 10, 2, tzinfo=UTC),
        "finished": datetime(2025, 11, 3, 10, 8, tzinfo=UTC),
        "weights": {"gptfl": WeightDigests(final="ab" * 32, best="cd" * 32)},
    }
    return with_target(Summary.model_validate(fields | changes))


def three_arms() -> Summary:
    """FedAvg reaches its best, 90 %, in round 3 of 4; GPT-FL passes that in round 2."""
    return summary_of(
        Arms(
            synthetic_only=SyntheticArm(accuracy=0.85),
            fedavg_random=arm([0.3, 0.6, 0.9, 0.8]),
            gptfl=arm([0.88, 0.92, 0.95, 0.96], 0.05),
        )
    )
