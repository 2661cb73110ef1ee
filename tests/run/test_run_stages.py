"""Pre-training as a stage: its weights are used again only where they are those that it wrote, of the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapes import SHAPES, SIZE, shape_set

from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import DataError, GeneratorError
from gptfl_dist.learning.checkpoint import Checkpoint
from gptfl_dist.run.candidates import PRETRAINED_WEIGHTS, PRETRAINING_COST
from gptfl_dist.run.cost import read_cost
from gptfl_dist.run.filter import filter_images
from gptfl_dist.run.stages import pretrain
from gptfl_dist.testing.federations import tiny_federation


def shape_federation(folder: Path, per_label: int, **synthesis: object) -> Path:
    """A federation file of shapes, whose one epoch of pre-training takes no time."""
    return tiny_federation(
        folder,
        labels=list(SHAPES),
        task={"size": SIZE, "channels": 1},
        arms=["synthetic_only"],
        pretraining={"epochs": 1, "threads": 1},
        synthesis={"images_per_label": per_label, **synthesis},
    )


def test_pretrained_weights_are_reused_while_they_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shape_federation(tmp_path, 8)
    shape_set(tmp_path / "synthetic", per_label=8)
    file = load_federation(path)
    first = pretrain(file, tmp_path)
    weights = file.run_folder / "pretrained.safetensors"
    whole, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert "is reused" not in capsys.readouterr().err
    assert pretrain(file, tmp_path) == first
    assert weights.stat().st_mtime_ns == written
    assert f"pretrain: {weights} is there and is reused" in capsys.readouterr().err

    for damaged in (whole[:-4] + b"\0\0\0\1", whole[:-4], b""):
        weights.write_bytes(damaged)
        assert pretrain(file, tmp_path) == first
        assert weights.read_bytes() == whole


def test_only_what_the_filter_keeps_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape_set(tmp_path / "synthetic", per_label=8)
    everything = pretrain(load_federation(shape_federation(tmp_path, 8)), tmp_path)

    file = load_federation(shape_federation(tmp_path, 8, filter={"threshold": 0.0, "keep_per_label": 5}))
    with pytest.raises(DataError, match=r"selection\.json: expected the selection of synthesis\.filter") as caught:
        pretrain(file, tmp_path)
    assert "gptfl generate" in caught.value.hint
    selection = filter_images(file, tmp_path)
    assert selection is not None
    assert selection.kept == [5, 5, 5]
    assert "filter: done" in capsys.readouterr().err
    part = pretrain(file, tmp_path)
    assert part["request"]["selection"] == selection.digest
    assert part["digest"] != everything["digest"]

    # A set of just these images gives the same weights.
    (tmp_path / "part").mkdir()
    shape_set(tmp_path / "part" / "synthetic", per_label=5)
    alone = pretrain(load_federation(shape_federation(tmp_path / "part", 5)), tmp_path)
    assert part["digest"] == alone["digest"]

    # Another quota is decided without asking again, and trained on anew.
    more = load_federation(shape_federation(tmp_path, 8, filter={"threshold": 0.0, "keep_per_label": 7}))
    larger = filter_images(more, tmp_path)
    assert larger is not None
    assert larger.answers == selection.answers
    assert "filter" not in capsys.readouterr().err
    assert pretrain(more, tmp_path)["digest"] not in (part["digest"], everything["digest"])


def test_a_label_that_the_filter_leaves_empty_is_not_trained_on(tmp_path: Path) -> None:
    shape_set(tmp_path / "synthetic", per_label=8)
    file = load_federation(shape_federation(tmp_path, 8, filter={"threshold": 0.99}))
    filter_images(file, tmp_path)  # by models that had one epoch
    with pytest.raises(GeneratorError, match="0 of 8 of disc"):
        pretrain(file, tmp_path)


@pytest.mark.parametrize("request_", ["this", "another"])
def test_what_a_stopped_training_took_counts_where_it_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    shape_set(tmp_path / "synthetic", per_label=8)
    file = load_federation(shape_federation(tmp_path, 8))

    def power_cut(checkpoint: Checkpoint) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", power_cut)
        with pytest.raises(KeyboardInterrupt):
            pretrain(file, tmp_path)
    (file.run_folder / PRETRAINED_WEIGHTS).unlink()
    (file.run_folder / PRETRAINING_COST).write_text('{"seconds": 1000, "hardware": "an abacus"}')
    if request_ == "another":
        file = file.model_copy(update={"seed": 99})
    pretrain(file, tmp_path)
    cost = read_cost(file.run_folder / PRETRAINING_COST)
    assert cost is not None
    assert (cost.seconds > 1000) == (request_ == "this")
    assert ("an abacus" in cost.hardware) == (request_ == "this")
