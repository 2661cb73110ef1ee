"""Rules of one's own, as docs/strategies.md shows them: beside the federation file, and from an installed package."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from support import Commands

from gptfl_dist.aggregation.rules import rule_of
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.config.strategy import Strategy
from gptfl_dist.errors import ConfigError
from gptfl_dist.testing.federations import tiny_federation
from gptfl_dist.weights import WeightsFile

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
TOLD = """
import os
import pathlib

with (pathlib.Path(__file__).parent / "imported").open("a") as told:
    told.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def shown() -> str:
    """The module that the page shows."""
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(text)


def numbers(path: Path) -> np.ndarray:
    with WeightsFile(path) as file:
        return np.frombuffer(file.read(0, file.nbytes), "<f4").astype(float)


def test_a_rule_beside_the_file_runs_at_the_coordinator_alone(gptfl: Commands, tmp_path: Path, shown: str) -> None:
    path = tiny_federation(tmp_path, silos=3, strategy={"rule": "my_rules:midrange"})
    (tmp_path / "my_rules.py").write_text(shown + TOLD)
    gptfl.run("run", path)
    run = tmp_path / "run"
    updates = [np.frombuffer((run / "spools" / f"silo-{n}.spool").read_bytes(), "<f4") for n in (1, 2, 3)]
    middle = (np.min(updates, axis=0) + np.max(updates, axis=0)) / 2
    start, end = (numbers(run / name) for name in ("random.safetensors", "models/fedavg_random-final.safetensors"))
    np.testing.assert_allclose(end, start + middle, atol=1e-6)
    assert len((tmp_path / "imported").read_text().split()) == 1


def test_a_rule_that_is_not_there_is_found_out_before_anything_is_done(gptfl: Commands, tmp_path: Path) -> None:
    path = tiny_federation(tmp_path, strategy={"rule": "my_rules:none_such"})
    (tmp_path / "my_rules.py").write_text("")
    for command in ("run", "check"):
        ended = gptfl.start(command, path)
        assert ended.wait() != 0
        assert "strategy.rule my_rules:none_such cannot be imported" in ended.stderr + ended.stdout
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_an_installed_package_offers_rules_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    (tmp_path / "rules_of_a_package.py").write_text(shown)
    installed = tmp_path / "rules_of_a_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: rules-of-a-package\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[gptfl_dist.strategies]\nagreeing = rules_of_a_package:agreeing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    file = load_federation(tiny_federation(tmp_path / "fed", strategy={"rule": "agreeing"}))
    rule = rule_of(file.strategy)
    # Two updates that agree and one that goes the other way.
    together = np.array([[1.0, 0.9, -2.0], [0.9, 1.0, -2.0], [-2.0, -2.0, 4.0]])
    weights = rule(type("Updates", (), {"products": together})(), file.strategy)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], atol=1e-9)
    with pytest.raises(ConfigError, match=r"expected one of mean, .*, agreeing, or a function of your own"):
        load_federation(tiny_federation(tmp_path / "other", strategy={"rule": "agreing"}))


@pytest.mark.parametrize("text", ["package.module", "module:", ":function", "a b:c", "module:function:more", ""])
def test_what_names_no_function_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match=r"package\.module:function"):
        Strategy(rule=text)


def federation(silos: int, **sections: object) -> FederationFile:
    entries = [{"name": f"s{number}"} for number in range(silos)]
    return FederationFile.model_validate({"name": "f", "labels": ["a", "b"], "silos": entries, **sections})


@pytest.mark.parametrize(
    ("rule", "needed"), [("median", 5), ("trimmed_mean", 5), ("geometric_median", 5), ("krum", 7), ("multi_krum", 7)]
)
def test_a_rule_is_held_against_the_smallest_round(rule: str, needed: int) -> None:
    strategy = {"rule": rule, "malicious": 2}
    assert federation(needed, strategy=strategy, federation={"quorum": "all"}).strategy.fewest == needed
    with pytest.raises(
        ValueError, match=rf"{rule}, which needs {needed} updates to bear 2 .* may end with {needed - 1}:"
    ):
        federation(needed + 3, strategy=strategy, federation={"quorum": needed - 1})
    with pytest.raises(ValueError, match=rf"silos names 2: name {needed} silos or more, lower strategy.malicious"):
        federation(2, strategy=strategy)
    with pytest.raises(ValueError, match="may end with 4"):  # the majority of the buffer
        federation(
            9, strategy={"rule": "krum"}, federation={"mode": "asynchronous", "buffer": 7},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"strategy": {"malicious": 1}}, "rule is mean, which bears no malicious silo"),
        ({"strategy": {"rule": "scaffold"}, "training": {"momentum": 0.5}}, "scaffold, .* training.momentum is 0.5"),
        ({"strategy": {"rule": "scaffold"}, "federation": {"mode": "asynchronous"}}, "mode is asynchronous"),
        ({"strategy": {"rule": "scaffold"}, "federation": {"late": "carry"}}, "federation.late is carry"),
        ({"strategy": {"rule": "fednova"}, "training": {"proximal": 6}}, "pulls beyond the received weights"),
        *(
            ({"collective": {"reduction": "fast"}, **each}, f"plain updates of one round, but {setting}")
            for each, setting in (
                ({"strategy": {"rule": "median"}, "federation": {"quorum": "all"}}, "strategy.rule is median"),
                ({"strategy": {"rule": "scaffold"}}, "strategy.rule is scaffold"),
                ({"strategy": {"clip_norm": 2}}, r"strategy.clip_norm is 2"),
                ({"training": {"contrastive": 1}}, "training.contrastive is 1"),
                ({"training": {"private_norms": True}}, "training.private_norms is true"),
            )
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_reason(sections: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        federation(5, **sections)
