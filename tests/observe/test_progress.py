"""Progress where there is no terminal: lines that a log can hold; and the estimate of a federation's end."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import textwrap

import pytest

from gptfl_dist.observe.progress import PlainProgress, RoundTable, progress
from gptfl_dist.observe.summary import RoundRecord


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(number: int, seconds: float) -> RoundRecord:
    return RoundRecord(number, seconds, 1_690_000, 845_000, 0.9, 0.91, {"a": 0, "b": 2, "c": 0})


def test_a_short_stage_prints_its_start_and_its_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("synthetic data", 3, "images") as shown:
        for done in (1, 2, 3):
            shown.update(done, "label 3")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "synthetic data: 3 images"
    assert lines[1].startswith("synthetic data: done, 3/3 images in ")
    assert lines[1].endswith("label 3")
    assert len(lines) == 2


def test_a_long_stage_prints_a_line_at_most_every_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainProgress("pretraining", 60, "epochs", out, clock) as shown:
        for done in range(1, 61):
            clock.now += 1
            shown.update(done)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 6 + 1
    assert lines[2] == "pretraining: 20/60 epochs (33 %), about 40 s left"
    assert lines[-1] == "pretraining: done, 60/60 epochs in 1 min 00 s"


def test_a_stage_taken_up_again_is_not_estimated_from_what_it_found_done() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainProgress("synthetic data", 1000, "images", out, clock) as shown:
        shown.update(900)
        clock.now += 20
        shown.update(910)
        assert shown.seconds_left == 180
    assert "910/1000 images (91 %), about 3 min 00 s left" in out.getvalue()


def test_a_stage_that_fails_says_where_it_stopped() -> None:
    out = io.StringIO()
    with contextlib.suppress(OSError), PlainProgress("synthetic data", 10, "images", out) as shown:
        shown.update(4)
        raise OSError("disk full")
    assert "synthetic data: stopped at 4/10 images" in out.getvalue()


def test_the_callback_takes_the_total_of_whoever_calls_it() -> None:
    out = io.StringIO()
    with PlainProgress("evaluation", 1, "batches", out) as shown:
        shown.callback(5, 20)
    assert "5/20 batches" in out.getvalue()


def test_a_stage_of_nothing_ends_well() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainProgress("synthetic data", 0, "images", out, clock) as shown:
        clock.now += 30
        shown.update(0)
    assert "done, 0/0 images" in out.getvalue()


def test_a_round_is_one_line_with_everything_on_it() -> None:
    out = io.StringIO()
    with RoundTable(4, out) as table:
        table.add("gptfl, rate 0.05", 4, record(1, 2.0), wanted=4)
    head, line = out.getvalue().splitlines()
    assert head.split() == ["arm", "round", "received:val.", "new:test", "silos", "down", "up", "time", "left"]
    assert len(head) == len(line)
    for part in ("gptfl, rate 0.05", "1/4", "91.0 %", "90.0 %", "3/4", "1.69 MB", "845 kB", "2.0 s", "6.0 s"):
        assert part in line


def test_no_column_runs_into_the_next_however_long_it_took() -> None:
    out = io.StringIO()
    with RoundTable(2000, out) as table:
        table.add("fedavg_random, rate 0.00001", 1000, record(1000, 3599.0), wanted=4)
    _, line = out.getvalue().splitlines()
    words = "fedavg_random, rate 0.00001 1000/1000 91.0 % 90.0 % 3/4 1.69 MB 845 kB 59 min 59 s"
    assert " ".join(line.split()).startswith(words)


def test_where_updates_may_be_stale_a_column_says_how_many_were() -> None:
    out = io.StringIO()
    with RoundTable(4, out, stale=True) as table:
        table.add("gptfl", 4, record(1, 2.0), wanted=3)
    head, line = out.getvalue().splitlines()
    assert head.split()[-2:] == ["left", "stale"]
    assert line.split()[-1] == "1"


def test_the_time_left_is_for_all_planned_rounds_at_the_median_of_the_last_ones() -> None:
    table = RoundTable(20, io.StringIO())
    assert table.seconds_left is None
    for number, seconds in enumerate((50.0, 2.0, 2.0, 60.0, 2.0, 3.0), 1):
        table.add("gptfl", 20, record(number, seconds), wanted=4)
    assert table.seconds_left == 14 * 2.0


def on_a_terminal(script: str) -> tuple[str, list[str]]:
    """What a script shows on a terminal that is its stderr, and the lines of its stdout."""
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the terminal's other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    out, _ = child.communicate()
    assert child.returncode == 0, shown.decode()
    return shown.decode(), out.splitlines()


def test_the_bar_names_the_silos_at_work_and_forgets_them_when_they_are_done() -> None:
    script = """
        import sys
        from gptfl_dist.observe.progress import RoundTable
        from gptfl_dist.observe.summary import RoundRecord
        with RoundTable(4) as table:
            def show():
                fields = table._bar.tasks[0].fields
                print(fields["left"], fields["note"], sep="|", file=sys.__stdout__)  # rich takes stdout too
            table.add("gptfl", 4, RoundRecord(1, 2.0, 10, 10, None, 0.5), wanted=2)
            table.working("north", 7, 100)
            table.working("south", 4, 100)
            show()
            table.silo_done("south")
            show()
            table.waiting_for(("south",))
            show()
            table.add("gptfl", 4, RoundRecord(2, 2.0, 10, 10, None, 0.5), wanted=2)
            show()
            table.waiting_for(())
            table.silo_done("north")
            table.silo_done("nobody")
            show()
            for number in range(5):
                table.working(f"silo-{number}", number, 10)
            show()
    """
    _, lines = on_a_terminal(script)
    assert lines == [
        "about 6.0 s left|south 4 %, north 7 %",
        "about 6.0 s left|north 7 %",
        "waiting for south|north 7 %",
        "waiting for south|north 7 %",
        "about 4.0 s left|",
        "about 4.0 s left|silo-0 0 %, silo-1 10 %, silo-2 20 %, and 2 more",
    ]


def test_on_a_terminal_there_are_bars_and_lines_and_text_in_brackets_is_shown_as_it_is() -> None:
    script = """
        from gptfl_dist.observe.progress import RoundTable, progress
        from gptfl_dist.observe.summary import RoundRecord
        with progress("synthetic data", 2, "images") as shown:
            shown.update(1, "label [/b]")
            shown.update(2, "label [/b]")
        with RoundTable(2) as table, progress("evaluation", 1, "batches") as inner:
            inner.update(1)
            table.add("gptfl", 2, RoundRecord(1, 2.0, 10, 10, None, 0.5), wanted=1)
    """
    text, _ = on_a_terminal(script)
    assert "2/2 images" in text
    assert "label [/b]" in text
    assert "1/2 rounds" in text
    assert "gptfl" in text
    assert "50.0 %" in text
    assert "━" in text


def test_without_a_terminal_rich_is_not_loaded() -> None:
    script = """
        import sys
        from gptfl_dist.observe.progress import progress
        with progress("synthetic data", 1, "images") as shown:
            shown.update(1)
        heavy = {"rich", "torch", "matplotlib"} & set(sys.modules)
        sys.exit(f"loaded: {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
