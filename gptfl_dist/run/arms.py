"""The federated arms of a file, one after the other: with which generator and rate each is run, and what it leaves.

A generator and a rate are chosen by what the silos report of their validation data, in arms of their own that hold no
round or few. Each step is an arm in the ledger, so a run that was stopped goes on in the step that it was in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gptfl_dist.errors import FederationError
from gptfl_dist.files import replacing
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.wording import choice_text
from gptfl_dist.run.arm import ArmPlan, choice_name, trial_name, validation_of
from gptfl_dist.run.candidates import PRETRAINED_WEIGHTS, adopt, asks_silos, candidate_files
from gptfl_dist.run.evaluation import RANDOM_WEIGHTS
from gptfl_dist.run.federate import Federator, RoundFailed
from gptfl_dist.weights import BLOCK, WeightsFile

_STARTS = {"fedavg_random": RANDOM_WEIGHTS, "gptfl": PRETRAINED_WEIGHTS}


async def run_arms(federator: Federator) -> None:
    """Runs all federated arms of the file and publishes their models. Raises FederationError where one cannot go on."""
    file, ledger = federator.file, federator.ledger
    for arm, file_name in _STARTS.items():
        if arm not in file.arms:
            continue
        if arm == "gptfl" and asks_silos(file):
            with _timed(ledger, "choice of the generator"):
                await _choose_candidate(federator)
        start = await _start_from(federator, ledger.folder / file_name)
        with _timed(ledger, f"tuning {arm}"):
            rate = await _choose_rate(federator, arm, start)
        with _timed(ledger, arm):
            await federator.run_arm(ArmPlan(arm, start, rate, file.federation.rounds, tested=True))
            record = ledger.begun_arm(arm)
            assert record.best_round is not None
            for name, digest in ((arm, record.weights_of(record.best_round)), (f"{arm}-final", record.final)):
                target = ledger.folder / "models" / f"{name}.safetensors"
                await asyncio.to_thread(ledger.require_weights, digest)
                await asyncio.to_thread(_publish, ledger.weights_path(digest), target)


@contextlib.contextmanager
def _timed(ledger: Ledger, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        ledger.add_seconds(stage, time.monotonic() - started)


async def _start_from(federator: Federator, file: Path) -> str:
    """Puts weights that an arm begins with into the ledger; returns their digest."""
    with WeightsFile(file) as weights:
        return await asyncio.to_thread(federator.ledger.add_weights, federator.layout, _blocks(weights))


async def _choose_candidate(federator: Federator) -> None:
    """Adopts the candidate whose model does best on the silos' validation data, before any federated training."""
    file = federator.file
    accuracy: dict[str, float] = {}
    for name, candidate in candidate_files(file).items():
        start = await _start_from(federator, candidate.run_folder / PRETRAINED_WEIGHTS)
        rate = file.training.learning_rates[0]  # nobody trains with it: there is no round but the evaluation
        await federator.run_arm(ArmPlan(choice_name(name), start, rate, rounds=0, tested=False))
        score = validation_of(federator.ledger.begun_arm(choice_name(name)), 0)
        if score is None:
            raise FederationError(
                "no candidate can be chosen: no silo reported an accuracy on its validation data",
                hint="set synthesis.choose_by to synthetic, or let policy.metrics of the silos release accuracy",
            )
        accuracy[name] = score[0]
    federator.watcher.note(choice_text(await asyncio.to_thread(adopt, file, accuracy)))


async def _choose_rate(federator: Federator, arm: str, start: str) -> float:
    """The rate of the grid whose short trial ends best on the silos' validation data."""
    file, note = federator.file, federator.watcher.note
    rates = file.training.learning_rates
    if len(rates) == 1:
        return rates[0]
    scores: dict[float, tuple[float, float]] = {}
    out: list[str] = []
    for rate in rates:
        plan = ArmPlan(trial_name(arm, rate), start, rate, file.tuning.rounds, tested=False)
        with contextlib.suppress(RoundFailed):
            await federator.run_arm(plan)
        record = federator.ledger.begun_arm(plan.name)
        last = record.rounds[-1]
        accuracy, loss = last.mean_metric("accuracy"), last.mean_metric("loss")
        # A rate that is a little too high lets the loss diverge in the last step, and shows in the evaluation.
        if not record.completed or (accuracy is None and any(order.failure for order in last.orders)):
            note(f"{arm}: learning rate {rate:g} is out: its trial failed")
            out.append(plan.name)
            continue
        if accuracy is None:
            raise FederationError(
                "the learning rate cannot be tuned: no silo reported an accuracy on its validation data",
                hint="give training.learning_rate one value, or let policy.metrics of the silos release accuracy",
            )
        scores[rate] = (accuracy, -(loss or 0.0))
    if not scores:
        raise FederationError(
            f"{arm}: no learning rate of the grid could be trained with",
            hint="the silos' failures stand above: where the loss diverged, give training.learning_rate smaller "
            "values; where an update was refused, mend what the reason names",
        )
    for name in out:  # for good only now: where no rate would do, the silos may be at fault
        federator.ledger.finish_arm(name, 0)
    best = max(scores, key=lambda rate: scores[rate])
    told = ", ".join(f"{rate:g}: {100 * accuracy:.1f} %" for rate, (accuracy, _) in scores.items())
    note(f"{arm}: learning rate {best:g} chosen on validation data ({told})")
    return best


def _blocks(weights: WeightsFile) -> Iterator[bytes]:
    for offset in range(0, weights.nbytes, BLOCK):
        yield weights.read(offset, min(BLOCK, weights.nbytes - offset))


def _publish(source: Path, target: Path) -> None:
    """Copies a model to where people look for it, whole or not at all."""
    with replacing(target) as fd, source.open("rb") as model, os.fdopen(os.dup(fd), "wb") as copy:
        shutil.copyfileobj(model, copy, BLOCK)
