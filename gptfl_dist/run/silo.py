"""A silo: connects, waits for orders, has them carried out by its runner, returns the results. Whatever the wire.

The loop survives a broken connection: it connects again with growing pauses, is given the order it was working on
once more, and answers with the result it already has. A finished update is kept on disk until it was received.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from dataclasses import replace
from pathlib import Path

from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import (
    ConnectionFailed,
    GptflError,
    ModelError,
    PolicyError,
    ProtocolError,
    StorageError,
    TrainerError,
)
from gptfl_dist.exchange.base import Disconnected, Goodbye, Recalled, SiloExchange, UpdateHeader, Welcome
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.federation.silo import PolicyGuard
from gptfl_dist.files import storage_error
from gptfl_dist.launch.base import Progress
from gptfl_dist.run.freshness import Freshness
from gptfl_dist.run.runner import OrderFiles, OrderRunner, Result
from gptfl_dist.run.threads import ended, to_its_end
from gptfl_dist.weights import Codec, Layout, WeightsFile, overwrite_weights
from gptfl_dist.weights.feedback import Residuals
from gptfl_dist.weights.file import blocks
from gptfl_dist.weights.kept import NOTHING_KEPT, KeptFiles, KeptFolder
from gptfl_dist.weights.samples import samples_layout

_log = logging.getLogger(__name__)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
_Mark = tuple[int, int, int]
_PROGRESS_EVERY = 1.0  # seconds between two reports of a training's progress


def _told(error: GptflError) -> str:
    """What the coordinator learns of an error here: nothing of files, of labels, or of a trainer's output."""
    if isinstance(error, PolicyError | TrainerError):
        return f"{type(error).__name__}: {error.message.splitlines()[0]}"
    return f"{type(error).__name__}; the silo's log says more"


