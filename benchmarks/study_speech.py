"""Study (c): GPT-FL on spoken digits, six speakers as six silos with 40 recordings each.

    python benchmarks/study_speech.py --data recordings
    python benchmarks/study_speech.py --data recordings --quick    two minutes: one seed, few rounds

The folder holds the recordings of the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset, CC
BY-SA 4.0), DIGIT_SPEAKER_NUMBER.wav. Of each speaker and digit the numbers 0 to 4, by the data set's convention its
test split, are the test set; four of the others, by a fixed draw, are the speaker's as a silo, one of them held out as
validation data.
Synthetic clips are spoken by three text-to-speech engines, which never heard the speakers.

Besides the matrix that all studies have, each speaker is left out once: five are silos, and FedAdam from both starts
is tested on 200 recordings of the sixth, as a silo would find it that took no part. How cells are tuned: study.py.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from study import Study, main

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TEST, UNSEEN, ALL = range(5), range(20), range(50)  # numbers of recordings
CLIPS = 4  # a silo and digit
KEY = r"^\d_([a-z]+)_\d+\.wav$"


def study(quick: bool) -> Study:
    """What is run."""
    by_speaker = {"kind": "key", "key": KEY}
    return Study(
        name="speech",
        labels=LABELS,
        data={"path": "train", "validation_share": 0.25},
        test_data="test",
        settings={
            "task": {"kind": "audio", "sample_rate": 8000, "duration": "1s"},
            "model": {"name": "conv1d-gru"},
            "synthesis": {
                "generator": {"source": "tts", "engines": ["espeak-ng", "flite", "hibari"]},
                "images_per_label": 12 if quick else 240,
                "shard_size": 120,
                "threads": 1,
            },
            "pretraining": {"epochs": 5 if quick else 30, "batch_size": 32, "threads": 1},
            "training": {"batch_size": 10, "epochs": 2, "clip_norm": 1.0, "warm_up_rounds": 0 if quick else 3},
        },
        rounds=2 if quick else 24,
        epochs=2,
        splits={"speakers": by_speaker},
        unseen={
            f"unseen-{speaker}": {**by_speaker, "without": [speaker], "test_data": f"unseen/{speaker}"}
            for speaker in SPEAKERS
        },
    )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """train/, test/ and unseen/SPEAKER/, each with a folder a label; the same whatever the seed."""
    shutil.rmtree(folder / "train", ignore_errors=True)  # which may hold another draw
    draws = np.random.default_rng(0)
    for speaker in SPEAKERS:
        for digit, label in enumerate(LABELS):
            mine = draws.choice([number for number in ALL if number not in TEST], CLIPS, replace=False)
            for where, numbers in (("train", mine), ("test", TEST), (f"unseen/{speaker}", UNSEEN)):
                target = folder / where / label
                target.mkdir(parents=True, exist_ok=True)
                for number in numbers:
                    name = f"{digit}_{speaker}_{number}.wav"
                    if not (options.data / name).exists():
                        raise SystemExit(
                            f"{options.data / name} does not exist. Get the Free Spoken Digit Dataset from its site,\n"
                            "github.com/Jakobovski/free-spoken-digit-dataset, and name its folder recordings: --data"
                        )
                    shutil.copyfile(options.data / name, target / name)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="the folder of recordings")


if __name__ == "__main__":
    main(__doc__, study, prepare, add_options)
