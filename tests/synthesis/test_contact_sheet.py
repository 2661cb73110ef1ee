from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from whole_set import load_images

from gptfl_dist.config.federation import Synthesis, Task
from gptfl_dist.errors import StorageError
from gptfl_dist.synthesis import contact_sheet, synthesize

LABELS = ["one", "a label whose name is much too long for the column that names stand in"]


@pytest.mark.parametrize("channels", [1, 3])
def test_one_row_a_label(unguided_pipeline_folder: Path, tmp_path: Path, channels: int) -> None:
    settings = Synthesis.model_validate(
        {"generator": {"source": str(unguided_pipeline_folder), "steps": 1, "device": "cpu"}, "threads": 1}
        | {"images_per_label": 7, "shard_size": 3}
    )
    synthesize(settings, Task(size=8, channels=channels), LABELS, 0, tmp_path / "set", lambda done, total: None)
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
