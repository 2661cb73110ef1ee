"""The models: what they refuse, and that a loaded section cannot change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gptfl_dist.config import (
    Code,
    Exchange,
    FederationFile,
    Filter,
    Generator,
    Model,
    Prompts,
    SiloFile,
    Task,
    Training,
)
from gptfl_dist.config.experiment import Start
from gptfl_dist.config.mixing import HandedOut, Mixing

MINIMAL: dict[str, Any] = {"name": "trial", "labels": ["cat", "dog"], "silos": [{"name": "a"}, {"name": "b"}]}

MEANS = {"first_round": "means"}
TWO: dict[str, Any] = {"candidates": {"calm": {}, "free": {}}}


def test_a_section_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Task().size = 3  # type: ignore[misc]  # which is what is tried


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "a" * 64, "..", "é"])
def test_names_that_are_unsafe_in_a_path_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        FederationFile.model_validate(MINIMAL | {"name": name})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["cat"]}, "at least 2"),
        ({"labels": ["cat", "cat"]}, "labels names cat twice"),
        ({"silos": [{"name": "a"}, {"name": "a"}]}, "silos names a twice"),
        ({"silos": []}, "at least 1"),
        ({"arms": []}, "at least 1"),
        ({"federation": {"cohort": 3}}, "cohort is 3, but there are only 2 silos"),
        ({"federation": {"cohort": 1, "quorum": 2}}, "quorum is 2, more than the cohort of 1"),
        ({"federation": {"quorum": 3}}, "quorum is 3, more than the cohort of 2"),
        ({"training": MEANS, "strategy": {"rule": "scaffold"}}, r"first_round is means, .*rule is scaffold"),
        ({"training": MEANS, "federation": {"late": "carry"}}, r"first_round is means, .*federation\.late is carry"),
        ({"training": MEANS, "compression": {"up": "int8"}}, r"first_round is means, .*compression\.up is int8"),
        (
            {"training": {**MEANS, "learning_rate": [0.1, 0.2]}, "tuning": {"rounds": 1}},
            r"first_round is means, .* tuning\.rounds is 1",
        ),
        ({"mixing": {"samples": "all"}, "strategy": {"rule": "fednova"}}, r"fednova, which .* mixing\.samples is all"),
        ({"mixing": {"samples": "all"}, "strategy": {"rule": "scaffold"}}, r"scaffold, .* mixing\.samples is all"),
        ({"mixing": {"samples": "missing"}, "collective": {"reduction": "fast"}}, r"but mixing\.samples is missing"),
        ({"mixing": {"samples": "all"}, "synthesis": TWO}, r"mixing\.samples is all, and synthesis\.candidates"),
        ({"federation": {"choose_by": "synthetic"}, "synthesis": TWO}, r"choose_by is synthetic, and .*candidates"),
        (
            {"mixing": {"samples": "all"}, "arms": ["fedavg_random"], "task": {"kind": "audio"}},
            r"generator\.source is embedded, which draws digits",
        ),
    ],
)
def test_impossible_federations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FederationFile.model_validate(MINIMAL | changes)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Task, {"channels": 3, "mean": [0.1, 0.2]}, "mean has 2 values"),
        (Task, {"channels": 2}, "1 or 3"),
        (Task, {"std": [0.0]}, "greater than 0"),
        (Model, {"name": "transformers"}, r"model\.source must name"),
        (Model, {"name": "function"}, r"model\.source must name"),
        (Model, {"name": "cnn", "source": "x"}, r"takes no model\.source"),
        (Model, {"name": "cnn", "pretrained": True}, "for model.name transformers alone"),
        (Prompts, {"templates": ["a cat"]}, "has no {label}"),
        (Prompts, {"templates": ["a {style} {label}"]}, "styles is empty"),
        (Generator, {"device": "gpu"}, "pattern"),
        (Filter, {"judge": "encoder"}, r"filter\.source must name"),
        (Filter, {"source": "./judge"}, r"judge is cross, which takes no filter\.source"),
        (Filter, {"threshold": 1.0}, "less than 1"),
        (Training, {"learning_rate": []}, "at least 1"),
        (Training, {"learning_rate": [0.1, 0.0]}, "greater than 0"),
        (Training, {"momentum": 1.0}, "less than 1"),
        (Exchange, {"chunk": "1KiB"}, "expected 4KiB to 16MiB"),
        (Exchange, {"authority": "a.pem"}, "authority given without certificate, key"),
        (Exchange, {"listen": "localhost"}, "pattern"),
        (Code, {}, "code is empty"),
        (Code, {"function": "a:b", "script": "c.py"}, "give it without code.function"),
        (Code, {"function": "os.system"}, "pattern"),
        (Mixing, {"samples": "some"}, "'none', 'all' or 'missing'"),
        (HandedOut, {"digest": "a", "count": 1, "use": "all", "per_label": 1}, "pattern"),
        (HandedOut, {"digest": "a" * 64, "count": 0, "use": "all", "per_label": 1}, "greater than 0"),
        (Start, {"arm": "checkpoint"}, "checkpoint must name a folder or hub id"),
        (Start, {"arm": "random", "checkpoint": "./resnet"}, "takes no checkpoint"),
        (
            Start,
            {"arm": "synthetic", "checkpoint": "./resnet", "settings": {"model": {}}},
            "checkpoint names the model",
        ),
        (SiloFile, {"name": "a"}, "data is missing"),
        (SiloFile, {"name": "a", "code": {"function": "a:b"}}, "data is missing"),
    ],
)
def test_impossible_sections_are_refused(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


def test_a_script_may_bring_its_own_data() -> None:
    assert SiloFile.model_validate({"name": "a", "code": {"script": "train.py"}}).data is None


@pytest.mark.parametrize(
    ("changes", "pretrains", "synthesises"),
    [
        ({}, True, True),
        ({"arms": ["fedavg_random"]}, False, False),
        ({"arms": ["fedavg_random"], "mixing": {"samples": "missing"}}, False, True),
        ({"arms": ["fedavg_random"], "federation": {"choose_by": "synthetic"}}, False, True),
    ],
)
def test_synthetic_data_are_made_where_something_uses_them(
    changes: dict[str, Any], pretrains: bool, synthesises: bool
) -> None:
    file = FederationFile.model_validate(MINIMAL | changes)
    assert (file.pretrains, file.synthesises) == (pretrains, synthesises)


def test_learning_rates_is_the_grid() -> None:
    assert Training(learning_rate=0.1).learning_rates == [0.1]
    assert Training(learning_rate=[0.1, 0.2]).learning_rates == [0.1, 0.2]
