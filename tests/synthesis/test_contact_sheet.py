from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapes import SHAPES, shape_set
from whole_set import load_images

from gptfl_dist.config.synthesis import Filter, Synthesis
from gptfl_dist.config.task import Task
from gptfl_dist.errors import StorageError
from gptfl_dist.learning.group import ALONE
from gptfl_dist.synthesis import contact_sheet, dropped_sheet, synthesize
from gptfl_dist.synthesis.selection import Judge, Selection, select_images

LABELS = ["one", "a label whose name is much too long for the column that names stand in"]


@pytest.mark.parametrize("channels", [1, 3])
def test_one_row_a_label(unguided_pipeline_folder: Path, tmp_path: Path, channels: int) -> None:
    settings = Synthesis.model_validate(
        {"generator": {"source": str(unguided_pipeline_folder), "steps": 1, "device": "cpu"}, "threads": 1}
        | {"images_per_label": 7, "shard_size": 3}
    )
    synthesize(settings, Task(size=8, channels=channels), LABELS, 0, tmp_path / "set", lambda done, total: None, ALONE)
    contact_sheet(tmp_path / "set", tmp_path / "sheet.png", per_label=4)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        sheet = np.asarray(image).reshape(image.height, image.width, channels)
    assert (tmp_path / "sheet.png").stat().st_size < 50_000
    images, labels = load_images(tmp_path / "set")
    for label in (0, 1):
        for column, index in enumerate((0, 2, 4, 6)):
            top, left = 4 + label * 68, sheet.shape[1] - (4 - column) * 68
            shown = sheet[top : top + 64, left : left + 64][::8, ::8]
            assert np.array_equal(shown, images[labels == label][index])


def test_no_set_no_sheet(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no synthetic set"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def selected(folder: Path, right: list[bool]) -> Selection:
    """A selection by a judge that takes the images that are not `right` for the next shape, each a little surer."""
    certainty = np.linspace(0.6, 0.9, len(right))

    def ask(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        answer = np.zeros((len(labels), len(SHAPES)))
        answer[np.arange(len(labels)), (labels + ~np.array(right)) % len(SHAPES)] = certainty
        answer[np.arange(len(labels)), (labels + np.array(right)) % len(SHAPES)] = 1 - certainty
        return answer

    return select_images(folder, Filter(), Judge({"kind": "cross"}, Task(), ask))


def test_sheets_of_what_is_kept_and_what_is_dropped(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=6)
    selection = selected(tmp_path, [at % 3 != 1 or at < 6 for at in range(18)])
    images, labels = load_images(tmp_path)
    contact_sheet(tmp_path, tmp_path / "kept.png", selection)
    kept = np.asarray(Image.open(tmp_path / "kept.png"))
    cell = 72
    left = kept.shape[1] - 6 * (cell + 4)
    frames = kept[4 + (cell + 4) : 4 + (cell + 4) + cell]
    for column in (0, 1):
        at = left + column * (cell + 4)
        assert np.array_equal(frames[::6, at : at + cell : 6], images[labels == 1][column, ..., 0])
    assert (frames[:, left + 2 * (cell + 4) :] == 255).all()

    assert dropped_sheet(tmp_path, tmp_path / "dropped.png", selection, per_label=3)
    dropped = np.asarray(Image.open(tmp_path / "dropped.png"))
    assert dropped.shape[0] < 2 * cell  # the frames are the only row
    left = int(np.flatnonzero((dropped[4 : 4 + cell] < 60).mean(axis=0) > 0.2)[0])  # of the first black picture
    across = (dropped.shape[1] - left) // 3
    shown = [dropped[4 : 4 + cell : 6, left + column * across :][:, :cell:6] for column in range(3)]
    surest_first = [images[labels == 1][index, ..., 0] for index in (5, 3, 2)]
    assert [np.array_equal(one, other) for one, other in zip(shown, surest_first, strict=True)] == [True] * 3
    assert (dropped[4 + cell :] < 128).any()  # the captions


def test_nothing_dropped_no_sheet(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=2)
    assert not dropped_sheet(tmp_path, tmp_path / "dropped.png", selected(tmp_path, [True] * 6))
    assert not (tmp_path / "dropped.png").exists()
