"""Logs: a file that programs read, and stderr for what a person must see."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gptfl_dist.errors import StorageError
from gptfl_dist.observe.logs import configure

log = logging.getLogger("gptfl_dist.observe.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    configure(Path(os.devnull))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_is_json_with_the_extra_fields(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    configure(path)
    log.info("round %d of %s\nis over", 3, "gptfl", extra={"silo": "Klinik Süd", "folder": tmp_path, "round": 3})
    (line,) = lines(path)
    assert set(line) == {"time", "level", "logger", "message", "silo", "folder", "round"}
    assert line["message"] == "round 3 of gptfl\nis over"
    assert (line["level"], line["logger"]) == ("info", "gptfl_dist.observe.test")
    assert (line["silo"], line["folder"], line["round"]) == ("Klinik Süd", str(tmp_path), 3)
    age = datetime.now(UTC) - datetime.fromisoformat(str(line["time"]))
    assert 0 <= age.total_seconds() < 60


def test_an_exception_stands_in_its_line(tmp_path: Path) -> None:
    configure(tmp_path / "run.jsonl")
    try:
        raise ValueError("no such label")
    except ValueError:
        log.exception("the silo was refused")
    (line,) = lines(tmp_path / "run.jsonl")
    assert "ValueError: no such label" in str(line["exception"])


def test_stderr_gets_warnings_as_plain_lines_and_nothing_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(tmp_path / "run.jsonl")
    log.info("quiet")
    log.warning("silo %s is late", "a")
    shown = capsys.readouterr()
    assert shown.err == "WARNING gptfl_dist.observe.test: silo a is late\n"
    assert shown.out == ""
    assert len(lines(tmp_path / "run.jsonl")) == 2


def test_libraries_are_heard_from_warnings_upwards(tmp_path: Path) -> None:
    configure(tmp_path / "run.jsonl")
    log.debug("ours, too fine")
    log.info("ours")
    logging.getLogger("some.library").info("theirs")
    logging.getLogger("some.library").warning("their warning")
    assert [line["message"] for line in lines(tmp_path / "run.jsonl")] == ["ours", "their warning"]


def test_a_second_call_replaces_the_first_and_a_file_is_added_to(tmp_path: Path) -> None:
    for name in ("one", "two", "one"):
        configure(tmp_path / name)
        log.info("to %s", name)
    assert [line["message"] for line in lines(tmp_path / "one")] == ["to one", "to one"]
    assert [line["message"] for line in lines(tmp_path / "two")] == ["to two"]


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=str(tmp_path)):
        configure(tmp_path)


def test_a_log_on_a_full_disk_is_said_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Path("/dev/full"))
    for number in range(3):
        log.info("line %d", number)
    assert capsys.readouterr().err == "/dev/full: the disk is full: the log has gaps\n"
