"""A silo with a valid certificate that sends what it must not, over the real wire, into a federation that goes on.

Each abuse is refused with its reason, which silo and operator read; the round completes with the others, and the
weights are what the others make them.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc.aio
import pytest
from exchange_world import port_of
from federated import ARM, LAYOUT, SAMPLES, START, STEPS, World, answered, flat, in_loop, mean_step

from gptfl_dist.config.silo import Data, SiloFile
from gptfl_dist.exchange.base import Goodbye, Receipt, UpdateHeader
from gptfl_dist.exchange.grpc import convert
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.client import GrpcSiloExchange
from gptfl_dist.exchange.grpc.frames import encode_chunk
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.exchange.grpc.server import NONCE, GrpcCoordinatorExchange
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.silo import Silo
from gptfl_dist.security.authority import Authority
from gptfl_dist.security.signing import sign
from gptfl_dist.security.trust import FixedTrust
from gptfl_dist.weights import Layout, WeightsFile, write_weights

_AUTHORITY = Authority.new("fed", valid=timedelta(days=1))
_HOST = "127.0.0.1"
_ROUNDS = 3
_ATTACKED = 2  # the round in which the intruder does not behave

Attack = Callable[["Intruder", Order], Awaitable[str]]


class Intruder:
    """The silo c: its certificate is in order, what it sends in one round is not."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self.exchange = GrpcSiloExchange(
            address=f"{_HOST}:{port}", credentials=_AUTHORITY.issue_silo("c"), keepalive=30.0
        )
        self.earlier: UpdateHeader | None = None  # of the round before
        self.told = ""
        self._path = folder / "update.safetensors"

    async def run(self, attack: Attack) -> None:
        await self.exchange.connect()
        await self.exchange.ready()
        try:
            while not isinstance(word := await self.exchange.receive(), Goodbye):
                assert isinstance(word, Order)
                if word.kind == "evaluate":
                    await self.exchange.report(Report(word.nonce, SAMPLES["c"], {}))
                elif word.round == _ATTACKED:
                    self.told = await attack(self, word)
                else:
                    assert (await self.honest(word)).committed
        finally:
            await self.exchange.close()

    async def honest(self, order: Order) -> Receipt:
        self.earlier = self.header(order, flat(STEPS["c"], seen=order.round))
        return await self.upload(self.earlier)

    def header(self, order: Order, content: bytes, layout: Layout = LAYOUT) -> UpdateHeader:
        """Announces this content, and has it ready for `upload`."""
        digest = write_weights(self._path, layout, [content])
        return UpdateHeader(Report(order.nonce, SAMPLES["c"], {}), order.base, layout.digest, digest, layout.nbytes)

    async def upload(self, header: UpdateHeader) -> Receipt:
        with WeightsFile(self._path) as update:
            return await self.exchange.upload(header, update)

    def signature(self, header: UpdateHeader, key: bytes = b"") -> bytes:
        assert self.exchange._welcome is not None
        text = header.statement(self.exchange._own, self.exchange._welcome.run)
        return sign(text, key or self.exchange._shown.key)

    async def announce(self, header: UpdateHeader, signature: bytes) -> str:
        """Announces an update with this signature; why it is refused, or ""."""
        answer = await self.exchange._open_channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(
            convert.header_to_message(header, signature).SerializeToString()
        )
        return pb.UploadOffset.FromString(answer).refused

    async def send(self, header: UpdateHeader, frames: AsyncIterator[bytes]) -> str:
        """Announces as it should, then sends these frames; what it is told."""
        channel = self.exchange._open_channel
        assert not await self.announce(header, self.signature(header))
        method = channel.stream_unary(f"/{EXCHANGE}/Upload", response_deserializer=pb.Receipt.FromString)
        receipt = await method(frames, metadata=((NONCE, header.report.nonce),))
        assert not receipt.committed
        return str(receipt.reason)


async def _nan(intruder: Intruder, order: Order) -> str:
    return (await intruder.upload(intruder.header(order, flat(float("nan"))))).reason


async def _infinite(intruder: Intruder, order: Order) -> str:
    return (await intruder.upload(intruder.header(order, flat(float("-inf"))))).reason


async def _wrong_shape(intruder: Intruder, order: Order) -> str:
    wrong = Layout.of([("w", (2, 2), "F32"), ("seen", (1,), "I64")])  # as many bytes, in another shape
    return (await intruder.upload(intruder.header(order, flat(1.0), wrong))).reason


async def _wrong_size(intruder: Intruder, order: Order) -> str:
    header = intruder.header(order, flat(1.0))
    return (await intruder.upload(replace(header, size=1 << 40))).reason


async def _wrong_round(intruder: Intruder, order: Order) -> str:
    assert intruder.earlier is not None
    header = intruder.header(order, flat(1.0))
    return (await intruder.upload(replace(header, base=intruder.earlier.base))).reason


async def _too_many_samples(intruder: Intruder, order: Order) -> str:
    header = intruder.header(order, flat(1.0))
    return (await intruder.upload(replace(header, report=replace(header.report, samples=101)))).reason


async def _no_samples(intruder: Intruder, order: Order) -> str:
    header = intruder.header(order, flat(1.0))
    return (await intruder.upload(replace(header, report=replace(header.report, samples=0)))).reason


async def _other_content(intruder: Intruder, order: Order) -> str:
    header = intruder.header(order, flat(1.0))
    return (await intruder.upload(replace(header, digest="00" * 32))).reason


