"""Short clips of three tones that a small model tells apart, as folders of WAV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptfl_dist.audio.clip import wav_bytes
from gptfl_dist.config.task import Task

TONES = {"low": 300, "middle": 800, "high": 1800}
RATE = 4000
TASK = Task.model_validate(
    {"kind": "audio", "sample_rate": RATE, "duration": "200ms", "window": "20ms", "hop": "10ms", "bins": 32}
)


def tone(hertz: float, random: np.random.Generator) -> np.ndarray:
    seconds = np.arange(round(RATE * random.uniform(0.1, 0.25))) / RATE
    loud = random.uniform(0.1, 0.9)
    clip = loud * np.sin(2 * np.pi * hertz * random.uniform(0.9, 1.1) * seconds)
    return np.asarray(clip + random.normal(scale=loud / 50, size=len(clip)), dtype=np.float32)


def tone_folder(folder: Path, per_label: int, seed: int = 0) -> Path:
    """`folder/label/number.wav` for each of TONES."""
    random = np.random.default_rng(seed)
    for label, hertz in TONES.items():
        (folder / label).mkdir(parents=True)
        for number in range(per_label):
            (folder / label / f"{number}.wav").write_bytes(wav_bytes(tone(hertz, random), RATE))
    return folder
