"""An order, a good update that answers it, and how a silo sends one to the inbox."""

from __future__ import annotations

import dataclasses

import numpy as np
from blake3 import blake3

from gptfl_dist.exchange.base import UpdateHeader
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.weights import Layout

LAYOUT = Layout.of([("w", (16,), "F32"), ("n", (1,), "I64")])
BASE = "ab" * 32
ORDER = Order("train", "nonce-1", "gptfl", 1, BASE, 60.0)
GOOD = bytes(8) + np.linspace(-1, 1, 16, dtype="<f4").tobytes()


def header(content: bytes = GOOD, **changes: object) -> UpdateHeader:
    report = Report("nonce-1", 10, {"loss": 0.5})
    good = UpdateHeader(report, BASE, LAYOUT.digest, blake3(content).hexdigest(), LAYOUT.nbytes)
    return dataclasses.replace(good, **changes)


def send(inbox: Inbox, content: bytes = GOOD, silo: str = "alice", nonce: str = "nonce-1", start: int = 0) -> None:
    spool = inbox.spool(silo, nonce)
    ticket = spool.claim()
    for offset in range(start, len(content), 24):
        spool.write(ticket, offset, memoryview(content[offset : offset + 24]))


def deliver(inbox: Inbox, content: bytes = GOOD) -> None:
    assert inbox.announce("alice", header(content)) == (0, False)
    send(inbox, content)
    inbox.finish("alice", "nonce-1")
