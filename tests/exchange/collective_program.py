"""What every rank of a test runs: `program.py BACKEND NAME FOLDER`. Rank 0 writes what it found as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.collective.base import SEGMENT, Collective, completed, pipelined
from gptfl_dist.exchange.collective.reduction import ReducedUpdate, contributions
from gptfl_dist.security import bulk
from gptfl_dist.security.credentials import load_credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.session import Session
from gptfl_dist.weights import Layout


async def joined(backend: str) -> Collective:
    if backend == "torch":
        from gptfl_dist.exchange.collective.torch import TorchCollective

        return TorchCollective()
    from mpi4py import MPI

    from gptfl_dist.exchange.collective.mpi import MpiCollective

    return MpiCollective(MPI.COMM_WORLD) if backend == "mpi" else await sealed(MPI.COMM_WORLD)


async def sealed(world: Any) -> Collective:
    """With TLS between the ranks, by credentials in folders named by rank. Keys change at every third message."""
    from gptfl_dist.exchange.collective.tls import TlsCollective

    bulk.MESSAGES = 3
    folder = Path(sys.argv[3], str(world.rank))
    credentials, _ = load_credentials(*(folder / f"{name}.pem" for name in ("authority", "certificate", "key")))
    peers = {0: Identity("fed", "coordinator", "coordinator")}
    if world.rank == 0:
        peers = {rank: Identity("fed", "silo", f"silo-{rank}") for rank in range(1, world.size)}
    collective = TlsCollective(
        world, {rank: Session(credentials, peer, f"rank {rank}") for rank, peer in peers.items()}
    )
    await collective.shake_hands()
    return collective


def cut(flat: Any, segment: int = SEGMENT) -> Iterator[Any]:
    for start in range(0, len(flat), segment):
        yield flat[start : start + segment]


async def messages(world: Collective) -> dict[str, Any]:
    """Every rank greets rank 0, which answers each; the messages of a rank come in order."""
    if world.rank:
        for number in range(20):
            await world.say(0, {"from": world.rank, "number": number, "text": "ä" * (number * 1000)})
        sender, answer = await world.hear()
        assert (sender, answer) == (0, {"to": world.rank})
        return {}
    heard: dict[int, list[int]] = {rank: [] for rank in range(1, world.size)}
    for _ in range(20 * (world.size - 1)):
        sender, message = await world.hear()
        assert message["from"] == sender
        assert message["text"] == "ä" * (message["number"] * 1000)
        heard[sender].append(message["number"])
    for rank in heard:
        await world.say(rank, {"to": rank})
    return {"in order": all(numbers == list(range(20)) for numbers in heard.values())}


async def blocks(world: Collective) -> dict[str, Any]:
    """The last rank sends a flat buffer of several segments to rank 0."""
    flat = np.random.default_rng(1).integers(0, 256, 3 * SEGMENT + 17, np.uint8)
    if world.rank == world.size - 1:
        await completed(world.send(part.data, 0) for part in cut(flat))
    elif world.rank == 0:
        arrived = np.zeros_like(flat)
        await completed(world.receive(part.data, world.size - 1) for part in cut(arrived))
        return {"same": bool((arrived == flat).all())}
    return {}


async def both_ways(world: Collective) -> dict[str, Any]:
    """Rank 0 broadcasts while rank 1 sends it a flat buffer, and messages of several MiB pass."""
    flat = np.random.default_rng(1).integers(0, 256, 9 * SEGMENT + 17, np.uint8)
    text = "a" * (5 * SEGMENT // 2)
    cast, sent = (flat if world.rank == 0 else np.zeros_like(flat)), np.zeros_like(flat)
    work = [completed(world.broadcast(part) for part in cut(cast))]
    if world.rank == 0:
        work.append(completed(world.receive(part.data, 1) for part in cut(sent)))
    elif world.rank == 1:
        work.append(completed(world.send(part.data, 0) for part in cut(flat)))
    await asyncio.gather(*work)
    same = bool((cast == flat).all())
    if world.rank:
        await world.say(0, {"same": same, "text": text})
        return {}
    heard = [await world.hear() for _ in range(1, world.size)]
    ends = same and bool((sent == flat).all())
    return {"same": ends and all(message == {"same": True, "text": text} for _, message in heard)}


async def out_of_place(world: Collective) -> dict[str, Any]:
    """Rank 1 sends a part that is one byte short; or seals it twice, so that the first of both is never sent."""
    part = np.ones(1000, np.uint8)
    if world.rank:
        if os.environ["WRONG"] == "short":
            await world.send(part[:-1].data, 0)
        else:
            world._sealed(part.data)
            await world.send(part.data, 0)
        await world.hear()
        return {}
    try:
        await world.receive(part.data, 1)
        said = "taken"
    except ProtocolError as error:
        said = error.message
    await world.say(1, {})
    return {"said": said}


async def reductions(world: Collective) -> dict[str, Any]:
    """A broadcast, then a sum of floats and a maximum of counts, with other work of the ranks in between."""
    start = np.arange(2_000_003, dtype=np.float32) if world.rank == 0 else np.zeros(2_000_003, np.float32)
    await completed(world.broadcast(part) for part in cut(start, SEGMENT // 4))
    assert (start == np.arange(2_000_003)).all()
    floats = start * world.rank
    await completed(world.reduce(part, "sum") for part in cut(floats, SEGMENT // 4))
    counts = np.array([world.rank, -world.rank, 2**40 * world.rank])
    await world.reduce(counts, "max")
    total = sum(range(world.size))
    return {
        "sum": bool(np.array_equal(floats, np.arange(2_000_003, dtype=np.float32) * total)),
        "largest": counts.tolist(),
        "device": getattr(world, "device", "cpu"),
    }


async def updates(world: Collective) -> dict[str, Any]:
    """The updates of the silos of ranks 1 and 2 are summed; rank 3 has none that counts."""
    layout = Layout.of(
        [("w", (700_000,), "F32"), ("x", (3,), "F64"), ("n", (2,), "I64"), ("b", (3,), "I8"), ("f", (2,), "BOOL")]
    )
    if world.rank == 0:
        reduced = ReducedUpdate(layout)
        found = []
        for _ in range(2):  # the second finds the buffers of the first
            reduced.begin()
            reading = asyncio.create_task(asyncio.to_thread(_read, reduced, layout))
            async for part in pipelined(reduced.parts(world)):
                reduced.arrived(part)
            found.append(await reading)
        return {"found": found[0], "alike": found[0] == found[1]}
    silos = {1: [1.0, 10.0], 2: [100.0], 3: []}[world.rank]
    for _ in range(2):
        flats = [_flat(layout, value) for value in silos]
        await completed(contributions(world, layout, flats))
    return {}


def _flat(layout: Layout, value: float) -> Any:
    """A flat buffer that holds this in each tensor (the I8 as it fits in)."""
    flat = np.zeros(layout.nbytes, np.uint8)
    for tensor in layout.tensors:
        dtype = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I8": "i1", "BOOL": "?"}[tensor.dtype]
        flat[tensor.offset : tensor.offset + tensor.nbytes].view(dtype)[:] = -value if tensor.name == "b" else value
    return flat


def _read(reduced: ReducedUpdate, layout: Layout) -> dict[str, list[float]]:
    told = {}
    for tensor in layout.tensors:
        memory = memoryview(bytearray(tensor.nbytes))
        if tensor.dtype != "BOOL":
            reduced.read_into(tensor.offset, memory)
            numbers = np.frombuffer(memory, {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I8": "i1"}[tensor.dtype])
            told[tensor.name] = sorted(set(numbers.tolist()))
    return told


async def large(world: Collective) -> dict[str, Any]:
    """More than 2^31 elements: one buffer is given again and again, as a file of any size would be read."""
    elements, part = 2**31 + 5, np.zeros(SEGMENT, np.int8)
    size = 0

    def started(operation: Any) -> Iterator[Any]:
        nonlocal size
        for start in range(0, elements, SEGMENT):
            size += min(SEGMENT, elements - start)
            yield operation(part[: elements - start])

    await completed(started(world.broadcast))
    await completed(started(lambda part: world.reduce(part, "sum")))
    return {"elements": size // 2}


async def waiting(world: Collective) -> dict[str, Any]:
    """Rank 1 is late; the others wait for its message, and for its part in a reduction. How much CPU does that take?"""
    seconds = float(os.environ["SECONDS_TO_WAIT"])
    flat = np.ones(SEGMENT, np.float32)
    began, cpu = time.monotonic(), time.process_time()
    if world.rank == 1:
        await asyncio.sleep(seconds)
        await world.say(0, {})
        await asyncio.sleep(seconds)
    elif world.rank == 0:
        await world.hear()
    await world.reduce(flat, "sum")
    return {"share": (time.process_time() - cpu) / (time.monotonic() - began), "sum": float(flat[0])}


async def failing(world: Collective) -> dict[str, Any]:
    """What is under way raises the error that `fail` was called with. The other rank is there, but takes no part."""
    if world.rank:
        await asyncio.sleep(60)  # until the launcher ends it
    operations = [world.hear(), world.broadcast(np.zeros(64 * SEGMENT, np.uint8))]
    tasks = [asyncio.ensure_future(operation) for operation in operations]
    await asyncio.sleep(0.05)
    world.fail(ArithmeticError("gone"))
    await asyncio.wait(tasks, timeout=5)
    # Not to stderr: what a rank prints last before an abort does not always come through.
    write_found([str(task.exception()) for task in tasks])
    world.abort(7)


def write_found(found: object) -> None:
    Path(sys.argv[3], "found.json").write_text(json.dumps(found))


def main() -> None:
    backend, name = sys.argv[1:3]
    asyncio.run(run(backend, globals()[name]))


async def run(backend: str, program: Callable[[Collective], Awaitable[dict[str, Any]]]) -> None:
    world = await joined(backend)
    found = await program(world)
    if world.rank == 0:
        write_found(found)
    world.close()


if __name__ == "__main__":
    main()
