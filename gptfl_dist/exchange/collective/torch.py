"""The collective operations over torch.distributed: gloo for messages and on CPUs, NCCL between GPUs.

NCCL carries broadcasts and reductions where every rank has a GPU of its own on its node; messages between two ranks
always go over gloo. Threads wait for what is under way, asleep. (Of NCCL we have run one rank on one GPU, and nothing
between GPUs.)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group is open: functions in there keep what is the default one by then

from gptfl_dist.errors import LaunchError, first_line
from gptfl_dist.exchange.collective.base import DEPTH, Buffer, Message, decode, encode

_SIZE, _CONTENT, _DATA = 1, 2, 3  # message tags
_NEVER = timedelta(days=365)  # a silo may train for long; that a rank is gone is noticed otherwise


class TorchCollective:
    """See `Collective`. Joins the world that torchrun's environment variables describe."""

    transport: str = "torch"

    def __init__(self) -> None:
        dist.init_process_group("gloo", timeout=_NEVER)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device, self._group = self._fastest()
        self._threads = ThreadPoolExecutor(2 * DEPTH + 2, "collective")
        self._failed: asyncio.Future[BaseException] | None = None

    def _fastest(self) -> tuple[str, Any]:
        """The device on which broadcasts and reductions go, and the process group for them if it is not the default."""
        local = int(os.environ["LOCAL_RANK"])
        able = torch.tensor([int(dist.is_nccl_available() and local < torch.cuda.device_count())])
        dist.all_reduce(able, dist.ReduceOp.MIN)
        if not able:
            return "cpu", None
        torch.cuda.set_device(local)
        return f"cuda:{local}", dist.new_group(backend="nccl", timeout=_NEVER)

    async def say(self, rank: int, message: Message) -> None:
        content = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        first, second = dist.isend(size, rank, tag=_SIZE), dist.isend(content, rank, tag=_CONTENT)
        await self._finished(first)
        await self._finished(second)

    async def hear(self) -> tuple[int, Message]:
        size = torch.zeros(1, dtype=torch.int64)
        first = dist.irecv(size, tag=_SIZE)
        await self._finished(first)
        assert first is not None
        sender = first._source_rank()
        content = torch.empty(int(size), dtype=torch.uint8)
        await self._finished(dist.irecv(content, sender, tag=_CONTENT))
        return sender, decode(content.numpy().tobytes())

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self._finished(dist.isend(_bytes(part), rank, tag=_DATA))

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self._finished(dist.irecv(_bytes(part), rank, tag=_DATA))

    def broadcast(self, part: Buffer) -> Awaitable[None]:
        tensor, given = self._here(part)
        return self._done(dist.broadcast(tensor, 0, group=self._group, async_op=True), tensor, given)

    def reduce(self, part: Buffer, how: Literal["sum", "max"]) -> Awaitable[None]:
        operation = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        tensor, given = self._here(part)
        return self._done(dist.reduce(tensor, 0, operation, group=self._group, async_op=True), tensor, given)

    def _here(self, part: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        """The part as a tensor on `device`, and as it was given."""
        given = torch.from_numpy(part) if isinstance(part, np.ndarray) else part
        return given.to(self.device), given

    async def _done(self, work: Any, tensor: torch.Tensor, given: torch.Tensor) -> None:
        def wait() -> None:
            work.wait()
            if tensor is not given:
                given.copy_(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)

        await self._wait(wait)

    async def _finished(self, work: dist.Work | None) -> None:
        assert work is not None  # None is for processes outside the group
        await self._wait(work.wait)

    async def _wait(self, waiting: Callable[[], object]) -> None:
        operation = asyncio.get_running_loop().run_in_executor(self._threads, waiting)
        failure = self._failure()
        waited: set[asyncio.Future[Any]] = {operation, failure}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        try:
            await operation
        except RuntimeError as error:
            raise LaunchError(f"the connection to another rank broke: {first_line(error)}") from None

    def _failure(self) -> asyncio.Future[BaseException]:
        """What `fail` was called with, once it was."""
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        return self._failed

    def fail(self, error: BaseException) -> None:
        if not self._failure().done():
            self._failure().set_result(error)

    def close(self) -> None:
        self._threads.shutdown()
        dist.destroy_process_group()

    def abort(self, exit_code: int) -> NoReturn:
        os._exit(exit_code)


def _bytes(part: memoryview) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(part, np.uint8))
