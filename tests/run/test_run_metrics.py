"""`gptfl metrics`: what Prometheus reads of a run, and that the alerts and the dashboard ask for what there is."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support import Commands, Federation, free_port, wait_for

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.run.institution import make_credentials
from gptfl_dist.run.metrics import metrics_text
from gptfl_dist.testing.federations import tiny_federation

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"


def values(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The values of each sample, by the values of its labels."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_a_finished_run_is_told_as_the_ledger_has_it(undisturbed: Federation, gptfl: Commands) -> None:
    found = values(gptfl.run("metrics", undisturbed.path, "--once").stdout)
    told = undisturbed.summary()["arms"]["fedavg_random"]
    assert found["gptfl_coordinator_up"] == {(): 0.0}
    assert found["gptfl_run_state"][("finished",)] == 1.0
    assert sum(found["gptfl_run_state"].values()) == 1.0
    assert found["gptfl_rounds_total"] == {("fedavg_random",): len(told["curve"])}
    assert found["gptfl_transfer_bytes_total"][("fedavg_random", "up")] == told["bytes_up"]
    assert found["gptfl_updates_refused_total"] == {("silo-1",): 0.0, ("silo-2",): 0.0}


def test_a_run_at_work_is_scraped_and_a_killed_one_is_still_told_of(
    gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path
) -> None:
    world = federation(epochs=60)
    run = gptfl.start("run", world.path)
    wait_for(lambda: world.owed(1))
    port = free_port()
    serving = gptfl.start("metrics", world.path, "--listen", f"127.0.0.1:{port}")
    wait_for(lambda: "/metrics" in serving.stderr)

    def scraped() -> dict[str, dict[tuple[str, ...], float]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return values(answer.read().decode())

    wait_for(lambda: _listens(port))
    wait_for(lambda: sum(scraped().get("gptfl_silo_connected", {}).values()) == 2)
    found = scraped()
    assert found["gptfl_coordinator_up"] == {(): 1.0}
    assert found["gptfl_silo_connected"] == {("silo-1",): 1.0, ("silo-2",): 1.0}
    assert found["gptfl_silos_missing"] == {(): 0.0}
    run.kill()
    found = scraped()
    assert found["gptfl_coordinator_up"] == {(): 0.0}
    assert found["gptfl_run_state"][("killed",)] == 1.0


def expiries(text: str) -> dict[tuple[str, ...], float]:
    return values(text).get("gptfl_coordinator_certificate_expiry_timestamp_seconds", {})


def test_what_the_coordinator_shows_is_told_of_with_those_above_it(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    world = federation()
    content = yaml.safe_load(world.path.read_text())
    content |= {"silos": [{"name": name} for name in world.silos], "exchange": {"listen": f"localhost:{free_port()}"}}
    world.path.write_text(dump_yaml({**content, "enrolment": {"hosts": ["localhost"], "certificates": "2h"}}))
    gptfl.run("authority", "init", world.path)
    before = expiries(metrics_text(world.path))
    assert before.keys() == {("issuing",), ("root",)}
    coordinator = gptfl.start("coordinator", world.path)
    wait_for(lambda: "taking silos at" in coordinator.stderr)
    at_work = expiries(metrics_text(world.path))
    assert at_work.keys() == {("coordinator",), *before}
    assert time.time() < at_work["coordinator",] < time.time() + 7200 < at_work["issuing",] < at_work["root",]


def test_the_files_of_a_coordinator_tell_until_when_they_hold(tmp_path: Path) -> None:
    files = {name: f"credentials/coordinator/{name}.pem" for name in ("authority", "certificate", "key")}
    path = tiny_federation(tmp_path, exchange=files)
    assert expiries(metrics_text(path)) == {}
    make_credentials(path, ["localhost"], tmp_path / "credentials", 5)
    found = expiries(metrics_text(path))
    assert found.keys() == {("coordinator",), ("issuing",), ("root",)}
    assert abs(found["coordinator",] - time.time() - 5 * 86400) < 3600


def _listens(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20):
            return True
    except OSError:
        return False


def test_what_is_no_run_and_a_port_in_use_are_told(undisturbed: Federation, gptfl: Commands, tmp_path: Path) -> None:
    nothing = gptfl.start("metrics", tmp_path, "--once")
    assert nothing.wait() == 2
    assert "no run was started here" in nothing.stderr


@pytest.mark.parametrize("file", ["alerts.yaml", "dashboard.json"])
def test_alerts_and_dashboard_ask_for_metrics_that_there_are(
    undisturbed: Federation, gptfl: Commands, file: str
) -> None:
    text = (DEPLOY / file).read_text()
    json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    known = set(re.findall(r"^# TYPE (\w+)", gptfl.run("metrics", undisturbed.path, "--once").stdout, re.MULTILINE))
    known |= {f"{name}_total" for name in known} | {"gptfl_round_deadline_seconds"}
    asked = set(re.findall(r"\bgptfl_\w+", text))
    assert len(asked) > 4
    assert asked <= known
