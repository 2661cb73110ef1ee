"""The table at the end of a run."""

from __future__ import annotations

import io
import re

import pytest
from finished_run import arm, summary_of, three_arms

from gptfl_dist.observe.summary import Arms, SyntheticArm
from gptfl_dist.observe.table import print_table
from gptfl_dist.observe.wording import headline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO, *arms: Arms) -> str:
    print_table(summary_of(*arms) if arms else three_arms(), stream)
    return stream.getvalue()


def test_the_plain_table_has_a_row_an_arm_and_the_seconds_below() -> None:
    lines = printed(io.StringIO()).splitlines()
    assert lines[0].split("  ")[0] == "arm"
    assert [line.split("  ")[0] for line in lines[1:4]] == ["Synthetic only", "FedAvg from random weights", "GPT-FL"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[3].split() == ["GPT-FL", "96.0", "%", "2", "of", "4", "410", "B", "360", "B", "2.0"]
    assert "synthesis 1 min 00 s, pretraining 1 min 10 s" in "\n".join(lines[4:])


def test_a_terminal_gets_the_same_numbers_in_a_frame() -> None:
    text = printed(Terminal())
    for part in ("GPT-FL", "96.0 %", "2 of 4", "410 B", "360 B", "─", "pretraining 1 min 10 s"):
        assert part in text


def test_a_narrow_terminal_breaks_names_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    lines = printed(Terminal()).splitlines()
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines[:9]) <= 50
    for part in (" 85.0 % ", " 96.0 % ", " 2 of 4 ", " 410 B ", " 360 B "):
        assert part in "\n".join(lines)


def test_an_arm_that_misses_the_target_says_so() -> None:
    arms = Arms(fedavg_random=arm([0.5, 0.9]), gptfl=arm([0.6, 0.7]))
    text = printed(io.StringIO(), arms)
    assert "not reached" in text
    assert "GPT-FL reaches 70.0 % on test data, 20.0 points below FedAvg from random weights" in text
    assert "it does not reach FedAvg's best (90.0 %) in 2 rounds." in text


def test_the_sentence_says_what_came_out() -> None:
    assert headline(three_arms()) == (
        "GPT-FL reaches 96.0 % on test data, 6.0 points above FedAvg from random weights; "
        "it reaches FedAvg's best (90.0 %) in round 2, FedAvg itself in round 3."
    )
    same = Arms(synthetic_only=SyntheticArm(accuracy=0.7), gptfl=arm([0.6, 0.7]))
    assert headline(summary_of(same)) == "GPT-FL reaches 70.0 % on test data, as much as the synthetic data alone."
    alone = Arms(gptfl=arm([0.6, 0.7], test=False))
    assert headline(summary_of(alone, curve_of="validation")) == "GPT-FL reaches 70.0 % on validation data."
    fedavg = Arms(fedavg_random=arm([0.6, 0.7]))
    assert headline(summary_of(fedavg)) == "FedAvg from random weights reaches 70.0 % on test data after 2 rounds."
    synthetic = Arms(synthetic_only=SyntheticArm(accuracy=0.7))
    assert headline(summary_of(synthetic)) == "Synthetic only reaches 70.0 % on test data."


def test_an_arm_that_was_ended_early_says_by_which_setting() -> None:
    stopped = arm([0.5, 0.9]).model_copy(update={"stopped_by": "patience"})
    text = printed(io.StringIO(), Arms(gptfl=stopped))
    assert (
        "GPT-FL ended after 2 rounds, for there was no more progress on validation data (federation.patience)." in text
    )
    assert "ended after" not in printed(io.StringIO())
