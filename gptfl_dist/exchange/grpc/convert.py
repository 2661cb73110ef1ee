"""Between the messages of `exchange.proto` and the types of the federation. What a peer sent is validated here."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.errors import ModelError, ProtocolError
from gptfl_dist.exchange.base import UpdateHeader, Welcome, Wish
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc import operator_pb2 as operator_pb
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.security.epoch import Epoch
from gptfl_dist.weights import Layout

if TYPE_CHECKING:
    from gptfl_dist.federation.orders import Kind

_NONCE = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it travels in a call's metadata and stands in file names
_TEXT_LIMIT = 4000
_EPOCH_LIMIT = 1 << 20

_KINDS: dict[Kind, pb.Order.Kind] = {"train": pb.Order.TRAIN, "evaluate": pb.Order.EVALUATE}


def legible(text: str) -> str:
    """A peer's own words for a log or a terminal: cut to 4000 characters, without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text[:_TEXT_LIMIT])


def order_to_message(order: Order) -> pb.Order:
    return pb.Order(
        kind=_KINDS[order.kind],
        nonce=order.nonce,
        arm=order.arm,
        round=order.round,
        base=order.base,
        training=order.training.model_dump_json().encode() if order.training else b"",
        seconds=order.seconds,
        follows=order.follows,
        epoch=order.epoch,
    )


def order_from_message(message: pb.Order) -> Order:
    """Raises ProtocolError."""
    kinds = {number: kind for kind, number in _KINDS.items()}
    if message.kind not in kinds:
        raise ProtocolError(f"an order of the unknown kind {message.kind}", hint="update gptfl_dist on this side")
    kind = kinds[message.kind]
    for nonce in (message.nonce, message.follows or message.nonce):
        if not _NONCE.fullmatch(nonce):
            raise ProtocolError(f"an order with the nonce {nonce[:80]!r}, expected letters and digits")
    try:
        training = LocalTraining.model_validate_json(message.training) if kind == "train" else None
    except ValidationError as error:
        raise ProtocolError(f"the order's training settings do not validate: {error}") from None
    return Order(
        kind=kind,
        nonce=message.nonce,
        arm=legible(message.arm),
        round=message.round,
        base=message.base,
        seconds=message.seconds,
        training=training,
        follows=message.follows,
        epoch=message.epoch,
    )


def wish_to_message(wish: Wish) -> operator_pb.Wish:
    return operator_pb.Wish(**asdict(wish))


def wish_from_message(message: operator_pb.Wish) -> Wish:
    """What somebody asks for, in texts that are fit for a log. The certificate request is checked by who signs it."""
    texts = {name: legible(getattr(message, name)) for name in ("file", "role", "name", "serial", "reason", "key")}
    return Wish(**texts, seconds=message.seconds, request=message.request)


def welcome_to_message(welcome: Welcome, version: int, release: str) -> pb.Welcome:
    return pb.Welcome(
        version=version,
        release=release,
        run=welcome.run,
        plan=welcome.plan.model_dump_json().encode(),
        layout=welcome.layout.to_json().encode(),
        epoch=pb.Epoch(**asdict(welcome.epoch)),
    )


def welcome_from_message(message: pb.Welcome) -> Welcome:
    """Raises ProtocolError."""
    try:
        plan = Plan.model_validate_json(message.plan)
        if len(message.epoch.statement) + len(message.epoch.chain) > _EPOCH_LIMIT:
            raise ProtocolError("the coordinator's welcome has an epoch without end")
        epoch = Epoch(**{field.name: getattr(message.epoch, field.name) for field in fields(Epoch)})
        return Welcome(message.run, plan, Layout.from_json(message.layout), epoch)
    except (ValidationError, ModelError) as error:
        raise ProtocolError(f"the coordinator's welcome does not validate: {error}") from None


def report_to_message(report: Report) -> pb.Report:
    return pb.Report(nonce=report.nonce, samples=report.samples, metrics=dict(report.metrics))


def report_from_message(message: pb.Report) -> Report:
    return Report(message.nonce, message.samples, dict(message.metrics))


def header_to_message(header: UpdateHeader, signature: bytes) -> pb.UpdateHeader:
    return pb.UpdateHeader(
        report=report_to_message(header.report),
        base=header.base,
        layout=header.layout,
        digest=header.digest,
        size=header.size,
        epoch=header.epoch,
        signature=signature,
    )


def header_from_message(message: pb.UpdateHeader) -> UpdateHeader:
    report = report_from_message(message.report)
    return UpdateHeader(report, message.base, message.layout, message.digest, message.size, message.epoch)
