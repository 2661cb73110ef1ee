"""Operators, observers and silos who want more than their certificate says."""

from __future__ import annotations

import asyncio
import copy
import json
from datetime import timedelta

import grpc
import grpc.aio
import pytest
from exchange_world import AUTHORITY, HOST, SILOS, World, dial, in_loop
from grpc_health.v1 import health_pb2
from test_exchange_admission import Kept

from gptfl_dist.errors import ConfigError, ConnectionFailed, IdentityError
from gptfl_dist.exchange.base import Wish
from gptfl_dist.exchange.grpc import operator_pb2 as pb
from gptfl_dist.exchange.grpc.health import EXCHANGE, HEALTH, OPERATOR
from gptfl_dist.exchange.grpc.operator_client import OperatorClient
from gptfl_dist.exchange.grpc.operators import ACTIONS, OperatorService
from gptfl_dist.security.authority import Authority, key_bytes, new_key
from gptfl_dist.security.credentials import Credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.request import make_request

ANNA = Identity("fed", "operator", "anna")
SETS = {
    "silo": SILOS["alice"],
    "operator": AUTHORITY.issue("operator", "anna"),
    "observer": AUTHORITY.issue("observer", "ben"),
}
LOOKS = {"status", "silos", "operators", "requests"}
CHANGES = {"pause", "resume", "abort", "revoke", "invite", "approve"}


def served(world, act=lambda action, wish: json.dumps(action)):
    """Answers operators at the port of a world."""
    service = OperatorService(world.port.callers, world.port.trust, act)
    world.port.serve(OPERATOR, service.methods)


def channel_of(world, credentials):
    secrets = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
    options = [("grpc.max_send_message_length", 1 << 26)]
    return grpc.aio.secure_channel(f"{HOST}:{world.server.port}", secrets, options=options)


def client_of(world, credentials, own=ANNA):
    return OperatorClient(f"{HOST}:{world.server.port}", credentials, own)


async def code_of(call) -> grpc.StatusCode:
    """The status of a call, which may go well."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("role", "may"),
    [("silo", set()), ("observer", {*LOOKS}), ("operator", {*LOOKS, *CHANGES})],
)
@in_loop
async def test_each_role_may_do_what_the_table_says_and_nothing_else(tmp_path, role, may):
    """Every method of the service, by every role. What is refused is never begun."""
    done = []

    def act(action, wish):
        done.append(action)
        return "null"

    assert {*LOOKS, *CHANGES, "renew"} == set(ACTIONS)
    async with World(tmp_path) as world, channel_of(world, SETS[role]) as channel:
        served(world, act)
        for action in sorted({*LOOKS, *CHANGES}):
            code = await code_of(channel.unary_unary(f"/{OPERATOR}/{action.capitalize()}")(b""))
            assert code == (grpc.StatusCode.OK if action in may else grpc.StatusCode.PERMISSION_DENIED), action
        assert set(done) == may
        asked = health_pb2.HealthCheckRequest().SerializeToString()
        answer = await channel.unary_unary(f"/{HEALTH}/Check")(asked)
        assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("role", ["operator", "observer"])
@in_loop
async def test_an_operators_certificate_is_no_silos_and_cannot_serve(tmp_path, role):
    async def nothing():
        return
        yield

    taken = AUTHORITY.issue(role, "alice")  # under a silo's name
    async with World(tmp_path) as world:
        silo = world.silo(credentials=taken)
        with pytest.raises(
            IdentityError, match=f"the {role} alice may not take part at this coordinator: that takes a"
        ):
            await silo.connect()
        async with channel_of(world, taken) as channel:
            for call in (
                channel.stream_stream(f"/{EXCHANGE}/Work")(nothing()).read(),
                channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(b""),
                channel.unary_stream(f"/{EXCHANGE}/Download")(b"").read(),
                channel.stream_unary(f"/{EXCHANGE}/Upload")(nothing()),
                channel.unary_unary(f"/{EXCHANGE}/Renew")(b""),
            ):
                assert await code_of(call) == grpc.StatusCode.PERMISSION_DENIED
        assert await world.settled() == []
    async with World(tmp_path, credentials=taken) as impostor:
        victim = dial(impostor.server.port, SILOS["bob"])
        with pytest.raises(IdentityError, match="certificate purpose"):
            await victim.connect()
        async with client_of(impostor, SETS["operator"]) as client:
            with pytest.raises(IdentityError, match="certificate purpose"):
                await client.ask("status", Wish())


@in_loop
async def test_a_refusal_names_the_role_and_what_it_takes_is_logged_and_audited_and_fills_no_log(tmp_path, caplog):
    async with World(tmp_path) as world, client_of(world, SETS["observer"]) as client:
        served(world)
        for _ in range(5):
            with pytest.raises(IdentityError) as error:
                await client.ask("pause", Wish())
        said = "the observer ben may not pause at this coordinator: that takes a certificate of the role operator"
        assert said in error.value.message
        assert [line.getMessage() for line in caplog.records if "ben" in line.getMessage()] == [said]
        ((event, fields),) = world.audited
        assert event == "refused"
        assert (fields["action"], fields["by"], fields["reason"]) == ("pause", "gptfl://fed/observer/ben", said)


@pytest.mark.parametrize("action", ["invite", "approve"])
@in_loop
async def test_an_operator_lets_in_no_other_operator(tmp_path, action):
    """Else whoever stole an operator's key could leave a second one behind."""
    done = []
    async with World(tmp_path) as world, client_of(world, SETS["operator"]) as client:
        served(world, lambda action, wish: done.append((action, wish.role)) or "null")
        with pytest.raises(
            IdentityError, match=f"may not {action} an operator at this coordinator: that is done on its"
        ):
            await client.ask(action, Wish(role="operator", name="eve"))
        assert done == []
        await client.ask(action, Wish(role="observer", name="carl"))
        assert done == [(action, "observer")]


