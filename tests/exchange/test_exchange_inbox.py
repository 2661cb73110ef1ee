"""What an update must be to count, and that nothing a silo does changes what was checked."""

from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest
from exchange_world import whole
from inbox_world import GOOD, LAYOUT, ORDER, deliver, header, send

from gptfl_dist.errors import StorageError
from gptfl_dist.exchange.inbox import Busy, Inbox, Refused, Spool, Superseded
from gptfl_dist.federation.orders import Report
from gptfl_dist.weights import Codec


def test_an_update_longer_than_the_bound_is_refused(inbox, commits):
    inbox.max_norm = 2.0
    with pytest.raises(Refused, match=r"norm is 2\.4\d*, federation\.max_update_norm allows 2"):
        deliver(inbox)
    assert commits == []
    inbox.max_norm = 2.5
    deliver(inbox)
    assert len(commits) == 1


def test_a_good_update_is_committed_and_handed_to_the_aggregation(inbox, commits):
    deliver(inbox)
    assert commits == [("alice", ORDER, header().report, header().digest)]
    assert whole(inbox.updates(("alice",))["alice"]) == GOOD
    assert (inbox.folder / "alice.spool").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"report": Report("nonce-2", 10)}, "answers no order"),
        ({"report": Report("", 10)}, "answers no order"),
        ({"base": "cd" * 32}, "trained from the weights cdcd"),
        ({"layout": "00" * 32}, "model is defined or encoded differently"),
        ({"size": LAYOUT.nbytes + 1}, f"announces {LAYOUT.nbytes + 1} bytes"),
        ({"size": 2**63}, "announces"),
        ({"report": Report("nonce-1", 0)}, "claims 0 samples, expected 1 to 100"),
        ({"report": Report("nonce-1", 101)}, "claims 101 samples, expected 1 to 100"),
        ({"report": Report("nonce-1", 2**64 - 1)}, "claims"),
        ({"report": Report("nonce-1", 9, {"loss": math.nan})}, "'loss' = nan"),
        ({"report": Report("nonce-1", 9, {"loss": -math.inf})}, "'loss' = -inf"),
        ({"report": Report("nonce-1", 9, {"Loss": 1.0})}, "'Loss'"),
        ({"report": Report("nonce-1", 9, {"": 1.0})}, "plain name"),
        ({"report": Report("nonce-1", 9, {"a\n": 1.0})}, "plain name"),
        ({"report": Report("nonce-1", 9, {"<b>": 1.0})}, "plain name"),
        ({"report": Report("nonce-1", 9, {"a" * 64: 1.0})}, "plain name"),
        ({"report": Report("nonce-1", 9, {"loss": 1e300})}, "sensible size"),
        ({"report": Report("nonce-1", 9, {"accuracy": 1.5})}, "claims an accuracy of 1.5"),
        ({"report": Report("nonce-1", 9, {f"m{i}": 1.0 for i in range(65)})}, "sends 65 metrics, expected at most 64"),
    ],
)
def test_a_wrong_announcement_is_refused_before_any_byte(inbox, commits, changes, said):
    with pytest.raises(Refused, match=said):
        inbox.announce("alice", header(**changes))
    with pytest.raises(Refused, match="no such update"):
        inbox.spool("alice", "nonce-1")
    assert not (inbox.folder / "alice.spool").exists()
    deliver(inbox)  # the order is still open
    assert len(commits) == 1


def test_another_silos_order_and_maximum_do_not_hold(inbox):
    with pytest.raises(Refused, match="answers no order"):
        inbox.announce("bob", header())
    inbox.expect("bob", ORDER)
    with pytest.raises(Refused, match="claims 10 samples, expected 1 to 5"):
        inbox.announce("bob", header())


def test_an_evaluation_is_no_training(inbox, commits):
    with pytest.raises(Refused, match="the order was to train"):
        inbox.accept("alice", Report("nonce-1", 10))
    order = dataclasses.replace(ORDER, kind="evaluate")
    inbox.expect("alice", order)
    with pytest.raises(Refused, match="the order was to evaluate"):
        inbox.announce("alice", header())
    report = Report("nonce-1", 0, {"accuracy": 1.0})
    inbox.accept("alice", report)
    inbox.accept("alice", report)
    assert commits == [("alice", order, report, "")]


def test_gaps_overlaps_and_too_many_bytes_are_refused(inbox):
    inbox.announce("alice", header())
    spool = inbox.spool("alice", "nonce-1")
    ticket = spool.claim()
    spool.write(ticket, 0, memoryview(GOOD[:10]))
    for offset, data in ((11, b"x"), (9, b"x"), (0, b"x"), (10, bytes(LAYOUT.nbytes - 9)), (2**64 - 1, b"x")):
        with pytest.raises(Refused, match="expected from 10"):
            spool.write(ticket, offset, memoryview(data))
    spool.write(ticket, 10, memoryview(GOOD[10:]))
    with pytest.raises(Refused, match=f"expected from {LAYOUT.nbytes}"):
        spool.write(ticket, LAYOUT.nbytes, memoryview(b"x"))
    inbox.finish("alice", "nonce-1")


