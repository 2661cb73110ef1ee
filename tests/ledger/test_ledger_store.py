"""The record is what was written last, whoever was killed; another run, another coordinator and damage are refused."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from gptfl_dist.aggregation.diversity import Diversity
from gptfl_dist.errors import ConfigError, StorageError
from gptfl_dist.learning.measures import Measures
from gptfl_dist.ledger.reader import read
from gptfl_dist.ledger.records import CountedUpdate
from gptfl_dist.ledger.store import Ledger, first_difference
from gptfl_dist.weights import Layout, WeightsFile

REQUEST = json.dumps({"name": "x", "training": {"epochs": 1}, "silos": ["a", "b"]})
LAYOUT = Layout.of([("w", (3,), "F32")])

WRITER = """
import sys
from pathlib import Path
from gptfl_dist.ledger.store import Ledger
ledger = Ledger(Path(sys.argv[1]), sys.argv[2])
ledger.begin_arm("gptfl", 0.05, "start")
silos = ["a", "b"]
for round_ in range(1, 1_000_000):
    ledger.open_round("gptfl", round_, "train", f"base{round_}", silos, {s: f"{s}{round_}" for s in silos})
    for silo in silos:
        ledger.commit("gptfl", round_, silo, round_, {"accuracy": 0.5}, f"d{round_}")
    ledger.note_spent("gptfl", round_, 1.0, 2, 3)
    ledger.close_round("gptfl", round_, f"w{round_}", dict.fromkeys(silos, round_))
    print(round_, flush=True)