@in_loop
async def test_what_is_asked_stands_in_the_audit_log_before_it_is_done_and_so_does_that_it_failed(tmp_path):
    async with World(tmp_path) as world, client_of(world, SETS["operator"]) as client:
        told = []

        def act(action, wish):
            told.append([event for event, _ in world.audited])
            raise ConfigError("this run is finished", hint="there is nothing to abort")

        served(world, act)
        with pytest.raises(ConfigError, match="this run is finished") as error:
            await client.ask("abort", Wish(reason="wrong\x1b[2J labels"))
        assert error.value.hint == "there is nothing to abort"
        assert told == [["asked from afar"]]
        (_, asked), (_, failed) = world.audited
        assert (asked["by"], asked["action"], asked["reason"]) == (ANNA.uri, "abort", "wrong [2J labels")
        assert asked["serial"]
        assert asked["address"].startswith("ipv4:127.0.0.1:")
        assert [event for event, _ in world.audited] == ["asked from afar", "not done"]
        assert (failed["by"], failed["reason"]) == (ANNA.uri, "this run is finished")


@in_loop
async def test_what_cannot_be_audited_is_not_done(tmp_path):
    done = []

    def broken(event, **fields):
        raise ConfigError("the disk is full")

    async with World(tmp_path) as world, client_of(world, SETS["operator"]) as client:
        served(world, lambda action, wish: done.append(action) or "null")
        world.port.callers._note = broken
        with pytest.raises(ConnectionFailed, match="cannot write its audit log"):
            await client.ask("pause", Wish())
        assert done == []


@in_loop
async def test_who_looks_again_and_again_fills_no_log_and_takes_no_time_from_others(tmp_path):
    async with World(tmp_path) as world, client_of(world, SETS["observer"]) as client:
        served(world)
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(client.ask("status", Wish()) for _ in range(12)))
        took = asyncio.get_running_loop().time() - started
        assert took > 1.0  # 5 a second, and as many at once
        assert [event for event, _ in world.audited] == ["asked from afar"]
        await world.joined()


