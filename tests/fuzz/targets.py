"""What reads bytes that another side sent, as functions of bytes, with real messages to begin from.

A target does with its input what the receiving side does. It may raise only what that side is prepared for: what is
named here with it. Anything else is a fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

from google.protobuf.message import DecodeError

from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.task import Model, Task
from gptfl_dist.errors import ConfigError, IdentityError, ModelError, ProtocolError, TrainerError
from gptfl_dist.exchange.base import PROTOCOL_VERSION, UpdateHeader, Welcome, Wish
from gptfl_dist.exchange.grpc import convert, frames
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc import operator_pb2 as operator_pb
from gptfl_dist.exchange.grpc.operator_client import error_in
from gptfl_dist.exchange.inbox import Busy, Inbox, Refused
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.launch.channel import encode, error_from_message, error_to_message
from gptfl_dist.launch.trainer import _decode
from gptfl_dist.observe.status import SiloStatus, Status
from gptfl_dist.run.actions import RESULTS
from gptfl_dist.run.afar import result_in
from gptfl_dist.security import session as sessions
from gptfl_dist.security.audit import verify
from gptfl_dist.security.audit_log import AuditLog, read_log
from gptfl_dist.security.authority import Authority, Credentials, new_key
from gptfl_dist.security.credentials import identity_in
from gptfl_dist.security.enrolment import asked_in
from gptfl_dist.security.identity import Identity, peer_identity
from gptfl_dist.security.invitation import InvitationLine
from gptfl_dist.security.request import key_in, make_request
from gptfl_dist.security.session import Session
from gptfl_dist.weights import Layout, WeightsFile, write_weights

_LAYOUT = Layout.of([("layer.weight", (3, 5), "F32"), ("layer.bias", (3,), "BF16"), ("seen", (1,), "I64")])
_TRAINING = LocalTraining(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, augmentation=False, threads=1
)
_PLAN = Plan(federation="fed", seed=1, labels=["cat", "dog"], task=Task(), model=Model())
_TRAIN = Order("train", "nonce-1", "gptfl", 3, "ab" * 32, 60.0, _TRAINING)
_EVALUATE = Order("evaluate", "nonce-1", "gptfl", 3, "ab" * 32, 60.0)
_REPORT = Report("nonce-1", 100, {"accuracy": 0.5, "loss": 1.25})
_HEADER = UpdateHeader(_REPORT, _TRAIN.base, _LAYOUT.digest, "cd" * 32, _LAYOUT.nbytes)


@dataclass(frozen=True)
class Target:
    """`read` may raise `allowed`."""

    read: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    allowed: tuple[type[BaseException], ...]


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@cache
def _file_in_memory() -> int:
    return os.memfd_create("weights")


@cache
def _inbox() -> Inbox:
    return Inbox(_folder(), _LAYOUT, {"silo": 1000}, lambda silo, order, report, digest: None)


_LARGEST = 4096  # bytes that a packed chunk may unpack to


def _chunk(data: bytes) -> None:
    found = frames.decode_chunk(data)
    chunk = pb.Chunk.FromString(data)  # any protobuf reader understands what we take
    assert (chunk.offset, chunk.data) == (found.offset, bytes(found.data))


def _packed_chunk(data: bytes) -> None:
    found = frames.decode_chunk(data, _LARGEST)
    assert 0 < len(found.data) <= max(_LARGEST, len(data))
    assert pb.Chunk.FromString(data).offset == found.offset


def _from_silo(data: bytes) -> None:
    message = pb.FromSilo.FromString(data)
    kind = message.WhichOneof("message")
    if kind == "report":
        _inbox().expect("silo", _EVALUATE)
        _inbox().accept("silo", convert.report_from_message(message.report))
    elif kind == "failure":
        assert len(convert.legible(message.failure.reason)) <= 4000


def _wish(data: bytes) -> None:
    wish = convert.wish_from_message(operator_pb.Wish.FromString(data))
    assert all(len(text) <= 4000 and (text.isprintable() or "\n" in text) for text in wish.told().values())


def _operator_answer(data: bytes) -> None:
    answer = operator_pb.Answer.FromString(data)
    if answer.HasField("fault"):
        assert error_in(answer.fault).exit_code
    for action in RESULTS:
        with contextlib.suppress(ProtocolError):
            result_in(action, answer.result)


def _operator_answers() -> list[bytes]:
    silo = SiloStatus("a", True, "idle", "", None, 0, None)
    status = Status("tiny", "run", "running", "2025-11-03T02:00:00+00:00", silos=[silo])
    fault = operator_pb.Fault(error="ConfigError", message="no", hint="yes")
    answers = [operator_pb.Answer(result=json.dumps(asdict(status))), operator_pb.Answer(fault=fault)]
    return [answer.SerializeToString() for answer in answers]


def _update_header(data: bytes) -> None:
    header = convert.header_from_message(pb.UpdateHeader.FromString(data))
    _inbox().expect("silo", _TRAIN)
    assert _inbox().announce("silo", header) == (0, False)


def _to_silo(data: bytes) -> None:
    message = pb.ToSilo.FromString(data)
    kind = message.WhichOneof("message")
    if kind == "welcome":
        convert.welcome_from_message(message.welcome)
    elif kind == "order":
        convert.order_from_message(message.order)
    elif kind == "recall":
        convert.legible(message.recall.reason)


def _layout(data: bytes) -> None:
    layout = Layout.from_json(data)
    assert Layout.from_json(layout.to_json()) == layout
    assert layout.difference(layout) == ""
    assert [segment.stop for segment in layout.segments()][-1:] == [layout.nbytes] * bool(layout.nbytes)


def _weights_file(data: bytes) -> None:
    file = _file_in_memory()
    os.pwrite(file, data, 0)
    os.ftruncate(file, len(data))
    with WeightsFile(Path(f"/proc/self/fd/{file}")) as weights:
        assert weights.nbytes < len(data)
        weights.digest()


def _trainer_line(data: bytes) -> None:
    message = _decode(data)
    if message["type"] == "failed":
        error_from_message(message)


def _identity(data: bytes) -> None:
    text = data.decode(errors="replace")
    assert Identity.from_uri(text).uri == text
    peer_identity({"ssl_tls_version": [b"TLSv1.3"], "peer_uri": [data]})


def _certificate(data: bytes) -> None:
    identity_in(data, "the certificate")


# Of the same files a context is made once: its making takes most of a session's time, and reads nothing foreign.
sessions.tls_context = cache(sessions.tls_context)  # type: ignore[assignment]  # called alike


def _established() -> tuple[Session, Session]:
    """The two ends of a new session: the coordinator's and the silo's."""
    coordinator = Session(_credentials()[0], Identity("fed", "silo", "silo-1"), "rank 1")
    silo = Session(_credentials()[1], Identity("fed", "coordinator", "coordinator"), "rank 0")
    coordinator.step(silo.step(coordinator.step(silo.step())))
    return coordinator, silo


def _session(data: bytes) -> None:
    """Nothing is opened but what the peer sealed in this very session; of that, nothing but messages."""
    coordinator, silo = _established()
    if data:
        silo._ssl.write(data)
        with contextlib.suppress(ProtocolError):
            coordinator.open(silo._outgoing.read())
    silo.open(data)
    raise AssertionError("opened what nobody sealed for it")


def _handshake(data: bytes) -> None:
    server = Session(_credentials()[0], Identity("fed", "silo", "silo-1"), "rank 1")
    server.step(data)
    assert not server.established


@cache
def _credentials() -> tuple[Credentials, Credentials]:
    authority = Authority.new("fed", valid=timedelta(days=1))
    return authority.issue_coordinator(["localhost"]), authority.issue_silo("silo-1")


def _hellos() -> list[bytes]:
    return [Session(_credentials()[1], Identity("fed", "coordinator", "coordinator"), "rank 0").step()]


def _weights_seeds() -> list[bytes]:
    path = _folder() / "seed.safetensors"
    write_weights(path, _LAYOUT, [bytes(_LAYOUT.nbytes)])
    return [path.read_bytes()]


def _messages_up() -> list[bytes]:
    messages = (
        pb.FromSilo(
            hello=pb.Hello(
                oldest_version=PROTOCOL_VERSION, newest_version=PROTOCOL_VERSION, release="0.1.0", instance="a1"
            )
        ),
        pb.FromSilo(progress=pb.Progress(nonce="nonce-1", done=3, total=9)),
        pb.FromSilo(failure=pb.Failure(nonce="nonce-1", reason="TrainerError: out of memory")),
        pb.FromSilo(report=convert.report_to_message(_REPORT)),
        pb.FromSilo(ready=pb.Ready()),
    )
    return [message.SerializeToString() for message in messages]


def _messages_down() -> list[bytes]:
    messages = (
        pb.ToSilo(welcome=convert.welcome_to_message(Welcome("run", _PLAN, _LAYOUT), PROTOCOL_VERSION, "0.1.0")),
        pb.ToSilo(order=convert.order_to_message(_TRAIN)),
        pb.ToSilo(order=convert.order_to_message(_EVALUATE)),
        pb.ToSilo(recall=pb.Recall(nonce="nonce-1", reason="the deadline of the round has passed")),
        pb.ToSilo(goodbye=pb.Goodbye(finished=True, reason="the federation is finished")),
    )
    return [message.SerializeToString() for message in messages]


def _lines() -> list[bytes]:
    failed = error_to_message(ModelError("a model", hint="another"))
    result = {"type": "result", "digest": "ab" * 32, "samples": 100, "metrics": {"loss": 0.5}}
    return [encode(failed), encode(result), encode({"type": "progress", "done": 1, "total": 2})]


def _certificates() -> list[bytes]:
    authority = Authority.new("fed", valid=timedelta(days=1))
    return [authority.issue_silo("silo-1").certificate, authority.issue_coordinator(["localhost"]).certificate]


def _certificate_request(data: bytes) -> None:
    key_in(data, Identity("fed", "silo", "silo-1"))


def _enrolment(data: bytes) -> None:
    who, token, request = asked_in(data)
    assert Identity.from_uri(who.uri) == who
    assert isinstance(token, str)
    key_in(request, who)


def _enrolments() -> list[bytes]:
    who = Identity("fed", "silo", "silo-1")
    request = make_request(who, new_key())
    return [json.dumps({"identity": who.uri, "token": "t" * 32, "request": request.decode()}).encode()]


def _invitation(data: bytes) -> None:
    line = InvitationLine.parse(data.decode(errors="replace"))
    assert InvitationLine.parse(str(line)) == line


def _audit_log(data: bytes) -> None:
    verify(data)


@cache
def _audit_logs() -> list[bytes]:
    log = AuditLog(_folder())
    log.append("silo connected", silo="silo-1", serial="1f")
    return [read_log(_folder())]


TARGETS = {
    "certificate_request": Target(
        _certificate_request,
        lambda: [make_request(Identity("fed", "silo", "silo-1"), new_key())],
        (IdentityError,),
    ),
    "enrolment": Target(_enrolment, _enrolments, (IdentityError,)),
    "invitation": Target(
        _invitation,
        lambda: [
            f"gptfl join gptfl://localhost:8444/fed/silo-1/{'t' * 32}/{'0' * 64}".encode(),
            f"gptfl://localhost:8444/fed/operator/anna/{'t' * 32}/{'0' * 64}".encode(),
        ],
        (ConfigError,),
    ),
    "audit_log": Target(_audit_log, _audit_logs, ()),
    "chunk": Target(
        _chunk,
        lambda: [frames.encode_chunk(0, b"x"), frames.encode_chunk(1 << 40, bytes(300))],
        (ProtocolError,),
    ),
    "packed_chunk": Target(
        _packed_chunk,
        lambda: [frames.pack_chunk(7, bytes(300), 4)[0], frames.pack_chunk(1 << 40, bytes(range(64)) * 9, 2)[0]],
        (ProtocolError,),
    ),
    "from_silo": Target(_from_silo, _messages_up, (DecodeError, Refused)),
    "wish": Target(
        _wish,
        lambda: [convert.wish_to_message(Wish(role="operator", name="anna", seconds=1.5)).SerializeToString()],
        (DecodeError,),
    ),
    "operator_answer": Target(_operator_answer, _operator_answers, (DecodeError,)),
    "update_header": Target(
        _update_header,
        lambda: [convert.header_to_message(_HEADER, bytes(70)).SerializeToString()],
        (DecodeError, Refused, Busy),
    ),
    "to_silo": Target(_to_silo, _messages_down, (DecodeError, ProtocolError)),
    "layout": Target(
        _layout,
        lambda: [_LAYOUT.to_json().encode(), json.dumps([["a", [], "F64"]]).encode()],
        (ModelError,),
    ),
    "weights_file": Target(_weights_file, _weights_seeds, (ModelError,)),
    "trainer_line": Target(_trainer_line, _lines, (ValueError, TrainerError)),
    "session": Target(
        _session,
        lambda: [_established()[0].seal(1, b"a message"), _established()[0].seal(3, bytes(40_000))],
        (ProtocolError,),
    ),
    "handshake": Target(_handshake, _hellos, (ProtocolError,)),
    "identity": Target(
        _identity,
        lambda: [
            b"gptfl://fed/silo/silo-1",
            b"gptfl://fed/operator/a",
            b"gptfl://fed/coordinator",
            b"gptfl://f%20d/silo/a%2Fb",
        ],
        (IdentityError,),
    ),
    "certificate": Target(_certificate, _certificates, (IdentityError,)),
}
