"""A whole federation of clips over gRPC: one engine speaks the labels, the silos hold what another one said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import Commands

from gptfl_dist.audio.clip import wav_bytes
from gptfl_dist.config.document import dump_yaml
from gptfl_dist.synthesis.samples import plan_samples
from gptfl_dist.synthesis.speech import SpeechGenerator, find_engines

pytestmark = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")), reason="needs espeak-ng and flite (Debian's packages)"
)
LABELS = ["yes", "seven", "no"]
RATE = 8000


def recordings(folder: Path, per_label: int, seed: int) -> Path:
    """`folder/label/number.wav`, spoken by flite."""
    samples = plan_samples(LABELS, {label: [label] for label in LABELS}, [1.0], seed, per_label)
    clips = SpeechGenerator(find_engines(["flite"])).clips(samples, LABELS, RATE, 1.0)
    for sample, clip in zip(samples, clips, strict=True):
        path = folder / LABELS[sample.label] / f"{sample.index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav_bytes(clip, RATE))
    return folder


def audio_federation(folder: Path) -> Path:
    """Two silos, test data, and a filter over the synthetic clips."""
    for number, name in enumerate(("north", "south")):
        recordings(folder / "data" / name, 16, number)
        (folder / f"{name}.yaml").write_text(dump_yaml({"name": name, "data": {"path": f"data/{name}"}}))
    recordings(folder / "data" / "test", 10, 7)
    content = {
        "name": "spoken",
        "labels": LABELS,
        "task": {"kind": "audio", "sample_rate": RATE, "duration": "800ms", "hop": "20ms", "bins": 40},
        "model": {"name": "conv1d-gru"},
        "synthesis": {
            "generator": {"source": "tts", "engines": ["espeak-ng"]},
            "images_per_label": 40,
            "threads": 1,
            "filter": {"threshold": 0.05},
        },
        "pretraining": {"epochs": 12, "batch_size": 16, "threads": 1},
        "training": {"batch_size": 8, "learning_rate": 0.2, "warm_up_rounds": 0},
        "federation": {"rounds": 4, "quorum": "all", "deadline": "60s"},
        "test_data": "data/test",
        "silos": [{"name": name, "file": f"{name}.yaml"} for name in ("north", "south")],
    }
    path = folder / "federation.yaml"
    path.write_text(dump_yaml(content))
    return path


def test_clips_are_generated_filtered_learnt_and_federated(tmp_path: Path, gptfl: Commands) -> None:
    path = audio_federation(tmp_path)
    checked = gptfl.run("check", path)
    assert "48 clips of 3 of 3 labels fit the federation's model" in checked.stdout
    assert "30 clips of all 3 labels" in checked.stdout
    command = gptfl.run("run", path, "--format", "json")
    summary = json.loads(command.stdout)
    arms = summary["arms"]
    assert arms["gptfl"]["start_accuracy"] == arms["synthetic_only"]["accuracy"] > 0.4
    assert arms["gptfl"]["final_accuracy"] > 0.8
    assert "of 120 clips kept (cross" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "synthetic.png").stat().st_size > 1000

    # A silo's own pre-flight, which does not know the federation, finds that it holds clips.
    assert "48 clips can be read: no 16, seven 16, yes 16" in gptfl.run("check", tmp_path / "north.yaml").stdout
