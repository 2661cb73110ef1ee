"""An update is read while it still arrives, and whoever reads is told where that comes to nothing."""

from __future__ import annotations

import threading

import pytest
from inbox_world import GOOD, LAYOUT, header

from gptfl_dist.exchange.inbox import Followed, Inbox, Overtaken


def followed(inbox: Inbox) -> Followed:
    found = inbox.arriving(["alice"])
    assert found is not None
    return found["alice"][0]


def test_an_update_is_followed_as_it_arrives(inbox):
    assert inbox.arriving(["alice"]) is None  # not announced yet
    inbox.announce("alice", header())
    update, read = followed(inbox), bytearray(LAYOUT.nbytes)
    first_half_is_there = threading.Event()

    def follow() -> None:
        update.read_into(0, memoryview(read)[:32])
        first_half_is_there.set()
        update.read_into(32, memoryview(read)[32:])

    follower = threading.Thread(target=follow)
    follower.start()
    spool = inbox.spool("alice", "nonce-1")
    ticket = spool.claim()
    spool.write(ticket, 0, memoryview(GOOD)[:31])
    assert not first_half_is_there.wait(0.05)
    spool.write(ticket, 31, memoryview(GOOD)[31:40])
    assert first_half_is_there.wait(20)
    assert follower.is_alive()
    spool.write(ticket, 40, memoryview(GOOD)[40:])
    follower.join(20)
    assert read == GOOD
    inbox.finish("alice", "nonce-1")
    assert update.intact


@pytest.mark.parametrize("ends", ["anew", "stopped"])
def test_whoever_follows_an_upload_that_ends_is_told(inbox, ends):
    inbox.announce("alice", header())
    update = followed(inbox)
    told = []

    def follow() -> None:
        try:
            update.read_into(0, memoryview(bytearray(8)))
        except Overtaken:
            told.append(True)

    follower = threading.Thread(target=follow)
    follower.start()
    if ends == "anew":
        inbox.announce("alice", header(bytes(LAYOUT.nbytes)))
    else:
        update.stop()
    follower.join(20)
    assert told == [True]
    assert update.intact == (ends == "stopped")
