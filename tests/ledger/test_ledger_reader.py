"""The record is read beside a writer and after its end, from folders that cannot be written too; requests reach it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_ledger_store import REQUEST, WRITER

from gptfl_dist.errors import ConfigError, StorageError
from gptfl_dist.ledger.lock import at_work, locked
from gptfl_dist.ledger.reader import read
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.ledger.requests import (
    abort_asked,
    ask_to_abort,
    ask_to_pause,
    ask_to_resume,
    paused_since,
)
from gptfl_dist.ledger.store import Ledger


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def arm_of(folder: Path) -> ArmRecord | None:
    return read(folder, lambda ledger: ledger.arm("gptfl"))


def test_what_is_read_beside_a_writer_belongs_to_one_instant_and_the_writer_goes_on(folder: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(folder), REQUEST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) == 1
        seen = 0
        for _ in range(40):
            assert at_work(folder)
            arm = arm_of(folder)
            assert arm is not None
            assert arm.finished_rounds >= seen
            seen = arm.finished_rounds
            # No round is closed whose updates were not all there, and none stands without its orders.
            for record in arm.rounds:
                assert [order.silo for order in record.orders] == ["a", "b"]
                assert record.weights is None or all(order.digest for order in record.orders)
            writer.stdout.readline()
        assert writer.poll() is None
        writer.kill()
        told = int((writer.stdout.read().split() or ["0"])[-1])
    assert not at_work(folder)
    arm = arm_of(folder)  # its log was never written back into the database
    assert arm is not None
    assert arm.finished_rounds >= told
    assert (folder / "ledger.sqlite-wal").exists()
    Ledger(folder, REQUEST).close()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_record_in_a_folder_that_cannot_be_written_is_read_and_no_file_is_left_there(folder: Path, end: str) -> None:
    if end == "closed":
        ledger = Ledger(folder, REQUEST)
        ledger.begin_arm("gptfl", 0.5, "start")
        ledger.close()
    else:
        program = WRITER.replace("print(", "import os; os.kill(os.getpid(), 9); print(")
        killed = subprocess.run([sys.executable, "-c", program, str(folder), REQUEST], check=False)
        assert killed.returncode == -signal.SIGKILL
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o500 if path.is_dir() else 0o400)
    folder.chmod(0o500)
    program = (
        "import sys; from pathlib import Path; from gptfl_dist.ledger.reader import read\n"
        "from gptfl_dist.ledger.lock import at_work\n"
        "print(at_work(Path(sys.argv[1])), read(Path(sys.argv[1]), lambda ledger: len(ledger.arm('gptfl').rounds)))"
    )
    # Root may write anywhere, unless it gives that up.
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", program, str(folder)], check=False, capture_output=True, text=True
    )
    folder.chmod(0o700)
    assert done.stdout.split() == ["None", "0" if end == "closed" else "1"], done.stderr
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before


def test_a_folder_without_a_run_or_with_one_that_is_just_being_made_has_nothing_to_read(folder: Path) -> None:
    assert arm_of(folder) is None
    assert not at_work(folder)
    folder.mkdir()
    sqlite3.connect(folder / "ledger.sqlite").close()
    assert arm_of(folder) is None
    for ask in (ask_to_pause, ask_to_resume):
        with pytest.raises(ConfigError, match="no run was started here"):
            ask(folder / "elsewhere")


def test_a_damaged_record_is_told_as_such(folder: Path) -> None:
    Ledger(folder, REQUEST).close()
    (folder / "ledger.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(StorageError, match="the record is damaged"):
        arm_of(folder)


def test_looking_whether_a_coordinator_is_at_work_keeps_none_from_starting(folder: Path) -> None:
    Ledger(folder, REQUEST).close()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            at_work(folder)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(30):
            with locked(folder) as life:
                assert at_work(folder) == life
    finally:
        over.set()
        looker.join()


def test_requests_reach_the_coordinator_at_work_and_those_that_start_later(folder: Path) -> None:
    ledger = Ledger(folder, REQUEST)
    assert paused_since(ledger) is None
    ask_to_pause(folder)
    since = paused_since(ledger)
    assert since is not None
    ask_to_pause(folder)
    assert paused_since(ledger) == since
    ask_to_resume(folder)
    ask_to_resume(folder)
    assert paused_since(ledger) is None
    ledger.close()
    ask_to_pause(folder)
    ask_to_abort(folder, "wrong labels")
    ask_to_abort(folder, "another reason")
    with contextlib.closing(Ledger(folder, REQUEST)) as ledger:
        assert paused_since(ledger) is not None
        wish = abort_asked(ledger)
    assert wish is not None
    assert wish.reason == "wrong labels"  # the first stands
    assert read(folder, abort_asked) == wish


def test_a_request_of_somebody_who_may_not_write_the_record_says_so(folder: Path) -> None:
    Ledger(folder, REQUEST).close()
    (folder / "ledger.sqlite").unlink()
    (folder / "ledger.sqlite").mkdir()  # as good as unreadable, for root too
    with pytest.raises(StorageError, match="as the user who runs the coordinator"):
        ask_to_pause(folder)