def test_an_update_that_is_not_whole_is_refused(inbox, commits):
    inbox.announce("alice", header())
    send(inbox, GOOD[:-1])
    with pytest.raises(Refused, match=f"ended after {LAYOUT.nbytes - 1} of {LAYOUT.nbytes} bytes"):
        inbox.finish("alice", "nonce-1")
    assert commits == []


def test_other_content_than_announced_is_refused_and_can_be_sent_anew(inbox, commits):
    inbox.announce("alice", header())
    send(inbox, GOOD[:-1] + b"\x01")
    with pytest.raises(Refused, match="do not have the announced digest"):
        inbox.finish("alice", "nonce-1")
    assert commits == []
    deliver(inbox)
    assert len(commits) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_with_a_number_that_is_none_is_refused(inbox, commits, value):
    bad = GOOD[:-4] + np.array([value], "<f4").tobytes()
    with pytest.raises(Refused, match="NaN or infinite"):
        deliver(inbox, bad)
    assert commits == []


def test_a_second_copy_of_a_committed_update_changes_nothing(inbox, commits):
    deliver(inbox)
    assert inbox.announce("alice", header()) == (LAYOUT.nbytes, True)
    other = bytes(LAYOUT.nbytes)
    assert inbox.announce("alice", header(other)) == (LAYOUT.nbytes, True)  # nothing is left to send
    with pytest.raises(Refused, match="no such update"):
        inbox.spool("alice", "nonce-1")
    with pytest.raises(Refused, match="no such update"):
        inbox.finish("alice", "nonce-1")
    assert len(commits) == 1
    assert whole(inbox.updates(("alice",))["alice"]) == GOOD


def test_a_broken_upload_goes_on_where_it_stopped(inbox, commits):
    inbox.announce("alice", header())
    send(inbox, GOOD[:31])
    assert inbox.announce("alice", header()) == (31, False)
    send(inbox, GOOD, start=31)
    inbox.finish("alice", "nonce-1")
    assert len(commits) == 1


def test_another_update_for_the_same_order_starts_at_its_first_byte(inbox, commits):
    inbox.announce("alice", header(bytes(LAYOUT.nbytes)))
    send(inbox, bytes(31))
    deliver(inbox)
    assert commits[0][3] == header().digest


def test_a_writer_from_before_a_reconnection_cannot_write(inbox):
    inbox.announce("alice", header())
    spool = inbox.spool("alice", "nonce-1")
    old = spool.claim()
    spool.write(old, 0, memoryview(GOOD[:10]))
    assert inbox.announce("alice", header()) == (10, False)
    # Bytes of the old connection that are still under way must not move the place that the silo was told.
    with pytest.raises(Superseded):
        spool.write(old, 10, memoryview(GOOD[10:20]))
    new = spool.claim()
    spool.write(new, 10, memoryview(GOOD[10:]))
    newer = spool.claim()
    assert newer != new
    with pytest.raises(Superseded):
        spool.write(new, LAYOUT.nbytes, memoryview(b"x"))


def test_a_withdrawn_order_takes_nothing_more(inbox, commits):
    inbox.announce("alice", header())
    send(inbox)
    inbox.withdraw("alice")
    inbox.withdraw("alice")
    with pytest.raises(Refused, match="no such update"):
        inbox.finish("alice", "nonce-1")
    with pytest.raises(Refused, match="answers no order"):
        inbox.announce("alice", header())
    with pytest.raises(Refused, match="answers no order"):
        inbox.accept("alice", Report("nonce-1", 1))
    assert commits == []


def test_an_order_fails_once_and_only_while_it_is_open(inbox):
    assert inbox.awaits("alice", "nonce-1")
    assert not inbox.awaits("alice", "nonce-2")
    assert not inbox.awaits("bob", "nonce-1")
    assert not inbox.fail("alice", "nonce-2")
    assert inbox.fail("alice", "nonce-1")
    assert not inbox.fail("alice", "nonce-1")
    inbox.expect("alice", ORDER)
    deliver(inbox)
    assert not inbox.awaits("alice", "nonce-1")
    assert not inbox.fail("alice", "nonce-1")
    assert inbox.updates(("alice",))


