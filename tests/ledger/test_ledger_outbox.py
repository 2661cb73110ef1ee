"""Whatever changes the ledger leaves its event in the same transaction, whichever process it was, and once."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_ledger_store import REQUEST, WRITER

from gptfl_dist.errors import StorageError
from gptfl_dist.learning.measures import Measures
from gptfl_dist.ledger.reader import read
from gptfl_dist.ledger.records import Signed, Waiting
from gptfl_dist.ledger.requests import ask_to_abort, ask_to_pause, ask_to_resume
from gptfl_dist.ledger.store import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path / "run", REQUEST)) as ledger:
        yield ledger


def told(ledger: Ledger) -> list[tuple[str, dict[str, Any]]]:
    """What was noted since the last call."""
    waiting = ledger.waiting()
    ledger.audit(waiting, 1, "hash")
    return [(one.event, dict(one.fields)) for one in waiting]


def test_a_signed_update_is_told_with_its_signature_and_its_signer_once(ledger: Ledger) -> None:
    ledger.begin_arm("gptfl", 0.5, "start")
    for round_ in (1, 2):
        ledger.open_round("gptfl", round_, "train", "start", ["a"], {"a": f"n{round_}"})
        told(ledger)
        ledger.commit("gptfl", round_, "a", 30, {}, "da", Signed("said", "c2ln", "f0", "PEM"))
        *known, (event, fields) = told(ledger)
        assert known == ([("signer known", {"signer": "f0", "certificate": "PEM"})] if round_ == 1 else [])
        assert event == "update accepted"
        assert (fields["statement"], fields["signature"], fields["signer"]) == ("said", "c2ln", "f0")


def test_each_step_of_a_round_is_told(ledger: Ledger) -> None:
    order = {"arm": "gptfl", "round": 1}
    ledger.begin_arm("gptfl", 0.5, "start")
    ledger.begin_arm("gptfl", 0.5, "start")  # is known already
    ledger.open_round("gptfl", 1, "train", "start", ["a", "b", "c"], {"a": "n1", "b": "n2", "c": "n3"})
    assert told(ledger) == [
        ("arm begun", {"arm": "gptfl", "weights": "start", "learning_rate": 0.5}),
        ("round begun", {**order, "kind": "train", "base": "start", "cohort": ["a", "b", "c"]}),
    ]
    ledger.commit("gptfl", 1, "a", 30, {"accuracy": 0.5}, "da")
    ledger.fail("gptfl", 1, "b", "refused: claims 7 samples")
    ledger.fail("gptfl", 1, "c", "out of memory")
    accepted = {**order, "silo": "a", "base": "start", "digest": "da", "samples": 30, "nonce": "n1"}
    assert told(ledger) == [
        ("update accepted", accepted),
        ("update refused", {**order, "silo": "b", "nonce": "n2", "reason": "refused: claims 7 samples"}),
        ("order failed", {**order, "silo": "c", "nonce": "n3", "reason": "out of memory"}),
    ]
    ledger.forgive("gptfl", 1, "too few")
    ledger.fail("gptfl", 1, "c", "recalled: the deadline has passed")
    ledger.note_spent("gptfl", 1, 1.0, 2, 3)
    ledger.close_round("gptfl", 1, "w1", {"a": 1})
    ledger.note_tested("gptfl", 1, Measures(0.5, 0.5, 0.1, 1.0))
    assert told(ledger) == [
        ("round abandoned", {**order, "reason": "too few"}),
        ("order recalled", {**order, "silo": "c", "nonce": "n3", "reason": "recalled: the deadline has passed"}),
        ("round committed", {**order, "base": "start", "weights": "w1", "updates": {"a": "n1"}}),
    ]
    ledger.open_round("gptfl", 2, "evaluate", "w1", ["a"], {"a": "n4"})
    ledger.commit("gptfl", 2, "a", 30, {"accuracy": 0.5}, "")
    ledger.finish_arm("gptfl", 1)
    ledger.set_fact("anything", "else")
    assert [event for event, _ in told(ledger)] == ["round begun", "evaluation accepted", "arm finished"]
    assert told(ledger) == []


def test_a_late_update_is_told_with_the_round_that_it_counts_in(ledger: Ledger) -> None:
    ledger.begin_arm("gptfl", 0.5, "start")
    for round_, base in ((1, "start"), (2, "w1")):
        ledger.open_round("gptfl", round_, "train", base, ["a", "b"], {"a": f"a{round_}", "b": f"b{round_}"})
        ledger.commit("gptfl", round_, "a", 1, {}, f"da{round_}")
        if round_ == 1:
            ledger.close_round("gptfl", 1, "w1", {"a": 1})
    ledger.commit("gptfl", 1, "b", 1, {}, "db1")
    ledger.close_round("gptfl", 2, "w2", {"a": 2, "b": 1})
    committed = [fields["updates"] for event, fields in told(ledger) if event == "round committed"]
    assert committed == [{"a": "a1"}, {"a": "a2", "b": "b1"}]


def test_what_an_operator_asks_is_told_once_whoever_is_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Ledger(folder, REQUEST).close()
    ask_to_pause(folder)
    with closing(Ledger(folder, REQUEST)) as ledger:
        ask_to_pause(folder)
        ask_to_resume(folder)
        ask_to_resume(folder)
        ask_to_abort(folder, "wrong labels")
        ask_to_abort(folder, "and again")
        assert told(ledger) == [("pause asked", {}), ("resume asked", {}), ("abort asked", {"reason": "wrong labels"})]


def test_what_was_not_written_into_the_ledger_is_not_told(ledger: Ledger) -> None:
    ledger.begin_arm("gptfl", 0.5, "start")
    told(ledger)
    pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
    ledger._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then reports a full disk
    silos = {f"silo-{i}": "n" * 32 for i in range(5000)}
    with pytest.raises(StorageError, match="full"):
        ledger.open_round("gptfl", 1, "train", "start", silos, silos)
    assert told(ledger) == []


def test_an_event_is_kept_until_it_is_known_to_stand_in_the_log(ledger: Ledger) -> None:
    assert ledger.audited is None
    ledger.note("silo connected", {"silo": "ä", "peer": {"address": 'a "quoted" one'}})
    ledger.note("silo disconnected", {"silo": "b"})
    first, second = ledger.waiting()
    assert (first.event, first.fields) == ("silo connected", {"silo": "ä", "peer": {"address": 'a "quoted" one'}})
    assert len(first.token) == 16
    assert first.token != second.token
    ledger.audit([first], 7, "abc")
    assert ledger.waiting() == [second]
    assert ledger.audited == (7, "abc")
    assert read(ledger.folder, lambda reader: (reader.waiting(), reader.audited)) == ([second], (7, "abc"))


def test_after_a_kill_the_events_are_those_that_the_ledger_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), REQUEST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 20:
            pass
        writer.kill()
    with closing(Ledger(tmp_path / "run", REQUEST)) as ledger:
        arm = ledger.arm("gptfl")
        events: list[Waiting] = []
        while waiting := ledger.waiting():
            events += waiting
            ledger.audit(waiting, 1, "hash")
    assert arm is not None
    updates = [(one.fields["round"], one.fields["silo"]) for one in events if one.event == "update accepted"]
    assert updates == [(r.round, o.silo) for r in arm.rounds for o in r.orders if o.digest is not None]
    assert sum(one.event == "round begun" for one in events) == len(arm.rounds)
    assert sum(one.event == "round committed" for one in events) == arm.finished_rounds


def test_a_record_of_before_there_was_an_audit_log_gets_its_outbox(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Ledger(folder, REQUEST).close()
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as database:
        for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute("DROP TABLE outbox")
    with closing(Ledger(folder, REQUEST)) as ledger:
        ledger.begin_arm("gptfl", 0.5, "start")
        assert [event for event, _ in told(ledger)] == ["arm begun"]
        assert json.loads(ledger.fact("request") or "") == json.loads(REQUEST)
