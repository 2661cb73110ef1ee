"""Six speakers as six silos. Needs the recordings of the Free Spoken Digit Dataset: GPTFL_FSDD names their folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Commands

RECORDINGS = os.environ.get("GPTFL_FSDD", "")

pytestmark = [
    pytest.mark.skipif(not RECORDINGS, reason="GPTFL_FSDD names no folder of recordings"),
    pytest.mark.skipif(
        not (shutil.which("espeak-ng") and shutil.which("flite")),
        reason="needs espeak-ng and flite (Debian's packages)",
    ),
]


def test_spoken_labels_are_a_start_and_the_speakers_improve_on_it(
    example: Callable[..., Path], gptfl: Commands, tmp_path: Path
) -> None:
    # One recording in five, so that this takes no more than a minute.
    few = tmp_path / "few"
    few.mkdir()
    for recording in Path(RECORDINGS).glob("*_*_*[05].wav"):
        shutil.copyfile(recording, few / recording.name)
    folder = example(
        "speech",
        ("federation.yaml", "images_per_label: 120", "images_per_label: 45"),
        ("federation.yaml", "{epochs: 20}", "{epochs: 15, batch_size: 16, threads: 1}"),
        ("federation.yaml", "rounds: 10", "rounds: 5"),
        ("federation.yaml", "{learning_rate: 0.2}", "{learning_rate: 0.2, batch_size: 16, warm_up_rounds: 1}"),
        arguments=[str(few)],
    )
    assert len(list((folder / "data" / "theo").glob("*/*.wav"))) == 90
    assert len(list((folder / "data" / "test").glob("*/*.wav"))) == 60
    arms = json.loads(gptfl.run("run", folder / "federation.yaml", "--format", "json").stdout)["arms"]
    assert arms["synthetic_only"]["accuracy"] > 0.25
    assert arms["gptfl"]["final_accuracy"] > arms["synthetic_only"]["accuracy"]