class Gate:
    """Holds a check back until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        check = Spool.norm

        def held(spool):
            found = check(spool)
            self.reached.set()
            assert self.opened.wait(20)
            return found

        monkeypatch.setattr(Spool, "norm", held)


class Checking:
    """`finish` in a thread of its own."""

    def __init__(self, inbox: Inbox) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(inbox,))
        self._thread.start()

    def _run(self, inbox: Inbox) -> None:
        try:
            inbox.finish("alice", "nonce-1")
        except Exception as error:
            self.error = error

    def result(self) -> BaseException | None:
        self._thread.join()
        return self.error


def test_what_is_being_checked_cannot_be_overwritten(inbox, commits, monkeypatch):
    gate = Gate(monkeypatch)
    inbox.announce("alice", header())
    send(inbox)
    check = Checking(inbox)
    assert gate.reached.wait(20)
    for content in (GOOD, b"\xff" * LAYOUT.nbytes):
        with pytest.raises(Busy):
            inbox.announce("alice", header(content))
    with pytest.raises(Busy):
        inbox.finish("alice", "nonce-1")
    spool = inbox.spool("alice", "nonce-1")
    with pytest.raises(Refused):
        spool.write(spool.claim(), 0, memoryview(b"\xff" * 8))
    gate.opened.set()
    assert check.result() is None
    assert len(commits) == 1
    assert whole(inbox.updates(("alice",))["alice"]) == GOOD


def test_an_order_withdrawn_during_the_check_is_not_committed(inbox, commits, monkeypatch):
    gate = Gate(monkeypatch)
    inbox.announce("alice", header())
    send(inbox)
    check = Checking(inbox)
    assert gate.reached.wait(20)
    inbox.withdraw("alice")
    gate.opened.set()
    assert "withdrawn" in str(check.result())
    assert commits == []


@pytest.mark.parametrize("content", [GOOD, GOOD[:-4] + np.array([math.nan], "<f4").tobytes()])
def test_a_check_that_comes_too_late_leaves_the_next_rounds_upload_alone(inbox, commits, monkeypatch, content):
    gate = Gate(monkeypatch)
    inbox.announce("alice", header(content))
    send(inbox, content)
    check = Checking(inbox)
    assert gate.reached.wait(20)
    inbox.withdraw("alice")
    following = dataclasses.replace(ORDER, nonce="nonce-2", round=2)
    inbox.expect("alice", following)
    next_header = header(report=Report("nonce-2", 10))
    assert inbox.announce("alice", next_header) == (0, False)
    spool = inbox.spool("alice", "nonce-2")
    ticket = spool.claim()
    spool.write(ticket, 0, memoryview(GOOD[:20]))
    gate.opened.set()
    assert "withdrawn" in str(check.result())
    spool.write(ticket, 20, memoryview(GOOD[20:]))
    inbox.finish("alice", "nonce-2")
    assert [order.round for _, order, _, _ in commits] == [2]


def test_a_ledger_that_cannot_write_leaves_the_update_uncommitted(tmp_path):
    full = [True]

    def commit(*_: object) -> None:
        if full[0]:
            raise StorageError("the disk is full")

    inbox = Inbox(tmp_path, LAYOUT, {"alice": 100}, commit)
    inbox.expect("alice", ORDER)
    with pytest.raises(StorageError):
        deliver(inbox)
    full[0] = False
    assert inbox.announce("alice", header()) == (LAYOUT.nbytes, False)  # nothing is sent twice
    inbox.finish("alice", "nonce-1")
    assert inbox.announce("alice", header()) == (LAYOUT.nbytes, True)
    inbox.close()


@pytest.mark.parametrize(
    ("codec", "content", "said"),
    [
        (Codec("topk", 0.1), np.array([3, 3], "<u2").tobytes() + bytes(8), "places"),
        (Codec("topk", 0.1), np.array([3, 16], "<u2").tobytes() + bytes(8), "places"),
        (Codec("topk", 0.1), np.array([3, 4], "<u2").tobytes() + np.array([1, math.nan], "<f4").tobytes(), "NaN"),
        (Codec("int8"), np.array([math.nan], "<f4").tobytes() + bytes(16), "NaN or infinite"),
        (Codec("int8"), np.array([3e38], "<f4").tobytes() + b"\x7f" * 16, "NaN or infinite"),
        (Codec("fp16"), np.full(16, math.inf, "<f2").tobytes(), "NaN or infinite"),
    ],
)
def test_what_makes_no_sense_once_it_is_decoded_is_refused(tmp_path, commits, codec, content, said):
    inbox = Inbox(tmp_path / "spools", LAYOUT, {"alice": 100}, lambda *commit: commits.append(commit), codec=codec)
    inbox.expect("alice", ORDER)
    content = bytes(8) + content
    layout = codec.layout(LAYOUT)
    inbox.announce("alice", header(content, layout=layout.digest, size=layout.nbytes))
    send(inbox, content)
    with pytest.raises(Refused, match=said):
        inbox.finish("alice", "nonce-1")
    assert commits == []
    inbox.close()
