"""Certificates while connections are open: revoked, expired, renewed, and what becomes of what was under way."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from datetime import timedelta
from typing import get_args

import pytest
from exchange_world import HOST, World, dial, header_of, in_loop, train_order

from gptfl_dist.errors import IdentityError
from gptfl_dist.exchange.base import (
    Answered,
    Disconnected,
    Goodbye,
    OrderFailed,
    Receipt,
    SiloBarred,
    SiloJoined,
    SiloLeft,
)
from gptfl_dist.security.authority import Credentials, key_bytes, new_key
from gptfl_dist.security.identity import Identity, Role
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.request import make_request
from gptfl_dist.security.trust import KeptTrust, certify
from gptfl_dist.security.vault import Vault
from gptfl_dist.testing.proxy import TcpProxy
from gptfl_dist.weights import Layout, WeightsFile, write_weights

ALICE = Identity("fed", "silo", "alice")
LARGE = Layout.of([("w", (4 << 20,), "F32")])  # 16 MiB


class Kept:
    """An authority in a folder, and the trust of a coordinator by it."""

    def __init__(self, folder, valid=timedelta(days=1)):
        vault = Vault(folder / "authority", "fed")
        vault.create()
        self.registry = Registry(vault.folder)
        self.registry.create()
        self.vault, self.authority = vault, vault.open(valid)
        self.noted = []
        self.trust = KeptTrust(vault, valid, self.registry, (HOST, "localhost"), self.note)

    def silo(self, name="alice", valid=None, role="silo"):
        key = new_key()
        authority = copy.copy(self.authority)
        authority._valid = valid or authority._valid
        who = Identity("fed", role, name)
        certificate, roots = certify(authority, self.registry, who, make_request(who, key), self.note, "enrolled")
        return Credentials(roots, certificate, key_bytes(key))

    def note(self, event, **fields):
        self.noted.append((event, *(name for role, name in fields.items() if role in get_args(Role))))

    def revoke(self, silo="alice"):
        self.registry.revoke(Identity("fed", "silo", silo), "a test")


async def ready(world, credentials, name="alice", port=0):
    silo = world.silo(name, credentials=credentials, port=port)
    await silo.connect()
    await silo.ready()
    assert await world.event() == SiloJoined(name)
    return silo


@contextlib.asynccontextmanager
async def called_on(folder, kept):
    """Alice behind a proxy, with the order to which she has the update `u` and its header."""
    digest = write_weights(folder / "u", LARGE, [bytes(LARGE.nbytes)])
    async with World(folder, LARGE, trust=kept.trust) as world, TcpProxy(world.server.port) as proxy:
        alice = await ready(world, kept.silo(), port=proxy.port)
        order = train_order("n1", "b" * 64)
        await world.give("alice", order)
        await alice.receive()
        yield world, proxy, alice, header_of(order, LARGE, digest)


@in_loop
async def test_a_certificate_that_the_registry_does_not_hold_is_refused(tmp_path):
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world:
        silo = world.silo(credentials=kept.authority.issue_silo("alice"))
        with pytest.raises(IdentityError, match="is not in the authority's registry"):
            await silo.connect()


@in_loop
async def test_a_revoked_silo_is_cut_off_within_a_second_though_it_says_nothing(tmp_path):
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world:
        alice, bob = await ready(world, kept.silo()), await ready(world, kept.silo("bob"), "bob")
        order = train_order("n1", "b" * 64)
        await world.give("alice", order)
        assert (await alice.receive()) == order
        kept.revoke()
        started = time.monotonic()
        with pytest.raises(IdentityError, match="was revoked at"):
            await alice.receive()
        assert time.monotonic() - started < 1
        barred = await world.event()
        assert isinstance(barred, SiloBarred)
        assert barred.silo == "alice"
        assert "(a test)" in barred.reason
        failed = await world.event()
        assert isinstance(failed, OrderFailed)
        assert (failed.silo, failed.nonce) == ("alice", "n1")
        assert "was revoked" in failed.reason
        assert await world.event() == SiloLeft("alice")
        with pytest.raises(IdentityError, match="was revoked at"):
            await alice.connect()
        await world.give("bob", train_order("n2", "b" * 64))  # who is none the worse for it
        assert (await bob.receive()).nonce == "n2"


@in_loop
async def test_what_a_revoked_silo_was_sending_is_refused(tmp_path):
    kept = Kept(tmp_path)
    async with called_on(tmp_path, kept) as (world, proxy, alice, header):
        proxy.delay = 0.05  # a piece: the upload takes many seconds
        with WeightsFile(tmp_path / "u") as update:
            sending = asyncio.create_task(alice.upload(header, update))
            while world.server.traffic.up < 1 << 20:
                await asyncio.sleep(0.01)
            kept.revoke()
            started = time.monotonic()
            assert isinstance(await world.event(), SiloBarred)
            failed = await world.event()
            assert time.monotonic() - started < 1
            assert isinstance(failed, OrderFailed)
            proxy.delay = 0.0
            with pytest.raises((IdentityError, Disconnected)):
                await sending
        assert world.commits == []


@in_loop
async def test_an_expired_certificate_ends_its_streams_at_the_next_message(tmp_path):
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world:
        alice = await ready(world, kept.silo(valid=timedelta(seconds=2)))
        await asyncio.sleep(1)
        await world.give("alice", train_order("n1", "b" * 64))
        assert (await alice.receive()).nonce == "n1"
        await asyncio.sleep(1.5)
        with pytest.raises(Disconnected, match="certificate expired"):
            await alice.receive()
        assert await world.settled() == [SiloLeft("alice")]  # the order is still open: the silo may come back renewed
        with pytest.raises(IdentityError, match="this silo's certificate: valid"):
            await alice.connect()


@in_loop
async def test_a_renewed_silo_moves_to_a_new_connection_and_a_transfer_is_not_cut(tmp_path):
    kept = Kept(tmp_path)
    async with called_on(tmp_path, kept) as (world, proxy, alice, header):
        key = new_key()
        certificate, roots = await alice.renew(make_request(ALICE, key))
        assert kept.noted == [("enrolled", "alice"), ("certificate renewed", "alice")]
        proxy.delay = 0.003
        with WeightsFile(tmp_path / "u") as update:
            sending = asyncio.create_task(alice.upload(header, update))
            while world.server.traffic.up < 1 << 20:
                await asyncio.sleep(0.01)
            showing = asyncio.create_task(alice.show(Credentials(roots, certificate, key_bytes(key))))
            listening = asyncio.create_task(alice.receive())
            assert await sending == Receipt(True)
        await showing
        assert await world.event() == Answered("alice", "n1")
        assert await world.event() == SiloJoined("alice")
        assert world.server._lines["alice"].peer.serial == int(kept.registry.certificates()[0].serial, 16)
        await world.give("alice", train_order("n2", "b" * 64))
        assert (await listening).nonce == "n2"
        assert proxy.cuts == 0
        assert await world.settled() == []  # it never left
        assert len(world.commits) == 1


@in_loop
async def test_a_transfer_that_begins_while_the_stream_moves_is_not_cut(tmp_path):
    digest = write_weights(tmp_path / "base", LARGE, [bytes(LARGE.nbytes)])
    kept = Kept(tmp_path)
    with WeightsFile(tmp_path / "base") as base:
        async with World(tmp_path, LARGE, trust=kept.trust) as world:
            alice = await ready(world, kept.silo())
            await world.server.publish({digest: base})
            for number in range(8):
                moving = asyncio.create_task(alice.show(kept.silo()))
                await asyncio.sleep(0.002 * number)  # into the handshake, and behind it
                await alice.download(digest, LARGE, tmp_path / "got")
                await moving
                assert await world.event() == SiloJoined("alice")
            assert await world.settled() == []  # it never left


@in_loop
async def test_the_end_is_heard_though_it_comes_while_the_stream_moves(tmp_path):
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world, TcpProxy(world.server.port) as proxy:
        alice = await ready(world, kept.silo(), port=proxy.port)
        proxy.delay = 0.5  # the end is still on its way when the new connection is refused
        closing = asyncio.create_task(world.server.close(Goodbye(True, "done")))
        listening = asyncio.create_task(alice.receive())
        await asyncio.sleep(0.1)
        await alice.show(kept.silo())
        assert await listening == Goodbye(True, "done")
        await closing


@in_loop
async def test_a_silo_gets_a_certificate_for_itself_alone(tmp_path):
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world:
        alice = await ready(world, kept.silo())
        known = len(kept.registry.certificates())
        with pytest.raises(IdentityError, match="gptfl://fed/silo/bob, expected gptfl://fed/silo/alice"):
            await alice.renew(make_request(Identity("fed", "silo", "bob"), new_key()))
        with pytest.raises(IdentityError, match="cannot be read"):
            await alice.renew(b"hello")
        assert len(kept.registry.certificates()) == known


@in_loop
async def test_without_an_authority_nothing_is_renewed(tmp_path):
    async with World(tmp_path) as world:
        alice = await world.joined()
        with pytest.raises(IdentityError, match="makes no certificates"):
            await alice.renew(make_request(ALICE, new_key()))


@in_loop
async def test_a_root_is_replaced_while_the_coordinator_serves_and_nobody_is_cut_off(tmp_path):
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world:
        old = kept.silo()
        alice = await ready(world, old)
        kept.vault.rotate()
        key = new_key()
        certificate, roots = await alice.renew(make_request(ALICE, key))
        assert roots.count(b"BEGIN CERTIFICATE") == 2
        await alice.show(Credentials(roots, certificate, key_bytes(key)))
        assert await world.event() == SiloJoined("alice")
        again = dial(world.server.port, old)  # which has heard of nothing
        with pytest.raises(Disconnected, match="connected already"):
            await again.connect()
        assert kept.registry.certificates()[0].issuer == f"{kept.vault.issuing().serial_number:x}"
        kept.vault.drop_old_root()
        await alice.connect()
        with pytest.raises((IdentityError, Disconnected)):
            await again.connect()


@in_loop
async def test_the_stream_moves_again_and_again_while_it_is_read(tmp_path):
    """Whoever reads in the moment of a move gets the next order, and not what the new connection begins with."""
    kept = Kept(tmp_path)
    async with World(tmp_path, trust=kept.trust) as world:
        alice = await ready(world, kept.silo())
        for number in range(30):
            shown = kept.silo()
            moving = asyncio.create_task(alice.show(shown))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            listening = asyncio.create_task(alice.receive())
            await moving
            assert await world.event() == SiloJoined("alice")
            await world.give("alice", train_order(f"n{number}", "b" * 64))
            assert (await listening).nonce == f"n{number}"


@in_loop
async def test_the_coordinator_renews_its_own_certificate_while_it_serves(tmp_path):
    kept = Kept(tmp_path, valid=timedelta(seconds=3))
    async with World(tmp_path, trust=kept.trust) as world:
        first = kept.trust.credentials()
        for _ in range(3):  # longer than one certificate holds
            silo = dial(world.server.port, kept.silo(valid=timedelta(days=1)))
            await silo.connect()
            await silo.close()
            await asyncio.sleep(1.5)
        assert kept.trust.credentials() != first
