"""What lies on the disk of an update: taken over after a restart, told where it was changed, encrypted if so set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from exchange_world import whole
from inbox_world import GOOD, LAYOUT, ORDER, deliver, header

from gptfl_dist.errors import StorageError
from gptfl_dist.exchange.inbox import Inbox, Spool
from gptfl_dist.weights import Codec, Layout
from gptfl_dist.weights.sealed import use_key


def test_the_committed_update_of_an_interrupted_run_is_taken_over(inbox, tmp_path, commits):
    deliver(inbox)
    inbox.close()
    again = Inbox(tmp_path / "spools", LAYOUT, {"alice": 100}, lambda *commit: commits.append(commit))
    assert again.expect_committed("alice", ORDER, header().digest)
    assert again.announce("alice", header()) == (LAYOUT.nbytes, True)
    assert whole(again.updates(("alice",))["alice"]) == GOOD
    assert len(commits) == 1
    again.close()


def test_a_spool_that_changed_on_disk_is_not_taken_over(inbox, tmp_path):
    deliver(inbox)
    inbox.close()
    path = tmp_path / "spools" / "alice.spool"
    path.write_bytes(GOOD[:-1] + b"\x01")
    again = Inbox(tmp_path / "spools", LAYOUT, {"alice": 100}, lambda *commit: None)
    assert not again.expect_committed("alice", ORDER, header().digest)
    path.unlink()
    again.close()
    fresh = Inbox(tmp_path / "spools", LAYOUT, {"alice": 100}, lambda *commit: None)
    assert not fresh.expect_committed("alice", ORDER, header().digest)
    fresh.expect("alice", ORDER)
    deliver(fresh)
    fresh.close()


def test_a_spool_has_its_size_from_the_start_and_says_when_it_was_cut(tmp_path):
    spool = Spool(tmp_path / "a" / "x.spool", Layout.of([("w", (25_000,), "F32")]), Codec("none"))
    assert (tmp_path / "a" / "x.spool").stat().st_size == 100_000
    os.truncate(tmp_path / "a" / "x.spool", 10)
    with pytest.raises(StorageError, match="ends at byte 10"):
        whole(spool)
    spool.close()


def test_a_disk_without_room_is_told_and_leaves_no_descriptor(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StorageError):
        Spool(tmp_path / "x.spool", Layout.of([("w", (2**60,), "F32")]), Codec("none"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def at_rest():
    use_key(bytes(32))
    yield
    use_key(None)


def test_a_committed_update_that_was_changed_in_its_encrypted_spool_is_asked_for_again(at_rest, inbox, tmp_path):
    deliver(inbox)
    path = tmp_path / "spools" / "alice.spool"
    kept = path.read_bytes()
    assert GOOD[8:24] not in kept

    def taken_over(content: bytes) -> bool:
        path.write_bytes(content)
        again = Inbox(tmp_path / "spools", LAYOUT, {"alice": 100}, lambda *_: None)
        try:
            return again.expect_committed("alice", ORDER, blake3(GOOD).hexdigest())
        finally:
            again.close()

    assert taken_over(kept)
    assert not taken_over(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert not taken_over(GOOD)  # as it lay there before at_rest was set
    assert not taken_over(b"")


def test_an_encrypted_spool_is_written_over_by_the_next_update_and_resumed_like_any_other(at_rest, inbox, commits):
    deliver(inbox)
    second = bytes(8) + np.linspace(-2, 2, 16, dtype="<f4").tobytes()
    inbox.expect("alice", ORDER)
    inbox.announce("alice", header(second))
    spool = inbox.spool("alice", "nonce-1")
    spool.write(spool.claim(), 0, memoryview(second[:40]))
    assert inbox.announce("alice", header(second)) == (40, False)  # the connection broke
    spool.write(spool.claim(), 40, memoryview(second[40:]))
    inbox.finish("alice", "nonce-1")
    assert whole(inbox._spools["alice"]) == second
    assert len(commits) == 2
