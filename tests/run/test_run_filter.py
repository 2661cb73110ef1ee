"""The filter as a part of a run: generated, judged, shown, trained on; and what its settings mean for a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shapes import SHAPES, SIZE, shape_classifier, shape_set
from support import Commands

from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import GeneratorError
from gptfl_dist.run import stages
from gptfl_dist.run.check import check_file
from gptfl_dist.run.check.findings import Finding
from gptfl_dist.run.filter import filter_images
from gptfl_dist.testing.federations import tiny_federation


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_classifier(tmp_path_factory.mktemp("judges") / "judge", [name.upper() for name in SHAPES])


def judged_federation(folder: Path, **filtered: object) -> Path:
    return tiny_federation(
        folder,
        labels=list(SHAPES),
        task={"size": SIZE, "channels": 1},
        arms=["synthetic_only"],
        synthesis={"images_per_label": 10, "threads": 1, "filter": filtered},
    )


def test_a_run_trains_on_what_its_filter_keeps(gptfl: Commands, tmp_path: Path) -> None:
    synthesis: dict[str, Any] = {
        "generator": {"source": "embedded", "steps": 4, "batch_size": 24},
        "prompts": {"templates": ["a handwritten digit {label}"]},
        "images_per_label": 12,
        "threads": 1,
        "filter": {"threshold": 0.25, "keep_per_label": 8},
    }
    settings: dict[str, Any] = {
        "labels": ["zero", "one"],
        "task": {"size": 32, "channels": 1},
        "arms": ["synthetic_only"],
        "pretraining": {"epochs": 12, "batch_size": 8, "augmentation": False, "threads": 1},
        "synthesis": synthesis,
    }
    file = tiny_federation(tmp_path, **settings)
    command = gptfl.run("run", file, "--format", "json")
    words = "16 of 24 images kept (cross, threshold 0.25, at most 8 a label); least: zero 8"
    assert f"filter: {words}; the judge reads " in command.stderr
    assert json.loads(command.stdout)["synthetic_images"] == 16
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"Filter: {words}; the judge reads " in report
    assert "A sample of the 16 synthetic images" in report
    selection = json.loads((tmp_path / "synthetic" / "selection.json").read_text())
    assert selection["kept"] == [8, 8]

    # A quota that changes is decided on at once; without a filter all are taken, whatever was selected before.
    file.write_text(file.read_text().replace("keep_per_label: 8", "keep_per_label: 7"))
    changed = stages.generate(load_federation(file), tmp_path)
    assert (changed.images, changed.kept) == (24, 14)
    assert selection["answers"] == json.loads((tmp_path / "synthetic" / "selection.json").read_text())["answers"]
    synthesis["filter"] = None
    plain = stages.generate(load_federation(tiny_federation(tmp_path, **settings)), tmp_path)
    assert plain == stages.Generated(24, 24, None)
    assert not (tmp_path / "run" / "dropped.png").exists()


def test_a_classifier_finds_what_shows_another_label(judge: Path, tmp_path: Path) -> None:
    wrong = [4, 9, 10, 20]
    shape_set(tmp_path / "synthetic", per_label=10, wrong=wrong)
    file = load_federation(judged_federation(tmp_path, judge="classifier", source=str(judge)))
    selection = filter_images(file, tmp_path)
    assert selection is not None
    assert [at for at, kept in enumerate(selection.keeps) if not kept] == wrong
    assert [selection.answers.judged[at] for at in wrong] == [(at % 3 + 1) % 3 for at in wrong]


def test_a_classifier_that_never_agrees(judge: Path, tmp_path: Path) -> None:
    shape_set(tmp_path / "synthetic", per_label=10, wrong=range(30))
    file = load_federation(judged_federation(tmp_path, judge="classifier", source=str(judge)))
    selection = filter_images(file, tmp_path)
    assert selection is not None
    with pytest.raises(GeneratorError, match=r"0 of 10 of disc \(at least 2\); 0 of 10 of frame"):
        selection.require_every_label(tmp_path / "dropped.png")


def test_the_pre_flight_loads_the_judge(judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(folder: str, **filtered: object) -> Finding:
        path = judged_federation(tmp_path / folder, **filtered)
        return next(finding for finding in check_file(path) if finding.checked == "filter")

    assert found("cross").status == "ok"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetched = found("fetched", judge="encoder", source="nobody/no-such-judge")
    assert (fetched.exit_code, "gptfl generate would fail to download it" in fetched.found) == (4, True)
    good = found("classifier", judge="classifier", source=str(judge))
    assert (good.status, good.found) == ("ok", f"the classifier {judge} loads and judges by 3 labels")
    absent = found("absent", judge="encoder", source="./nowhere")
    assert (absent.exit_code, str(tmp_path / "absent" / "nowhere") in absent.found) == (5, True)
    unlike = found("unlike", judge="encoder", source=str(judge))
    assert (unlike.exit_code, "compares no images with texts" in unlike.found) == (5, True)

    config = tmp_path / "judge"
    config.mkdir()
    for path in judge.iterdir():
        (config / path.name).write_bytes(path.read_bytes().replace(b"FRAME", b"OTHER"))
    names = found("names", judge="classifier", source=str(config))
    assert (names.exit_code, "has no label named frame" in names.found) == (5, True)
    assert "its 3 labels are DISC, OTHER, BARS" in names.hint
