"""Sorts the Free Spoken Digit Dataset into what this example's silos hold: python prepare.py FOLDER_OF_RECORDINGS

The recordings are named DIGIT_SPEAKER_NUMBER.wav. Each speaker is a silo, data/SPEAKER/LABEL/...; the numbers 0 to 4,
by the data set's convention its test split, go to data/test/LABEL/... and to no silo.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "data"
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST = range(5)

if len(sys.argv) != 2 or not (recordings := sorted(Path(sys.argv[1]).glob("?_*_*.wav"))):
    raise SystemExit("usage: python prepare.py FOLDER, one that holds recordings such as 7_george_12.wav")
for recording in recordings:
    digit, speaker, number = recording.stem.split("_")
    target = FOLDER / ("test" if int(number) in TEST else speaker) / LABELS[int(digit)]
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recording, target / recording.name)
for silo in sorted(FOLDER.iterdir()):
    print(f"{silo.name}: {len(list(silo.glob('*/*.wav')))} recordings")
