"""From the ledger to `summary.json` and `report.html`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

from gptfl_dist.config.federation import Arm, FederationFile
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.report import ReportDetails, write_report
from gptfl_dist.observe.summary import (
    Arms,
    Choice,
    FederatedArm,
    RoundRecord,
    StopCriterion,
    Summary,
    SyntheticArm,
    WeightDigests,
    federated_arm,
    with_target,
    write_summary,
)
from gptfl_dist.run.arm import stopped_name, trial_name, validation_of
from gptfl_dist.run.candidates import CHOICE, CONTACT_SHEET, DROPPED_SHEET, PRETRAINED_FACTS
from gptfl_dist.weights import Layout

SPLIT = "split.json"
"""In the run folder, where one process knew all data: samples of each label at each silo, for the report."""


def federated_arms(file: FederationFile) -> list[Literal["fedavg_random", "gptfl"]]:
    """The arms of a file in which silos train."""
    names: tuple[Literal["fedavg_random", "gptfl"], ...] = ("fedavg_random", "gptfl")
    return [name for name in names if name in file.arms]


def write_results(
    file: FederationFile,
    ledger: Ledger,
    layout: Layout,
    synthetic_accuracy: float | None,
    confusion: list[list[int]] | None,
    settings_text: str,
) -> Summary:
    """Writes both files into the run folder and returns the summary.

    `confusion` is that of the kept model on the test data, `settings_text` the federation file as it was written.
    """
    curve_of: Literal["test", "validation"] = "validation" if file.test_data is None else "test"
    arms: dict[str, SyntheticArm] = {}
    if "synthetic_only" in file.arms:
        gptfl = ledger.arm("gptfl")
        validation = None if gptfl is None else _validation(gptfl, 0)
        arms["synthetic_only"] = SyntheticArm(accuracy=synthetic_accuracy, validation_accuracy=validation)
    federated: dict[str, FederatedArm] = {}
    rounds: dict[str, list[RoundRecord]] = {}
    weights: dict[Arm, WeightDigests] = {}
    for name in federated_arms(file):
        record = _finished(ledger, name)
        start, rounds[name] = _rounds(ledger, record)
        assert record.best_round is not None
        federated[name] = federated_arm(
            rounds[name],
            best_round=record.best_round,
            learning_rate=record.learning_rate,
            start=start,
            curve_of=curve_of,
            stopped_by=cast("StopCriterion | None", ledger.fact(stopped_name(name))),  # checked by FederatedArm
        )
        weights[name] = WeightDigests(final=record.final, best=record.weights_of(record.best_round))
    started = ledger.fact("started")
    assert started is not None
    transport = ledger.fact("transport")
    choice, pretrained = file.run_folder / CHOICE, file.run_folder / PRETRAINED_FACTS
    facts = json.loads(pretrained.read_text()) if pretrained.exists() else {}
    summary = Summary(
        run=file.name,
        transport=transport or "none",
        silos=len(file.silos),
        seed=file.seed,
        seconds=ledger.seconds(),
        arms=Arms.model_validate({**arms, **federated}),
        curve_of=curve_of,
        tuning=_tuning(file, ledger),
        model_bytes=layout.nbytes,
        parameters=layout.parameters,
        synthetic_images=facts.get("images", 0),
        choice=Choice.model_validate_json(choice.read_bytes()) if choice.exists() else None,
        chosen_by=file.federation.choose_by,
        started=datetime.fromisoformat(started),
        finished=datetime.now(UTC),
        weights=weights,
    )
    summary = with_target(summary)
    contact_sheet, split = file.run_folder / CONTACT_SHEET, file.run_folder / SPLIT
    dropped_sheet = file.run_folder / DROPPED_SHEET
    details = ReportDetails(
        labels=file.labels,
        settings_text=settings_text,
        contact_sheet=contact_sheet if contact_sheet.exists() else None,
        filter=facts.get("filter"),
        dropped_sheet=dropped_sheet if dropped_sheet.exists() else None,
        confusion=confusion,
        rounds=rounds,
        split=json.loads(split.read_text()) if split.exists() else None,
    )
    write_report(file.run_folder, summary, details)
    # Last, because a summary means that the run is finished.
    write_summary(file.run_folder, summary)
    return summary


def _finished(ledger: Ledger, name: str) -> ArmRecord:
    record = ledger.arm(name)
    assert record is not None
    assert record.finished
    return record


def _validation(record: ArmRecord, round_: int) -> float | None:
    score = validation_of(record, round_)
    return None if score is None else score[0]


def _rounds(ledger: Ledger, record: ArmRecord) -> tuple[RoundRecord, list[RoundRecord]]:
    """The start as round 0, which takes the bytes of the final evaluation, then the rounds."""
    accuracy = ledger.fact(f"start_accuracy/{record.arm}")
    evaluation = [r for r in record.rounds if r.kind == "evaluate"]
    start = RoundRecord(
        round=0,
        seconds=0.0,
        bytes_down=sum(r.bytes_down or 0 for r in evaluation),
        bytes_up=sum(r.bytes_up or 0 for r in evaluation),
        accuracy=None if accuracy is None else float(accuracy),
        validation_accuracy=_validation(record, 0),
    )
    rounds = [
        RoundRecord(
            round=r.round,
            seconds=r.seconds or 0.0,
            bytes_down=r.bytes_down or 0,
            bytes_up=r.bytes_up or 0,
            accuracy=r.test_accuracy,
            validation_accuracy=_validation(record, r.round),
            staleness={update.silo: update.staleness for update in r.updates},
        )
        for r in record.rounds
        if r.kind == "train"
    ]
    return start, rounds


def _tuning(file: FederationFile, ledger: Ledger) -> dict[Arm, dict[float, float | None]]:
    """The accuracy on validation data of each rate that was tried."""
    found: dict[Arm, dict[float, float | None]] = {}
    for name in federated_arms(file):
        trials = {rate: ledger.arm(trial_name(name, rate)) for rate in file.training.learning_rates}
        tried = {
            rate: record.rounds[-1].mean_metric("accuracy") if record.completed else None
            for rate, record in trials.items()
            if record is not None
        }
        if tried:
            found[name] = tried
    return found


def settings_text(path: Path) -> str:
    """The federation file as its author wrote it, comments and all."""
    return path.read_text(encoding="utf-8")