async def _not_signed(intruder: Intruder, order: Order) -> str:
    return await intruder.announce(intruder.header(order, flat(1.0)), b"")


async def _signed_by_another(intruder: Intruder, order: Order) -> str:
    header = intruder.header(order, flat(1.0))
    return await intruder.announce(header, intruder.signature(header, _AUTHORITY.issue_silo("c").key))


async def _signed_for_another(intruder: Intruder, order: Order) -> str:
    header = intruder.header(order, flat(1.0))
    other = replace(header, report=replace(header.report, samples=1))
    return await intruder.announce(header, intruder.signature(other))


async def _garbage(intruder: Intruder, order: Order) -> str:
    async def frames() -> AsyncIterator[bytes]:
        yield b"\xff" * 1000

    return await intruder.send(intruder.header(order, flat(1.0)), frames())


async def _oversize_stream(intruder: Intruder, order: Order) -> str:
    async def frames() -> AsyncIterator[bytes]:
        yield encode_chunk(0, flat(1.0))
        for number in range(1 << 12):  # 4 GiB, if it were taken
            yield encode_chunk(LAYOUT.nbytes + (number << 20), bytes(1 << 20))

    return await intruder.send(intruder.header(order, flat(1.0)), frames())


_ATTACKS: dict[str, tuple[Attack, str]] = {
    "NaN": (_nan, "NaN or infinite"),
    "infinite": (_infinite, "NaN or infinite"),
    "wrong shape": (_wrong_shape, "the layout of the update is not the federation's"),
    "wrong size": (_wrong_size, f"announces {1 << 40} bytes, the layout has {LAYOUT.nbytes}"),
    "wrong round": (_wrong_round, "trained from the weights"),
    "too many samples": (_too_many_samples, "claims 101 samples, expected 1 to 100"),
    "no samples": (_no_samples, "claims 0 samples, expected 1 to 100"),
    "other content": (_other_content, "do not have the announced digest"),
    "not signed": (_not_signed, "is not signed with the key"),
    "signed by another": (_signed_by_another, "is not signed with the key"),
    "signed for another": (_signed_for_another, "is not signed with the key"),
    "garbage": (_garbage, "a frame is no chunk"),
    "oversize stream": (_oversize_stream, f"of {LAYOUT.nbytes}"),
}


@pytest.mark.parametrize("name", _ATTACKS)
@in_loop
async def test_a_malicious_update_is_refused_with_its_reason_and_the_round_completes(tmp_path: Path, name: str) -> None:
    attack, reason = _ATTACKS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with _attacked(tmp_path, attack) as (world, intruder):
        pass
    assert reason in intruder.told
    assert any(f"c failed: refused: {intruder.told}" in text for text in world.notes.texts)
    record = world.record()
    assert [answered(record, r) for r in range(1, _ROUNDS + 1)] == [{"a", "b", "c"}, {"a", "b"}, {"a", "b", "c"}]
    assert world.value() == START + 2 * mean_step("abc") + mean_step("ab")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


async def _replay(intruder: Intruder, order: Order) -> str:
    """Sends the update of the round before once more, then what was asked for."""
    assert intruder.earlier is not None
    again = await intruder.upload(intruder.earlier)
    assert not again.committed
    with pytest.raises(grpc.aio.AioRpcError) as unknown:  # a chunk of an update that was never announced
        await intruder.exchange._open_channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(b"\xff\xff")
    assert unknown.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await intruder.honest(order)).committed
    return again.reason


@in_loop
async def test_a_replay_is_refused_and_the_order_stays_open(tmp_path: Path) -> None:
    async with _attacked(tmp_path, _replay) as (world, intruder):
        pass
    assert intruder.told == "answers no order that is open for this silo"
    assert [answered(world.record(), r) for r in range(1, _ROUNDS + 1)] == [{"a", "b", "c"}] * 3
    assert world.value() == START + 3 * mean_step("abc")


@contextlib.asynccontextmanager
async def _attacked(folder: Path, attack: Attack) -> AsyncIterator[tuple[World, Intruder]]:
    """A whole federation over gRPC, in which the silo c attacks."""
    made: list[GrpcCoordinatorExchange] = []

    def make_exchange(inbox: Inbox) -> GrpcCoordinatorExchange:
        credentials = _AUTHORITY.issue_coordinator([_HOST])
        port = port_of(FixedTrust(credentials), silos=tuple(world.trainers))
        made.append(GrpcCoordinatorExchange(port=port, inbox=inbox, chunk=1 << 20))
        return made[0]

    async with World(folder, rounds=_ROUNDS, quorum=2) as world:
        async with world.coordinator(make_exchange=make_exchange) as federator:
            tasks = []
            for name in "ab":
                exchange = GrpcSiloExchange(
                    address=f"{_HOST}:{made[0].port}", credentials=_AUTHORITY.issue_silo(name), keepalive=30.0
                )
                file = SiloFile(name=name, data=Data(path=folder / "data"))
                silo = Silo(silo=file, exchange=exchange, runner=world.trainers[name], folder=folder / name, fresh=None)
                tasks.append(asyncio.create_task(silo.run()))
            intruder = Intruder(made[0].port, folder)
            tasks.append(asyncio.create_task(intruder.run(attack)))
            async with asyncio.timeout(60):
                await run_arms(federator)
        await asyncio.gather(*tasks)
        assert world.record().arm == ARM
        yield world, intruder
