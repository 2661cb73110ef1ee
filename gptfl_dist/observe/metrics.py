"""A run's standing as metrics for Prometheus.

They are made when they are asked for, from what `gptfl status` shows; nothing is counted beside the ledger. So they go
on after a coordinator was killed, which is when somebody must be woken, and start again at the true values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gptfl_dist.observe.status import State, Status


@dataclass(frozen=True, slots=True)
class Expiries:
    """Until when certificates hold: each silo's, and by `coordinator`, `issuing`, `root` those of the other side."""

    silos: Mapping[str, datetime] = field(default_factory=dict)
    coordinator: Mapping[str, datetime] = field(default_factory=dict)


def registry_of(status: Callable[[], Status], expiries: Callable[[], Expiries]) -> CollectorRegistry:
    """A registry whose metrics are those of one run."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Run(status, expiries))
    return registry


class _Run(Collector):
    def __init__(self, status: Callable[[], Status], expiries: Callable[[], Expiries]) -> None:
        self._status = status
        self._expiries = expiries

    def collect(self) -> Iterator[Metric]:
        found = self._status()
        yield _gauge("gptfl_coordinator_up", "whether a coordinator is at work on the run", int(found.pid is not None))
        yield _of_each(
            "gptfl_run_state", "1 for the state that the run is in", "state",
            {state: float(state == found.state) for state in get_args(State)},
        )  # fmt: skip
        missing = [silo.name for silo in found.silos if silo.connected is False and not silo.revoked]
        yield _gauge("gptfl_silos", "silos of the federation", len(found.silos))
        yield _gauge("gptfl_silos_missing", "silos that are not connected to a coordinator at work", len(missing))
        revoked = [silo.name for silo in found.silos if silo.revoked]
        yield _gauge("gptfl_silos_revoked", "silos that a coordinator at work lets in no more", len(revoked))
        expected = [silo for silo in found.silos if not silo.revoked]
        connected = {silo.name: float(silo.connected) for silo in expected if silo.connected is not None}
        yield _of_each("gptfl_silo_connected", "whether a silo is connected", "silo", connected)
        behind = {silo.name: float(silo.behind) for silo in found.silos}
        yield _of_each("gptfl_silo_rounds_behind", "rounds without a silo's update since its last", "silo", behind)
        progress = {silo.name: silo.progress for silo in found.silos if silo.progress is not None}
        yield _of_each("gptfl_silo_training_progress", "share of a silo's training that is done", "silo", progress)
        seen = {silo.name: _seconds(silo.seen) for silo in found.silos if silo.seen is not None}
        yield _of_each("gptfl_silo_seen_timestamp_seconds", "when a silo gave a sign of life last", "silo", seen)
        refused = CounterMetricFamily("gptfl_updates_refused", "updates that were refused", labels=["silo"])
        for silo in found.silos:
            refused.add_metric([silo.name], silo.refused)
        yield refused
        yield from self._arms(found)
        stages = CounterMetricFamily("gptfl_stage_seconds", "seconds that a stage took so far", labels=["stage"])
        for stage, seconds in found.seconds.items():
            stages.add_metric([stage], seconds)
        yield stages
        expiries = self._expiries()
        ends = {silo: end.timestamp() for silo, end in expiries.silos.items()}
        text = "until when a silo's certificate holds"
        yield _of_each("gptfl_certificate_expiry_timestamp_seconds", text, "silo", ends)
        ends = {name: end.timestamp() for name, end in expiries.coordinator.items()}
        text = "until when the certificates that silos are shown hold: coordinator, issuing, root"
        yield _of_each("gptfl_coordinator_certificate_expiry_timestamp_seconds", text, "certificate", ends)

    def _arms(self, found: Status) -> Iterator[Metric]:
        rounds = CounterMetricFamily("gptfl_rounds", "rounds that were aggregated", labels=["arm"])
        carried = CounterMetricFamily("gptfl_transfer_bytes", "content that travelled", labels=["arm", "direction"])
        planned = GaugeMetricFamily("gptfl_rounds_planned", "rounds that an arm is to have", labels=["arm"])
        seconds = CounterMetricFamily("gptfl_arm_seconds", "seconds that an arm took so far", labels=["arm"])
        accuracy = GaugeMetricFamily("gptfl_validation_accuracy", "of the newest round, 0 to 1", labels=["arm"])
        for arm in found.arms:
            rounds.add_metric([arm.arm], arm.done)
            planned.add_metric([arm.arm], arm.rounds)
            seconds.add_metric([arm.arm], arm.seconds)
            carried.add_metric([arm.arm, "down"], arm.bytes_down)
            carried.add_metric([arm.arm, "up"], arm.bytes_up)
            if arm.validation_accuracy is not None:
                accuracy.add_metric([arm.arm], arm.validation_accuracy)
        yield from (rounds, planned, seconds, carried, accuracy)
        if found.round is not None and found.round.seconds_left is not None:
            left = found.round.seconds_left
            yield _gauge("gptfl_round_deadline_seconds", "seconds until the deadline of the round in progress", left)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _of_each(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value_of, value in values.items():
        family.add_metric([value_of], value)
    return family


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
