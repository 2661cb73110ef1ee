"""How numbers and results read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.observe.wording import duration, percent, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (45_100, "45.1 kB"), (999_600, "1.00 MB"), (2.5e14, "250 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@given(st.integers(1000, 10**15))
def test_a_size_is_right_to_three_digits(count: int) -> None:
    number, unit = size(count).split()
    factor = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(count, rel=0.00501)


def test_shares() -> None:
    assert percent(0.9344) == "93.4 %"
    assert percent(1.0) == "100.0 %"
    assert percent(None) == "-"
