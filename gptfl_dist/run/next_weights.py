"""From the updates of a round to the next weights, in a thread.

Where it is known which updates will count, the work begins when the last of them is announced, and follows it as it
arrives: little is left to do once it is there. What was made so counts only if in the end just these updates are to be
counted, each as it was read; otherwise it is made anew. Either way the same blocks are added in the same order. A rule
that reads updates more than once waits until all are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gptfl_dist.aggregation.diversity import Diversity
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.errors import GptflError
from gptfl_dist.exchange.inbox import Followed, Inbox, Overtaken
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.aggregate import Aggregation
from gptfl_dist.run.arm import ArmRun
from gptfl_dist.run.threads import ended, to_its_end
from gptfl_dist.weights import FlatReader, Layout


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Weights that are made while updates arrive; `digest` is theirs, or None where that came to nothing."""

    samples: dict[str, int]
    followed: dict[str, Followed]
    digest: asyncio.Task[str | None]

    @property
    def useful(self) -> bool:
        """Whether the updates are still those that were read."""
        nothing = self.digest.done() and self.digest.result() is None
        return not nothing and all(update.intact for update in self.followed.values())


class NextWeights:
    """Makes the weights of one run, round by round: `open`, `begin` as updates are announced, `make`.

    All calls come from the event loop.
    """

    def __init__(
        self, file: FederationFile, layout: Layout, parameters: Collection[str], ledger: Ledger, inbox: Inbox,
        *, ahead: bool,
    ) -> None:  # fmt: skip
        """`parameters` are the names of the tensors that are no buffers, over which the diversity is measured.

        `ahead`: the work may begin before all updates are there. It takes a core from what is receiving, so it is of no
        use where there is none to spare. Raises ModelError where the strategy's rule is code that cannot be imported.
        """
        self._file, self._ledger, self._inbox = file, ledger, inbox
        self._parameters = parameters
        self._aggregation = Aggregation(file, layout, ledger)
        self._arm: ArmRun | None = None
        known = file.federation.mode == "synchronous" and file.federation.late == "drop"  # which updates will count
        self._may_begin = ahead and known and self._aggregation.reads_once
        self._ahead: _Ahead | None = None

    def open(self, arm: ArmRun) -> None:
        """The round of an arm is open, and its weights are at hand."""
        self._arm = arm
        self.begin()

    def begin(self) -> None:
        """Begins if every update that the open round will count has been announced."""
        arm = self._arm
        if arm is None or not self._may_begin:
            return
        if self._ahead is not None and (self._ahead.useful or not self._ahead.digest.done()):
            return
        arriving = self._inbox.arriving(arm.orders)
        if not arriving:
            return
        samples = {silo: count for silo, (_, count) in arriving.items()}
        followed = {silo: update for silo, (update, _) in arriving.items()}

        def make() -> str | None:
            try:
                updates = {silo: update.decoded() for silo, update in followed.items()}
                return self._aggregation.of(arm, updates, samples, dict.fromkeys(samples, arm.round))
            except (Overtaken, GptflError):  # an error that stays is met again by `make`
                return None

        self._ahead = _Ahead(samples, followed, asyncio.create_task(asyncio.to_thread(make)))

    async def make(self, counted: Mapping[str, int], reduced: FlatReader | None) -> str:
        """The next weights, from the updates whose orders' rounds these are. Returns their digest.

        `reduced` is the sum of these updates, each times its samples, where they are not here.
        """
        arm = self._arm
        assert arm is not None
        samples = self._samples(arm, counted)
        digest = None
        if self._ahead is not None and self._ahead.samples == samples and self._ahead.useful:
            digest = await asyncio.shield(self._ahead.digest)
        await self.stop()
        if digest is None:
            if reduced is not None:
                digest = await to_its_end(self._aggregation.of_sum, arm, reduced, samples)
            else:
                updates = self._inbox.updates(tuple(counted))
                digest = await to_its_end(self._aggregation.of, arm, updates, samples, counted)
        self._ledger.keep_state(digest)
        return digest

    async def diversity(self, silos: Iterable[str]) -> Diversity | None:
        """Of the updates of these silos, over the model's parameters; None where it is not measured.

        After `make`, which does not wait for it, and which may have read the updates as they came.
        """
        if not self._file.federation.diversity:
            return None
        return await to_its_end(self._aggregation.diversity, self._inbox.updates(tuple(silos)), self._parameters)

    async def stop(self) -> None:
        """The round is not open any more. Returns when nothing of it is read."""
        self._arm = None
        if self._ahead is not None:
            for update in self._ahead.followed.values():
                update.stop()
            await ended(self._ahead.digest)
            self._ahead = None

    def _samples(self, arm: ArmRun, counted: Mapping[str, int]) -> dict[str, int]:
        record = self._ledger.begun_arm(arm.plan.name)
        rounds = {r.round: r for r in record.rounds}
        return {
            order.silo: order.samples
            for given in set(counted.values())
            for order in rounds[given].orders
            if counted.get(order.silo) == given and order.samples is not None
        }
