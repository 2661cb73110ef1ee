"""What a stage took is noted beside what it made, over interruptions, and not for what was there already."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gptfl_dist.run.cost import Cost, Meter, hardware_of, read_cost


def meter(path: Path, *, devices: int = 1, goes_on: bool = True) -> Meter:
    return Meter(path, devices=devices, hardware=lambda: "a device", goes_on=goes_on)


def test_devices_add_up_and_what_was_begun_before_counts(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    assert read_cost(path) is None
    made = meter(path, devices=3)
    time.sleep(0.05)
    made.note()
    first = read_cost(path)
    assert first is not None
    assert first.hardware == "a device"
    assert first.seconds >= 0.15
    again = meter(path)
    time.sleep(0.05)
    again.note()
    assert (read_cost(path) or Cost(0, "")).seconds >= first.seconds + 0.05
    meter(path, goes_on=False).note()
    assert (read_cost(path) or first).seconds < first.seconds


def test_what_is_finished_costs_nothing_more(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = meter(tmp_path / "cost.json")
    report = made.beside(lambda done, total: seen.append((done, total)))
    report(5, 5)
    assert not made.begun
    report(4, 5)
    assert made.begun
    assert seen == [(5, 5), (4, 5)]


def test_a_stage_that_goes_on_on_another_device_names_both(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    for name in ("a CPU", "a GPU", "a CPU"):
        Meter(path, devices=1, hardware=lambda name=name: name, goes_on=True).note()
    assert (read_cost(path) or Cost(0, "")).hardware == "a CPU; a GPU"


def test_a_killed_stage_forgets_a_second_and_what_it_did_since_its_last_report_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "cost.json", [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report = meter(path).beside(lambda done, total: None)
    for done in range(5):
        now[0] += 0.6
        report(done, 9)
    assert (read_cost(path) or Cost(0, "")).seconds == pytest.approx(2.4)
    now[0] += 60  # a batch that takes so long is noted once it is done
    assert (read_cost(path) or Cost(0, "")).seconds == pytest.approx(2.4)
    report(6, 9)
    assert (read_cost(path) or Cost(0, "")).seconds == pytest.approx(63)


def test_a_device_has_a_name() -> None:
    assert hardware_of(torch.device("cpu"), 2) == "CPU, 2 threads"
    assert hardware_of(torch.device("cpu"), 1) == "CPU, 1 thread"
