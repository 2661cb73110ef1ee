"""What becomes of a round that is closed: its weights are tested and judged, perhaps the arm ends, old weights go.

Tests run beside the next round's training, and choose nothing. Where held-out synthetic data choose, the newest weights
are judged by them before the next round. Whatever is found stands in the ledger, so a coordinator that is started again
makes up for the tests that it owes and decides alike. Weights are dropped once nothing can ask for them any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.ledger.records import ArmRecord, RoundRecord
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.arm import ArmPlan, needed_weights, stop_of, stopped_name
from gptfl_dist.run.evaluation import Evaluator
from gptfl_dist.run.watcher import Watcher


class ClosedRounds:
    """Of one run, from one arm to the next. The weights that an arm starts from are those of round 0."""

    def __init__(
        self, file: FederationFile, ledger: Ledger, evaluator: Evaluator, watcher: Watcher,
        fail: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        """`fail` is called with the error that ended a test."""
        self._file = file
        self._ledger = ledger
        self._evaluator = evaluator
        self._watcher = watcher
        self._fail = fail
        self._tests: set[asyncio.Task[None]] = set()
        self._tested_now: set[str] = set()  # digests that a test still reads

    def catch_up_with_tests(self, plan: ArmPlan, record: ArmRecord) -> None:
        """Tests the start weights, and those that an interrupted run had not come to test."""
        if not plan.tested or self._file.test_data is None:
            return
        if record.start_tested is None:
            self.test(plan, 0, record.start, None)
        for closed in record.rounds:
            if closed.weights is not None and closed.tested is None:
                self.test(plan, closed.round, closed.weights, closed)

    def test(self, plan: ArmPlan, round_: int, digest: str, record: RoundRecord | None) -> None:
        """Tests weights beside the next round's training. Test data choose nothing: see `best_round`."""

        async def test() -> None:
            try:
                result = await self._evaluator.test(self._ledger.weights_path(digest)) if plan.tested else None
            finally:
                self._tested_now.discard(digest)
            if result is not None:
                self._ledger.note_tested(plan.name, round_, result.measures)
            if record is not None:
                accuracy = None if result is None else result.measures.accuracy
                self._watcher.round_closed(plan.name, plan.rounds, record, accuracy)

        def done(task: asyncio.Task[None]) -> None:
            self._tests.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)

        self._tested_now.add(digest)
        task = asyncio.create_task(test())
        self._tests.add(task)
        task.add_done_callback(done)

    async def tested(self) -> None:
        """Returns once every test that was begun is done."""
        if self._tests:
            await asyncio.gather(*self._tests)

    def stop(self) -> None:
        """Ends the tests that are not done."""
        for task in self._tests:
            task.cancel()

    async def judged(self, plan: ArmPlan) -> ArmRecord:
        """What the ledger says of an arm, once its newest weights are judged where held-out synthetic data choose.

        The next round waits for it, so that a coordinator that is started again decides alike.
        """
        record = self._ledger.begun_arm(plan.name)
        if not plan.tested or self._file.federation.choose_by != "synthetic":
            return record
        for round_ in range(len(record.judged), record.finished_rounds + 1):
            accuracy, loss = await self._evaluator.judge(self._ledger.weights_path(record.weights_of(round_)))
            self._ledger.note_judged(plan.name, accuracy, loss)
        return self._ledger.begun_arm(plan.name)

    def stops(self, plan: ArmPlan, record: ArmRecord) -> bool:
        """Whether an arm ends with the rounds that it has behind it. Tuning trials have all their rounds."""
        stop = stop_of(record, self._file.federation) if plan.tested else None
        if stop is None:
            return False
        if self._ledger.fact(stopped_name(plan.name)) is None:
            self._ledger.set_fact(stopped_name(plan.name), stop.by)
            self._watcher.note(
                f"{plan.name} ends after {record.finished_rounds} of {plan.rounds} rounds, as federation.{stop.by} "
                f"says: {stop.found}"
            )
            self._watcher.arm_stopped(plan.name, plan.rounds - record.finished_rounds)
        return True

    def drop_old_weights(self) -> None:
        """Keeps of every arm what may still be wanted, what is being tested, and all if so set."""
        keep, newest = set(self._tested_now), set()
        for name in self._ledger.arms():
            record = self._ledger.begun_arm(name)
            keep |= needed_weights(record)
            newest.add(record.final)
            if self._file.federation.keep == "all" and name in self._file.arms:
                keep |= {r.weights for r in record.rounds if r.weights is not None}
        self._ledger.drop_weights_except(keep)
        self._ledger.drop_states_except(newest)
