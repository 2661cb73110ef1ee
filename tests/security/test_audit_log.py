"""The audit log as a file: several processes add to it at once, killed ones leave half a line, the key is guarded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptfl_dist.errors import IdentityError, StorageError
from gptfl_dist.security.audit import Verification, verify
from gptfl_dist.security.audit_log import KEY, LOG, AuditLog, Event, read_log

WRITER = """
import sys
from pathlib import Path
from gptfl_dist.security.audit_log import AuditLog
print("ready", flush=True)
sys.stdin.readline()
for count in range(int(sys.argv[3])):
    AuditLog(Path(sys.argv[1]), durable=False).append("said", who=sys.argv[2], count=count)
    print(count, flush=True)
"""


def found_in(folder: Path) -> Verification:
    return verify(read_log(folder))


def entries(folder: Path, event: str = "said") -> list[dict[str, Any]]:
    return [entry for entry in found_in(folder).entries.values() if entry["event"] == event]


def started(folder: Path, who: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), who, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_write_at_once_make_one_chain_under_one_key(tmp_path: Path) -> None:
    writers = [started(tmp_path, who, 100) for who in "abc"]
    for writer in writers:
        go(writer)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    result = found_in(tmp_path)
    assert result.faults == []
    assert result.signed == result.head.number
    for who in "abc":
        assert [entry["count"] for entry in entries(tmp_path) if entry["who"] == who] == list(range(100))


def test_a_writer_that_is_killed_stops_nobody_and_what_it_told_is_there(tmp_path: Path) -> None:
    with started(tmp_path, "a", 1_000_000) as writer:
        go(writer)
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 20:
            pass
        writer.kill()
        told = int((writer.stdout.read().split() or ["20"])[-1])
    assert writer.returncode == -signal.SIGKILL
    AuditLog(tmp_path).append("said", who="b", count=0)
    assert found_in(tmp_path).faults == []
    counts = [entry["count"] for entry in entries(tmp_path) if entry["who"] == "a"]
    assert counts == list(range(len(counts)))
    assert len(counts) > told


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_half_a_line_is_completed_or_cut_off_by_the_next_who_writes(tmp_path: Path, kept: int) -> None:
    AuditLog(tmp_path).write([Event("said", {"count": n}, signed=False) for n in range(kept - 1)])
    whole = read_log(tmp_path)
    last = whole.splitlines(keepends=True)[-1]
    for left in range(1, len(last)):
        half = whole[: len(whole) - len(last) + left]
        assert verify(half).half_written == left
        (tmp_path / LOG).write_bytes(half)
        AuditLog(tmp_path, durable=False).append("said", count=99)
        assert found_in(tmp_path).faults == []
        missing = left + 1 < len(last)  # more than the end of the line
        assert [entry["bytes"] for entry in entries(tmp_path, "half line cut off")] == [left] * missing
        assert len(entries(tmp_path)) == max(0, kept - 1 - missing) + 1


def test_a_log_and_its_key_are_their_owners_alone_and_are_made_once(tmp_path: Path) -> None:
    AuditLog(tmp_path).append("said", count=1)
    key = (tmp_path / KEY).read_bytes()
    AuditLog(tmp_path).append("said", count=2)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in (LOG, KEY)] == [0o600, 0o600]
    assert (tmp_path / KEY).read_bytes() == key
    first = json.loads((tmp_path / LOG).read_text().splitlines()[0])
    assert first["fingerprint"] == found_in(tmp_path).fingerprint


def test_signatures_come_after_so_many_entries_where_none_is_asked_for(tmp_path: Path) -> None:
    AuditLog(tmp_path).write([Event("said", {"count": n}, signed=False) for n in range(300)])
    result = found_in(tmp_path)
    assert 0 < result.head.number - result.signed < 64
    assert len(entries(tmp_path, "checkpoint")) == result.head.number // 64


def open_to_others(folder: Path) -> str:
    (folder / KEY).chmod(0o640)
    return "others may read this private key"


def lost(folder: Path) -> str:
    (folder / KEY).unlink()
    return "is missing"


def replaced(folder: Path) -> str:
    (folder / "other").mkdir()
    AuditLog(folder / "other").append("said", count=1)
    (folder / "other" / KEY).replace(folder / KEY)
    return "is not the key that signs"


def junk(folder: Path) -> str:
    (folder / KEY).write_bytes(b"junk")
    return "is no key"


@pytest.mark.parametrize("mistake", [open_to_others, lost, replaced, junk])
def test_a_key_that_does_not_belong_to_the_log_is_refused(tmp_path: Path, mistake: Any) -> None:
    AuditLog(tmp_path).append("said", count=1)
    before = read_log(tmp_path)
    expected = mistake(tmp_path)
    with pytest.raises((StorageError, IdentityError), match=expected):
        AuditLog(tmp_path).append("said", count=2)
    assert read_log(tmp_path) == before


@pytest.mark.parametrize("damage", [b"junk\n", b"junk", b"\0" * 20_000, b"\n", b'{"number":1}', b'{"number":2}\n[]\n'])
@pytest.mark.parametrize("before", [0, 1, 200])
def test_behind_a_damaged_end_it_goes_on_and_the_damage_stays_a_fault(
    tmp_path: Path, damage: bytes, before: int
) -> None:
    if before:
        AuditLog(tmp_path).write([Event("said", {"count": n}) for n in range(before)])
    whole = read_log(tmp_path)
    (tmp_path / LOG).write_bytes(whole + damage)
    AuditLog(tmp_path).append("said", count=before)
    AuditLog(tmp_path).append("said", count=before + 1)
    assert read_log(tmp_path).startswith(whole + damage)
    result = found_in(tmp_path)
    assert result.faults[0].line == whole.count(b"\n") + 1
    assert len(entries(tmp_path, "log broken")) == 1
    assert [entry["count"] for entry in entries(tmp_path)] == list(range(before + 2))
    assert result.signed == result.head.number


def test_a_log_in_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"audit\.jsonl"):
        AuditLog(tmp_path / "nowhere").append("said", count=1)
    assert read_log(tmp_path / "nowhere") == b""
