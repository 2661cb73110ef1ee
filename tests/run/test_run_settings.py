"""Which settings make a run another run, and which may change in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.config.load import load_federation
from gptfl_dist.run.settings import MAY_CHANGE, request_of
from gptfl_dist.testing.federations import tiny_federation

CHANGED: dict[str, dict[str, Any]] = {
    "run_folder": {"run_folder": "elsewhere"},
    "synthesis.folder": {"synthesis": {"folder": "elsewhere"}},
    "silos.file": {"silos": [{"name": "silo-1"}, {"name": "silo-2"}]},
    "durability": {"durability": "power"},
    "exchange": {"exchange": {"listen": "localhost:8443", "keepalive": "10s"}},
    "enrolment": {"enrolment": {"hosts": ["localhost"]}},
    "at_rest": {"at_rest": {"key_env": "KEY"}},
    "collective.trust": {"collective": {"trust": "tls"}},
    "federation.keep": {"federation": {"keep": "all"}},
    "federation.join_deadline": {"federation": {"join_deadline": "3d"}},
    "federation.diversity": {"federation": {"diversity": True}},
}


def request(folder: Path, **settings: Any) -> str:
    path = tiny_federation(folder)
    path.write_text(dump_yaml({**yaml.safe_load(path.read_text()), **settings}))
    return request_of(path, load_federation(path))


def test_every_setting_that_may_change_is_tried() -> None:
    assert CHANGED.keys() == MAY_CHANGE


@pytest.mark.parametrize("setting", sorted(CHANGED))
def test_a_run_stays_the_same_run(setting: str, tmp_path: Path) -> None:
    before: dict[str, Any] = {
        section: {} for section in CHANGED[setting] if section in ("synthesis", "federation", "collective")
    }
    assert request(tmp_path / "before", **before) == request(tmp_path / "after", **CHANGED[setting])


RANDOM = {"arms": ["fedavg_random"]}


@pytest.mark.parametrize("settings", [{"synthesis": {"images_per_label": 7}}, {"pretraining": {"epochs": 7}}], ids=str)
@pytest.mark.parametrize(
    ("rest", "used"), [(RANDOM, False), ({"arms": ["gptfl"]}, True), ({**RANDOM, "mixing": {"samples": "all"}}, True)]
)
def test_other_synthetic_data_make_another_run_where_they_are_used(
    rest: dict[str, Any], used: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    before, after = request(tmp_path / "before", **rest), request(tmp_path / "after", **rest, **settings)
    assert (before != after) is used


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 8},
        {"federation": {"rounds": 7}},
        {"collective": {"reduction": "fast"}},
        {"silos": [{"name": "silo-1"}]},
        {"silos": [{"name": "silo-1", "max_samples": 9}, {"name": "silo-2"}]},
    ],
    ids=lambda settings: str(settings),
)
def test_a_run_is_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    assert request(tmp_path / "before") != request(tmp_path / "after", **settings)