class Silo:
    """Runs a silo over one exchange until the coordinator says goodbye."""

    def __init__(
        self, *, silo: SiloFile, exchange: SiloExchange, runner: OrderRunner, folder: Path, fresh: Freshness | None
    ) -> None:
        """`folder` takes the received weights, the update, and what its encoding lost, and what is kept of it.

        `fresh` refuses orders that go back; None where silo and coordinator are one owner's, whose ledger is believed.
        """
        self._exchange = exchange
        self._runner = runner
        self._guard = PolicyGuard(silo.policy)
        self._fresh = fresh
        self._seconds = silo.policy.max_seconds_per_round
        self._weights = folder / "weights.safetensors"
        self._update = folder / "update.safetensors"
        self._received = folder / "received.safetensors"  # encoded, where weights are
        self._encoded = folder / "encoded.safetensors"  # the encoded update, where updates are
        self._samples = folder / "samples.safetensors"  # synthetic ones that were handed out, once for all rounds
        self._residuals = Residuals(folder / "residuals")
        self._kept = KeptFolder(folder / "kept")
        self._up = self._down = Codec("none")
        self._held = ""  # digest of what lies in `_weights`
        self._held_samples: tuple[str, _Mark | None] | None = None  # and in `_samples`, with the mark of that file
        self._layout: Layout | None = None
        self._welcome: Welcome | None = None
        self._work: asyncio.Task[bool] | None = None
        self._pause = FIRST_PAUSE  # grows until an answer gets through: to be connected alone is not enough
        self._said = ""  # why there is no connection, as the operator was told
        self._order: Order | None = None  # the order that is worked on, or was answered last
        self._result: Result | None = None  # its result, once there is one
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in folder.glob(".*.part"):
                part.unlink()  # of a trainer that was killed while it wrote
        except OSError as error:
            raise storage_error(error, folder) from None

    async def run(self) -> Goodbye:
        """Raises the error that ends the silo, such as an identity that is refused or data that do not fit."""
        try:
            while True:
                try:
                    welcome = await self._exchange.connect()
                    await self._prepare(welcome)
                    await self._exchange.ready()
                    if self._said:
                        _log.info("connected again")
                        self._said = ""
                    goodbye = await self._listen()
                    await self._runner.finish()
                    return goodbye
                except Disconnected as broken:
                    if str(broken) != self._said:
                        self._said = str(broken)
                        pauses = f"with pauses of up to {LONGEST_PAUSE:g} s"
                        _log.warning("not connected: %s; trying again until it succeeds, %s", broken, pauses)
                    # Jitter keeps the silos of a restarted coordinator from coming back all at once.
                    await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))
                    self._pause = min(2 * self._pause, LONGEST_PAUSE)
        finally:
            await self._drop_work()
            await self._runner.stop()
            await self._exchange.close()

    async def _prepare(self, welcome: Welcome) -> None:
        """Builds model and data for the plan, once; a coordinator that starts another run is another plan."""
        if self._welcome == welcome:
            return
        _log.info("connected to the run %s of the federation %s", welcome.run, welcome.plan.federation)
        await self._drop_work()
        self._order = self._result = self._held_samples = None
        self._guard.check_model(welcome.layout.nbytes)
        if welcome.plan.class_means:
            self._guard.check_class_means()
        if welcome.plan.samples is None:
            self._samples.unlink(missing_ok=True)
        else:
            self._guard.check_samples(samples_layout(welcome.plan.task.shape, welcome.plan.samples.count).nbytes)
        await self._runner.setup(welcome.run, welcome.plan, welcome.layout)
        self._layout = welcome.layout
        compression = welcome.plan.compression
        self._up = Codec(compression.up, compression.top_share)
        self._down = Codec(compression.down)
        self._welcome = welcome

    async def _listen(self) -> Goodbye:
        """Takes orders while earlier ones are worked on, so that a recall is heard at once."""
        if self._work is not None and self._work.done():
            # It ended while the connection was down; the coordinator asks again for what it did not get.
            work, self._work = self._work, None
            with contextlib.suppress(Disconnected):
                work.result()
        again = False  # whether the order in work was given once more
        listening = asyncio.create_task(self._exchange.receive())
        try:
            while True:
                waiting = {listening} if self._work is None else {listening, self._work}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                word = listening.result() if listening.done() else None
                # First, because work that broke off with the end of the federation is no reason to connect again.
                if isinstance(word, Goodbye):
                    if not word.finished:
                        raise Disconnected(word.reason)
                    return word
                if self._work is not None and self._work.done():
                    work, self._work = self._work, None
                    if not work.result() and again:
                        # It came too early: a coordinator that was started again did not expect it yet.
                        assert self._order is not None
                        self._work = asyncio.create_task(self._carry_out(self._order))
                    again = False
                if word is None:
                    continue
                if isinstance(word, Recalled):
                    if self._order is not None and self._order.nonce == word.nonce and self._work is not None:
                        _log.warning("round %d recalled: %s", self._order.round, word.reason)
                        await self._drop_work()
                elif self._order is None or self._order.nonce != word.nonce:
                    await self._drop_work()
                    self._order, self._result, again = word, None, False
                    self._work = asyncio.create_task(self._carry_out(word))
                elif self._work is None:
                    self._work = asyncio.create_task(self._carry_out(word))  # asked again after a reconnection
                else:
                    again = True
                listening = asyncio.create_task(self._exchange.receive())
        finally:
            listening.cancel()
            await ended(listening)

    async def _drop_work(self) -> None:
        """Gives up what is being worked on.

        A trainer that works is stopped, or its late answer would be taken for the next. One whose result is there is
        left alone: the next order may overtake the receipt of that result.
        """
        if self._work is None:
            return
        work, self._work = self._work, None
        if not work.done():
            work.cancel()
            if self._result is None:
                await self._runner.stop()
        await ended(work)

    async def _carry_out(self, order: Order) -> bool:
        """Answers an order with a result or with a failure; False where the result was refused.

        Raises only what ends the silo or its connection.
        """
        try:
            if self._result is None and self._fresh is not None:
                await to_its_end(self._fresh.check, self._welcome, order)
            self._guard.check(order)
            if self._result is None:
                await self._fetch(order)
                samples = await self._fetch_samples() if order.kind == "train" else None
                files = OrderFiles(self._weights, self._update, self._kept_of(order), samples)
                result = await asyncio.wait_for(self._runner.run(order, files, self._progress_of(order)), self._seconds)
                if order.kind == "train" and self._up.name != "none":
                    result = replace(result, digest=await to_its_end(self._encode, order))
                self._result = result
            return await self._answer(order, self._result)
        except TimeoutError:
            await self._runner.stop()
            reason = f"training took longer than policy.max_seconds_per_round ({self._seconds:g} s)"
            _log.error("round %d: %s", order.round, reason)
            await self._exchange.fail(order.nonce, reason)
        except (ConnectionFailed, ProtocolError):
            raise
        except GptflError as error:
            _log.error("round %d: %s", order.round, error)
            await self._exchange.fail(order.nonce, _told(error))
        return True

    async def _fetch(self, order: Order) -> None:
        if self._held != order.base:
            assert self._layout is not None
            self._held = ""
            if self._down.name == "none":
                await self._exchange.download(order.base, self._layout, self._weights)
            else:
                await self._exchange.download(order.base, self._down.layout(self._layout), self._received)
                await to_its_end(self._decode, self._layout)
            self._held = order.base

    async def _fetch_samples(self) -> Path | None:
        """Where the synthetic samples lie that the federation hands out, if it does: fetched once, and checked, and
        again where the file was touched since."""
        assert self._welcome is not None
        plan = self._welcome.plan
        if plan.samples is None:
            return None
        mark = _mark_of(self._samples)
        if mark is None or self._held_samples != (plan.samples.digest, mark):
            layout = samples_layout(plan.task.shape, plan.samples.count)
            if not await to_its_end(_holds, self._samples, layout, plan.samples.digest):
                await self._exchange.download(plan.samples.digest, layout, self._samples)
            self._held_samples = (plan.samples.digest, _mark_of(self._samples))
        return self._samples

    def _kept_of(self, order: Order) -> KeptFiles:
        """What the silo keeps from one of its updates to the next, as far as the strategy needs it."""
        assert self._welcome is not None
        if not self._welcome.plan.kept:
            return NOTHING_KEPT
        return self._kept.of(order.follows, order.nonce if order.kind == "train" else None)

    def _decode(self, layout: Layout) -> None:
        """Makes the weights that are trained from of those that were received."""
        with WeightsFile(self._received) as received:
            overwrite_weights(self._weights, layout, blocks(self._down.decoded(layout, received), layout.nbytes))

    def _encode(self, order: Order) -> str:
        """Encodes the update of an order; returns the digest of what is to be sent."""
        assert self._welcome is not None
        with WeightsFile(self._update) as update:
            if self._welcome.plan.compression.error_feedback:
                return self._residuals.encode(self._up, update, self._encoded, nonce=order.nonce, follows=order.follows)
            encoded = self._up.encode(update.layout, update)
            return overwrite_weights(self._encoded, self._up.layout(update.layout), encoded)

    async def _answer(self, order: Order, result: Result) -> bool:
        """Whether the answer was taken."""
        metrics = self._guard.release(result.metrics)
        unusable = [name for name, value in metrics.items() if not math.isfinite(value)]
        if unusable:
            raise TrainerError(f"the metrics {', '.join(unusable)} are not finite")
        report = Report(order.nonce, result.samples, metrics)
        if order.kind == "evaluate" or self._runner.keeps_updates:
            await self._exchange.report(report)
            self._pause = FIRST_PAUSE
            return True
        assert self._layout is not None
        with WeightsFile(self._update if self._up.name == "none" else self._encoded) as update:
            layout = self._up.layout(self._layout)
            header = UpdateHeader(report, order.base, layout.digest, result.digest, update.nbytes, order.epoch)
            receipt = await self._exchange.upload(header, update)
        self._pause = FIRST_PAUSE
        if receipt.committed:
            _log.info("round %d of %s: update delivered", order.round, order.arm)
        else:
            _log.error("round %d of %s: update refused: %s", order.round, order.arm, receipt.reason)
        return receipt.committed

    def _progress_of(self, order: Order) -> Progress:
        """Passes a training's progress on, at most once a second, and at once in words what it waits for.

        A report that cannot be sent is let go.
        """
        loop = asyncio.get_running_loop()
        sent = loop.time()
        reports: set[asyncio.Task[None]] = set()

        async def tell(done: int, total: int, note: str) -> None:
            with contextlib.suppress(Disconnected, ConnectionFailed):
                await self._exchange.progress(order.nonce, done, total, note)

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal sent
            if note or loop.time() - sent >= _PROGRESS_EVERY:
                sent = loop.time()
                task = asyncio.create_task(tell(done, total, note))
                reports.add(task)
                task.add_done_callback(reports.discard)

        return report


def _mark_of(path: Path) -> _Mark | None:
    """By which one sees that a file is as it was: its inode, size, and time of the last change; None without a file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _holds(path: Path, layout: Layout, digest: str) -> bool:
    """Whether a file is there whole, as from before a restart."""
    with contextlib.suppress(ModelError, StorageError), WeightsFile(path) as file:
        return file.layout == layout and file.digest() == digest
    return False
