"""The coordinator's whole job in order: generate, pre-train, federate, report. Whatever the wire.

A run folder belongs to one federation file. Calling again on the same folder goes on where it stopped, and where the
run is finished it returns what it found.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blake3 import blake3

from gptfl_dist import __version__
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import (
    GptflError,
    Interrupted,
    RunAborted,
    StorageError,
    first_line,
)
from gptfl_dist.exchange.base import CoordinatorExchange, Goodbye
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.launch.trainer import TrainerProcess, python_module
from gptfl_dist.ledger.records import RoundRecord
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe import progress
from gptfl_dist.observe.live import LiveFile, Standing
from gptfl_dist.observe.summary import FILE_NAME, Summary, read_summary
from gptfl_dist.observe.summary import RoundRecord as ShownRound
from gptfl_dist.run import auditor as auditing
from gptfl_dist.run.arm import rounds_planned, stopped_name
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.run.candidates import PRETRAINED_WEIGHTS
from gptfl_dist.run.evaluation import Evaluator, ProcessEvaluator
from gptfl_dist.run.federate import Federator
from gptfl_dist.run.folder import ENDED
from gptfl_dist.run.inputs import require_inputs
from gptfl_dist.run.requests import aborted, unless_aborted
from gptfl_dist.run.result import federated_arms, settings_text, write_results
from gptfl_dist.run.settings import request_of
from gptfl_dist.run.stages import Stage, run_stage, stages_of

_log = logging.getLogger(__name__)


class Terminal:
    """Shows an operator the rounds as they end, and keeps what `gptfl status` shows of them."""

    def __init__(self, file: FederationFile, ledger: Ledger, live: LiveFile, say: Callable[[str], None]) -> None:
        """`ledger` tells which rounds an interrupted run has behind it."""
        behind = 0
        for arm in ledger.arms():
            record = ledger.begun_arm(arm)
            stopped = ledger.fact(stopped_name(arm)) is not None
            behind += file.federation.rounds if stopped else record.finished_rounds
        rules = file.federation
        self._buffer = rules.wanted_of(len(file.silos)) if rules.mode == "asynchronous" else None
        stale = self._buffer is not None or rules.late == "carry"
        self.table = progress.RoundTable(rounds_planned(file) - behind, stale=stale)
        self._live = live
        self._say = say

    def round_closed(self, arm: str, rounds: int, record: RoundRecord, test_accuracy: float | None) -> None:
        shown = ShownRound(
            round=record.round,
            seconds=record.seconds or 0.0,
            bytes_down=record.bytes_down or 0,
            bytes_up=record.bytes_up or 0,
            accuracy=test_accuracy,
            validation_accuracy=record.mean_metric("accuracy"),
            staleness={update.silo: update.staleness for update in record.updates},
        )
        wanted = len(record.cohort) if self._buffer is None else self._buffer
        self.table.add(arm, rounds, shown, wanted=wanted)
        updates = ", ".join(f"{silo} ({age} rounds old)" if age else silo for silo, age in shown.staleness.items())
        _log.info("%s: round %d of %d closed with the updates of %s", arm, record.round, rounds, updates)

    def arm_stopped(self, arm: str, rounds_left: int) -> None:
        self.table.skip(rounds_left)

    def stands(self, standing: Standing) -> None:
        self._live.stands(standing)

    def heard(self, silo: str) -> None:
        self._live.heard(silo)

    def silo_progress(self, silo: str, done: int, total: int, note: str) -> None:
        self.table.working(silo, done, total)
        self._live.progress(silo, done, total, note)

    def silo_done(self, silo: str) -> None:
        self.table.silo_done(silo)
        self._live.done(silo)

    def waiting_for(self, silos: tuple[str, ...]) -> None:
        self.table.waiting_for(silos)

    def note(self, text: str) -> None:
        _log.info(text)
        self._say(text)


def _in_a_process(path: Path, file: FederationFile) -> Evaluator:
    # In the federation file's folder, so that model.source can name a module that lies beside the file.
    command, log = python_module("gptfl_dist.run.evaluator"), file.run_folder / "logs" / "evaluator.log"
    folder = path.absolute().parent
    return ProcessEvaluator(TrainerProcess(command, log, cwd=folder, role="evaluator"), file, folder)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What differs from wire to wire, and whom the coordinator tells what it does.

    `serving` is entered once nothing speaks against the run, and left with its end: what answers from its first second
    on. `opened` is called once the exchange takes silos, with a function that ends the federation with an error; `say`
    shows a line to the operator. `make_evaluator` and `run_stage` are given the federation file's path. `spare_core` is
    whether this process has more than one core for itself while updates arrive.
    """

    make_exchange: Callable[[FederationFile, Inbox], CoordinatorExchange]
    opened: Callable[[CoordinatorExchange, Callable[[BaseException], None]], Awaitable[None]]
    say: Callable[[str], None]
    serving: Callable[[], contextlib.AbstractAsyncContextManager[object]] = contextlib.nullcontext
    make_evaluator: Callable[[Path, FederationFile], Evaluator] = _in_a_process
    run_stage: Callable[[Stage, Path], Awaitable[dict[str, Any]]] = run_stage
    spare_core: bool = True


