"""From the ledger to `summary.json` and `report.html`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from gptfl_dist.config.federation import Arm, FederationFile
from gptfl_dist.learning.measures import Measures
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.ledger.records import RoundRecord as LedgerRound
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.report import ReportDetails, write_report
from gptfl_dist.observe.summary import (
    Arms,
    Choice,
    FederatedArm,
    RoundMeasures,
    RoundRecord,
    ServerStage,
    StageCost,
    StopCriterion,
    Summary,
    SyntheticArm,
    WeightDigests,
    federated_arm,
    with_target,
    write_summary,
)
from gptfl_dist.run.arm import stopped_name, trial_name, validation_of
from gptfl_dist.run.candidates import (
    CHOICE,
    CONTACT_SHEET,
    DROPPED_SHEET,
    PRETRAINED_FACTS,
    PRETRAINING_COST,
    candidate_files,
)
from gptfl_dist.run.cost import COST, Cost, read_cost, together
from gptfl_dist.run.stages import stages_of
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
    synthetic: Measures | None,
    confusion: list[list[int]] | None,
    settings_text: str,
) -> Summary:
    """Writes both files into the run folder and returns the summary.

    `synthetic` says how good the pre-trained weights are on the test data, `confusion` is that of the kept model on
    them, `settings_text` the federation file as it was written.
    """
    curve_of: Literal["test", "validation"] = "validation" if file.test_data is None else "test"
    arms: dict[str, SyntheticArm] = {}
    if "synthetic_only" in file.arms:
        gptfl = ledger.arm("gptfl")
        validation = None if gptfl is None else _validation(gptfl, 0)
        accuracy = None if synthetic is None else synthetic.accuracy
        arms["synthetic_only"] = SyntheticArm(accuracy=accuracy, validation_accuracy=validation)
    federated: dict[str, FederatedArm] = {}
    rounds: dict[str, list[RoundRecord]] = {}
    weights: dict[Arm, WeightDigests] = {}
    for name in federated_arms(file):
        record = _finished(ledger, name)
        start, rounds[name] = _rounds(record)
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
        server=_server(file),
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


def _server(file: FederationFile) -> dict[ServerStage, StageCost]:
    """What the stages before the federation took, of those that the file needs, of all candidates together, where that
    was noted."""
    files = list(candidate_files(file).values()) or [file]
    noted: dict[ServerStage, list[Cost | None]] = {
        "generate": [read_cost(one.synthesis.folder / COST) for one in files],
        "pretrain": [read_cost(one.run_folder / PRETRAINING_COST) for one in files],
    }
    found: dict[ServerStage, StageCost] = {}
    for stage in stages_of(file):
        known = [cost for cost in noted[stage] if cost is not None]
        if len(known) == len(files):
            whole = together(known)
            found[stage] = StageCost(device_seconds=whole.seconds, hardware=whole.hardware)
    return found


def _finished(ledger: Ledger, name: str) -> ArmRecord:
    record = ledger.begun_arm(name)
    assert record.finished
    return record


def _validation(record: ArmRecord, round_: int) -> float | None:
    score = validation_of(record, round_)
    return None if score is None else score[0]


def _rounds(record: ArmRecord) -> tuple[RoundRecord, list[RoundRecord]]:
    """The start as round 0, which takes the bytes of the final evaluation, then the rounds."""
    evaluation = [r for r in record.rounds if r.kind == "evaluate"]
    start = RoundRecord(
        round=0,
        seconds=0.0,
        bytes_down=sum(r.bytes_down or 0 for r in evaluation),
        bytes_up=sum(r.bytes_up or 0 for r in evaluation),
        accuracy=None if record.start_tested is None else record.start_tested.accuracy,
        validation_accuracy=_validation(record, 0),
        measures=_measures(record, 0, record.start_tested),
    )
    rounds = [
        RoundRecord(
            round=r.round,
            seconds=r.seconds or 0.0,
            bytes_down=r.bytes_down or 0,
            bytes_up=r.bytes_up or 0,
            accuracy=None if r.tested is None else r.tested.accuracy,
            validation_accuracy=_validation(record, r.round),
            staleness={update.silo: update.staleness for update in r.updates},
            measures=_measures(record, r.round, r.tested, r),
        )
        for r in record.rounds
        if r.kind == "train"
    ]
    return start, rounds


def _measures(
    record: ArmRecord, round_: int, tested: Measures | None, closed: LedgerRound | None = None
) -> RoundMeasures:
    """Of a round, which `closed` tells of unless it is the start."""
    following = next((r for r in record.rounds if r.round == round_ + 1), None)
    found: dict[str, Any] = {"silo_accuracy": {} if following is None else following.metric("accuracy")}
    if tested is not None:
        found |= {name: value for name, value in asdict(tested).items() if name != "accuracy"}
    if closed is not None:
        found["silo_seconds"] = {silo: told for silo, told in closed.metric("seconds").items() if told >= 0}
        found |= {"bytes_down": closed.bytes_down or 0, "bytes_up": closed.bytes_up or 0}
    if closed is not None and closed.diversity is not None:
        found |= asdict(closed.diversity) | {"log_n_diversity": closed.diversity.log_n_diversity}
        del found["updates"]
    return RoundMeasures.model_validate({name: _known(value) for name, value in found.items()})


def _known(value: Any) -> Any:
    """None in place of a number that is none, as the loss of weights that answer with NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