@in_loop
async def test_a_revoked_or_expired_operator_is_refused_with_the_next_question(tmp_path):
    kept = Kept(tmp_path)
    anna = kept.silo("anna", role="operator")
    async with World(tmp_path, trust=kept.trust) as world, client_of(world, anna) as client:
        served(world)
        assert json.loads(await client.ask("status", Wish())) == "status"
        kept.registry.revoke(ANNA, "laptop stolen")
        await asyncio.sleep(0.3)
        with pytest.raises(IdentityError, match="was revoked at"):
            await client.ask("pause", Wish())
        assert kept.trust.barred() == {}  # no silo is
    short = kept.silo("anna", role="operator", valid=timedelta(seconds=2))
    async with World(tmp_path, trust=kept.trust) as world, client_of(world, short) as client:
        served(world)
        await client.ask("status", Wish())
        await asyncio.sleep(2.5)
        with pytest.raises(ConnectionFailed):
            await client.ask("status", Wish())
    forged = copy.copy(AUTHORITY)
    forged.federation = "neighbour"
    for stranger in (
        Authority.new("fed", valid=timedelta(days=1)).issue("operator", "anna"),
        forged.issue("operator", "a"),
    ):
        async with World(tmp_path) as world:
            served(world)
            shown = Credentials(AUTHORITY.roots, stranger.certificate, stranger.key)
            async with client_of(world, shown) as client:
                with pytest.raises(ConnectionFailed):
                    await client.ask("status", Wish())


@in_loop
async def test_an_operator_renews_its_own_certificate_alone(tmp_path):
    kept = Kept(tmp_path)
    anna = kept.silo("anna", role="operator")
    async with World(tmp_path, trust=kept.trust) as world, client_of(world, anna) as client:
        served(world)
        for other in (
            Identity("fed", "operator", "eve"),
            Identity("fed", "silo", "anna"),
            Identity("fed", "observer", "anna"),
        ):
            with pytest.raises(IdentityError, match="the certificate request is for"):
                await client.ask("renew", Wish(request=make_request(other, new_key()).decode()))
        key = new_key()
        renewed = json.loads(await client.ask("renew", Wish(request=make_request(ANNA, key).decode())))
        shown = Credentials(renewed["authority"].encode(), renewed["certificate"].encode(), key_bytes(key))
        async with client_of(world, shown) as again:
            await again.ask("pause", Wish())


@in_loop
async def test_garbage_is_refused_and_the_port_goes_on(tmp_path):
    async with World(tmp_path) as world, channel_of(world, SETS["operator"]) as channel:
        served(world)
        status = channel.unary_unary(f"/{OPERATOR}/Status")
        assert await code_of(status(b"\xff\xff")) == grpc.StatusCode.INVALID_ARGUMENT
        assert (
            await code_of(status(pb.Wish(name="x" * (8 << 20)).SerializeToString()))
            == grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        assert await code_of(channel.unary_unary(f"/{OPERATOR}/Shutdown")(b"")) == grpc.StatusCode.UNIMPLEMENTED
        assert await code_of(channel.unary_unary(f"/{HEALTH}/Check")(b"\xff")) == grpc.StatusCode.INVALID_ARGUMENT
        assert await code_of(channel.unary_stream(f"/{HEALTH}/Watch")(b"").read()) == grpc.StatusCode.UNIMPLEMENTED
        assert await code_of(status(b"")) == grpc.StatusCode.OK


@in_loop
async def test_before_there_is_an_exchange_silos_are_told_and_operators_are_answered(tmp_path):
    world = World(tmp_path)
    served(world)
    await world.port.open()
    try:
        with pytest.raises(Exception, match="takes no silos yet"):
            await world.silo().connect()
        async with client_of(world, SETS["operator"]) as client:
            assert not await client.takes_silos()
            assert json.loads(await client.ask("status", Wish())) == "status"
            async with world:
                assert await client.takes_silos()
                await world.joined()
    finally:
        await world.port.close()