async def coordinate(path: Path, around: Surroundings) -> Summary:
    """Runs the federation file at `path` to its end.

    Raises what stops a run; the same call then goes on from there. Of the processes of a run this one alone imports the
    code that strategy.rule names.
    """
    file = load_federation(path)
    require_inputs(path, file)
    use_at_rest(file.at_rest, file.run_folder)
    ledger = Ledger(file.run_folder, request_of(path, file), durable=file.durability == "power")
    try:
        auditor = auditing.Auditor(ledger)
        if ledger.fact("finished") is not None and (file.run_folder / FILE_NAME).exists():
            around.say(f"{file.run_folder}: this run is finished; --fresh makes it anew")
            return read_summary(file.run_folder)
        if (error := aborted(ledger)) is not None:
            raise error
        with (
            auditor.to_the_end(),
            _end_noted(ledger, _digest(file)),
            contextlib.closing(LiveFile(file.run_folder, ledger.holder)) as live,
        ):
            async with around.serving():
                return await auditor.beside(_run(path, file, ledger, live, around))
    finally:
        ledger.close()


@contextlib.contextmanager
def _end_noted(ledger: Ledger, configuration: str) -> Iterator[None]:
    """Notes that the coordinator's work begins, and how it ends: nothing is noted by one that is killed."""
    in_force = {"configuration": configuration, "release": __version__}
    ledger.note(auditing.STARTED if ledger.fact("started") is None else auditing.RESUMED, in_force)
    if ledger.fact("started") is None:
        ledger.set_fact("started", datetime.now(UTC).isoformat())
    ledger.set_fact(ENDED, "")
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        kind, told, hint = "", "", ""
        if isinstance(error, GptflError):
            kind, told, hint = type(error).__name__, error.message, error.hint
        elif isinstance(error, asyncio.CancelledError):
            kind, told = Interrupted.__name__, "stopped by Ctrl-C or SIGTERM"
        elif error is not None:
            kind, told = type(error).__name__, first_line(error)
        with contextlib.suppress(StorageError):
            end = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "error": kind, "message": told, "hint": hint}
            ledger.set_fact(ENDED, json.dumps(end))
            ledger.note(auditing.ENDED, {**in_force, "error": kind, "message": told})


def _digest(file: FederationFile) -> str:
    """BLAKE3 of all settings in force, defaults included."""
    return blake3(json.dumps(file.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


async def _before_the_federation(
    path: Path, file: FederationFile, ledger: Ledger, live: LiveFile, around: Surroundings
) -> None:
    """Synthetic data and pre-training, where an arm of the file needs them."""
    for stage in stages_of(file):
        started = time.monotonic()
        live.stage(stage)
        try:
            told = await around.run_stage(stage, path)
        finally:
            ledger.add_seconds(stage, time.monotonic() - started)
        if told.get("choice"):
            around.say(told["choice"])


async def _run(path: Path, file: FederationFile, ledger: Ledger, live: LiveFile, around: Surroundings) -> Summary:
    await unless_aborted(ledger, _before_the_federation(path, file, ledger, live, around))
    evaluator = around.make_evaluator(path, file)
    live.stage("federate")
    try:
        model = await evaluator.start()
        for note in evaluator.notes:
            around.say(note)
        tested = None
        if federated_arms(file):
            watcher = Terminal(file, ledger, live, around.say)
            federator = Federator(
                file=file,
                model=model,
                ledger=ledger,
                evaluator=evaluator,
                make_exchange=lambda inbox: around.make_exchange(file, inbox),
                watcher=watcher,
                ahead=around.spare_core,
            )
            goodbye = Goodbye(False, "the coordinator stopped before the end; it may come back")
            try:
                await federator.start()
                live.serves(True)
                with watcher.table:
                    await around.opened(federator.exchange, federator.fail)
                    await run_arms(federator)
                goodbye = Goodbye(True, "the federation is finished")
            except RunAborted as error:
                goodbye = Goodbye(True, error.message)
                raise
            finally:
                live.serves(False)
                await federator.stop(goodbye)
            live.stage("report")
            tested = await evaluator.test(file.run_folder / "models" / f"{federated_arms(file)[-1]}.safetensors")
        synthetic = None
        if "synthetic_only" in file.arms:
            # After the arms, for the silos may have had to choose whose model this is.
            synthetic = await evaluator.test(file.run_folder / PRETRAINED_WEIGHTS)
    finally:
        await evaluator.stop()
    shown = tested or synthetic
    summary = write_results(
        file,
        ledger,
        model.layout,
        None if synthetic is None else synthetic.measures,
        None if shown is None else shown.confusion,
        settings_text(path),
    )
    ledger.set_fact("finished", summary.finished.isoformat())
    return summary