"""


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "run", REQUEST)
    yield ledger
    ledger.close()


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger(ledger.folder, REQUEST)


def test_a_round_is_read_back_after_reopening(ledger):
    ledger.set_fact("run", "abc")
    ledger.begin_arm("gptfl", 0.05, "start")
    ledger.begin_arm("gptfl", 9.0, "another start")  # is known already
    ledger.open_round("gptfl", 1, "train", "start", ["b", "a"], {"a": "n1", "b": "n2", "c": "n3"})
    ledger.commit("gptfl", 1, "a", 30, {"accuracy": 0.5}, "da")
    ledger.fail("gptfl", 1, "b", "out of memory")
    ledger.commit("gptfl", 1, "c", 10, {"accuracy": 0.9, "loss": 2.0}, "dc")
    ledger.note_spent("gptfl", 1, 2.5, 100, 200)
    ledger.close_round("gptfl", 1, "w1", {"a": 1, "c": 1}, Diversity(2, 0.75, None, 1.5, 2.0))
    ledger.note_tested("gptfl", 1, Measures(0.75, 0.5, 0.1, math.nan))
    ledger.note_tested("gptfl", 0, Measures(0.25, 0.2, 0.3, 2.5))
    ledger.open_round("gptfl", 2, "evaluate", "w1", ["a"], {"a": "n4"})
    ledger = reopened(ledger)
    try:
        assert ledger.fact("run") == "abc"
        assert ledger.fact("unknown") is None
        assert ledger.arms() == ["gptfl"]
        arm = ledger.arm("gptfl")
        assert arm is not None
        assert (arm.learning_rate, arm.start, arm.finished, arm.best_round) == (0.05, "start", False, None)
        assert (arm.final, arm.finished_rounds, arm.weights_of(0), arm.weights_of(1)) == ("w1", 1, "start", "w1")
        first, second = arm.rounds
        assert first.cohort == ("b", "a")
        assert (first.weights, first.seconds, first.bytes_down, first.bytes_up) == ("w1", 2.5, 100, 200)
        assert arm.start_tested == Measures(0.25, 0.2, 0.3, 2.5)
        assert first.tested is not None
        assert first.tested.accuracy == 0.75
        assert math.isnan(first.tested.loss)
        assert first.diversity == Diversity(2, 0.75, None, 1.5, 2.0)
        assert first.metric("accuracy") == {"a": 0.5, "c": 0.9}
        assert [(o.silo, o.nonce, o.samples, o.digest, o.failure) for o in first.orders] == [
            ("a", "n1", 30, "da", None),
            ("b", "n2", None, None, "out of memory"),
            ("c", "n3", 10, "dc", None),
        ]
        assert first.mean_metric("accuracy") == pytest.approx((30 * 0.5 + 10 * 0.9) / 40)
        assert first.mean_metric("loss") == 2.0
        assert first.mean_metric("seconds") is None
        assert (second.kind, second.weights, second.orders[0].samples) == ("evaluate", None, None)
        assert (second.tested, second.diversity) == (None, None)
        ledger.finish_arm("gptfl", 1)
        finished = ledger.arm("gptfl")
        assert finished is not None
        assert (finished.finished, finished.best_round) == (True, 1)
        assert ledger.arm("other") is None
    finally:
        ledger.close()


def test_an_answer_after_a_failure_counts_and_a_round_opened_again_starts_anew(ledger):
    ledger.begin_arm("gptfl", 0.05, "start")
    ledger.open_round("gptfl", 1, "train", "start", ["a"], {"a": "n1"})
    ledger.fail("gptfl", 1, "a", "slow")
    ledger.commit("gptfl", 1, "a", 5, {}, "d")
    assert ledger.arm("gptfl").rounds[0].orders[0].failure is None
    ledger.open_round("gptfl", 1, "train", "start", ["b"], {"b": "n9"})
    (again,) = ledger.arm("gptfl").rounds
    assert [(o.silo, o.nonce, o.samples) for o in again.orders] == [("b", "n9", None)]


def test_a_killed_coordinator_leaves_a_whole_record(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), REQUEST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = 0
        while told < 20:
            told = int(writer.stdout.readline())
        writer.kill()
        told = int((writer.stdout.read().split() or [told])[-1])
    assert writer.returncode == -signal.SIGKILL
    ledger = Ledger(tmp_path / "run", REQUEST)  # the lock went with the process
    try:
        arm = ledger.arm("gptfl")
        assert arm is not None
        assert told <= arm.finished_rounds <= told + 1
        assert [r.round for r in arm.rounds] == list(range(1, len(arm.rounds) + 1))
        for record in arm.rounds[: arm.finished_rounds]:
            assert record.weights == f"w{record.round}"
            assert [(o.silo, o.samples, o.digest) for o in record.orders] == [
                (silo, record.round, f"d{record.round}") for silo in "ab"
            ]
        assert all([o.silo for o in r.orders] == ["a", "b"] for r in arm.rounds)  # a round comes with its orders
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"name": "x", "training": {"epochs": 2}, "silos": ["a", "b"]}, "training.epochs was 1, now 2"),
        ({"name": "x", "training": {"epochs": 1}, "silos": ["a"]}, r'silos was \["a", "b"\], now \["a"\]'),
        ({"name": "x", "training": {"epochs": 1}, "silos": ["a", "b"], "seed": 1}, "seed was null, now 1"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_the_setting_named(ledger, now, said):
    ledger.set_fact("kept", "yes")
    ledger.close()
    with pytest.raises(ConfigError, match=said):
        Ledger(ledger.folder, json.dumps(now))
    same = Ledger(ledger.folder, REQUEST)
    assert same.fact("kept") == "yes"
    same.close()


def test_a_second_coordinator_on_the_folder_is_refused(ledger):
    with pytest.raises(StorageError, match="another coordinator is at work"):
        Ledger(ledger.folder, REQUEST)
    assert ledger.fact("request") == REQUEST


@pytest.mark.parametrize("damage", ["junk", "middle"])
def test_a_damaged_record_is_named_and_what_to_do_said(ledger, damage):
    ledger.begin_arm("gptfl", 0.05, "start")
    for round_ in range(1, 200):
        ledger.open_round("gptfl", round_, "train", "b" * 64, ["a"], {"a": "n" * 32})
    ledger.close()
    path = ledger.folder / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    if damage == "junk":
        content[:] = b"not a database" * 1000
    else:
        content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"ledger\.sqlite: the record is damaged") as error:
        Ledger(ledger.folder, REQUEST).arm("gptfl")
    assert "--fresh" in error.value.hint


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="run"):
        Ledger(tmp_path / "file" / "run", REQUEST)


def test_a_full_disk_is_told_and_nothing_half_done(ledger):
    ledger.begin_arm("gptfl", 0.05, "start")
    pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
    ledger._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then reports a full disk
    silos = {f"silo-{i}": "n" * 32 for i in range(5000)}
    with pytest.raises(StorageError, match="full"):
        ledger.open_round("gptfl", 1, "train", "start", silos, silos)
    assert ledger.arm("gptfl").rounds == ()


def test_seconds_add_up_over_interruptions_and_threads(ledger):
    def add() -> None:
        for _ in range(25):
            ledger.add_seconds("gptfl", 0.25)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = reopened(ledger)
    ledger.add_seconds("generate", 1.5)
    assert ledger.seconds() == {"gptfl": 25.0, "generate": 1.5}
    ledger.close()


def test_answers_committed_from_many_threads_all_count(ledger):
    silos = [f"s{i:02}" for i in range(24)]
    ledger.begin_arm("gptfl", 0.05, "start")
    ledger.open_round("gptfl", 1, "train", "start", silos, {s: f"n-{s}" for s in silos})
    threads = [
        threading.Thread(target=ledger.commit, args=("gptfl", 1, s, i + 1, {"loss": float(i)}, f"d-{s}"))
        for i, s in enumerate(silos)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (record,) = ledger.arm("gptfl").rounds
    assert [(o.silo, o.samples, o.digest, o.metrics) for o in record.orders] == [
        (s, i + 1, f"d-{s}", {"loss": float(i)}) for i, s in enumerate(silos)
    ]


def test_weights_lie_under_their_digest_and_the_unneeded_go(ledger):
    kept = ledger.add_weights(LAYOUT, [b"\0" * 12])
    gone = ledger.add_weights(LAYOUT, [b"\1" * 12])
    with WeightsFile(ledger.weights_path(kept)) as file:
        assert file.digest() == kept
        assert file.read(0, 12) == b"\0" * 12
    ledger.drop_weights_except([kept, "ab" * 32])
    assert [p.name for p in (ledger.folder / "weights").glob("*.safetensors")] == [f"{kept}.safetensors"]
    assert not ledger.weights_path(gone).exists()


def test_weights_are_written_over_those_that_were_dropped(ledger):
    def files():
        return {path.stat().st_ino for path in (ledger.folder / "weights").iterdir()}

    long = Layout.of([("w", (1000,), "F32")])
    dropped = [ledger.add_weights(long, [bytes([number]) * 4000]) for number in range(3)]
    ledger.drop_weights_except([])
    left = files()
    assert len(left) == 1  # however many were dropped
    assert not any(ledger.weights_path(digest).exists() for digest in dropped)
    digest = ledger.add_weights(LAYOUT, [b"\7" * 12])
    assert files() == left
    with WeightsFile(ledger.weights_path(digest)) as file:
        assert file.digest() == digest  # and nothing of the longer file is behind it
    ledger.drop_weights_except([])
    ledger.close()
    assert not files()


def test_what_a_killed_process_had_half_written_goes_at_the_next_start(ledger):
    part = ledger.folder / "weights" / ".incoming.safetensors.4711.part"
    part.write_bytes(b"half")
    reopened(ledger).close()
    assert not part.exists()


def test_only_the_owner_can_read_the_record(ledger):
    ledger.set_fact("run", "abc")
    files = list(ledger.folder.glob("ledger.sqlite*"))
    assert len(files) == 3  # with the write-ahead log and its index
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_an_update_counts_in_the_round_that_was_closed_with_it_whenever_it_was_ordered(ledger):
    ledger.begin_arm("gptfl", 0.05, "start")
    ledger.open_round("gptfl", 1, "train", "start", ["a", "b"], {"a": "n1", "b": "n2"})
    ledger.enlist("gptfl", 1, ["a", "b", "c"], {"c": "n3"})
    for silo in "ac":
        ledger.commit("gptfl", 1, silo, 10, {"accuracy": 0.5}, f"d-{silo}")
    ledger.close_round("gptfl", 1, "w1", {"a": 1})
    ledger.open_round("gptfl", 2, "train", "w1", ["a"], {"a": "n4"})
    ledger = reopened(ledger)
    arm = ledger.arm("gptfl")
    assert arm.rounds[0].cohort == ("a", "b", "c")
    assert [(r.round, o.silo, o.digest) for r, o in arm.pending] == [(1, "b", None), (1, "c", "d-c"), (2, "a", None)]
    ledger.fail("gptfl", 1, "b", "too old")
    ledger.commit("gptfl", 2, "a", 20, {}, "d-a")
    ledger.close_round("gptfl", 2, "w2", {"a": 2, "c": 1})
    arm = ledger.arm("gptfl")
    assert arm.pending == []
    assert [r.updates for r in arm.rounds] == [
        (CountedUpdate("a", 10, 0),),
        (CountedUpdate("a", 20, 0), CountedUpdate("c", 10, 1)),
    ]
    ledger.close()


def test_a_record_of_another_release_is_refused(ledger):
    ledger.close()
    with closing(sqlite3.connect(ledger.folder / "ledger.sqlite")) as database:
        database.execute("DROP TRIGGER round_committed")
        database.execute("ALTER TABLE orders DROP COLUMN counted")
        database.execute("PRAGMA user_version = 0")
    with pytest.raises(StorageError, match="made by another release") as error:
        Ledger(ledger.folder, REQUEST)
    assert "--fresh" in error.value.hint
    with pytest.raises(StorageError, match="made by another release"):
        read(ledger.folder, lambda reader: reader.arms())


def test_weights_that_a_backup_holds_are_not_written_over(ledger, tmp_path):
    digest = ledger.add_weights(LAYOUT, [bytes(LAYOUT.nbytes)])
    held = tmp_path / "held.safetensors"
    held.hardlink_to(ledger.weights_path(digest))
    before = held.read_bytes()
    ledger.drop_weights_except([])
    ledger.add_weights(LAYOUT, [b"\1" * LAYOUT.nbytes])
    assert held.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}, "a.b was 1, now 3"),
        ({"silos": [{"max": 1}, {"max": 2}]}, {"silos": [{"max": 1}, {"max": 3}]}, "silos[1].max was 2, now 3"),
        ({"arms": ["x"]}, {"arms": ["x", "y"]}, 'arms was ["x"], now ["x", "y"]'),
        ({"a": None}, {"a": {"b": 1}}, 'a was null, now {"b": 1}'),
    ],
)
def test_the_first_setting_that_differs_is_named(old: object, new: object, told: str) -> None:
    assert first_difference(json.dumps(old), json.dumps(new)) == told
