"""Clips: one channel of float32 from -1 to 1 at a known rate, read from any file that libsndfile knows.

What a file claims to hold is checked before memory is taken for it. The libraries (the extra `audio`) are loaded where
a file is read.
"""

from __future__ import annotations

import io
import wave
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gptfl_dist.errors import DataError, first_line

SUFFIXES = frozenset({".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"})
MAX_SAMPLES = 2**24
"""Of a file, over all its channels and at either rate: 64 MiB of float32, some 17 minutes at 16 kHz."""

SILENCE = 40.0  # decibels below a clip's loudest part
_PART = 0.01  # seconds of which the loudness is taken
_REPLACE = "replace it, or remove it from the data"


def read_clip(where: str, source: Path | bytes, rate: int) -> np.ndarray:
    """The mean of a file's channels at `rate`, float32 (samples,), without the silence at both ends.

    Raises DataError that names `where`: damaged, empty or too long, or a library is not installed. Raises OSError.
    """
    soundfile = _library("soundfile")
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            claimed = file.frames * max(file.channels, rate / file.samplerate)
            if claimed > MAX_SAMPLES:
                raise DataError(
                    f"the clip {where} is too long to read: {file.frames} samples of {file.channels} channel(s) at "
                    f"{file.samplerate} Hz, expected at most {MAX_SAMPLES} in all",
                    hint="cut it into clips of one label each, or remove it from the data",
                )
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
            found = file.samplerate
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"the clip {where} is damaged, empty or of no known format: {first_line(error)}", hint=_REPLACE
        ) from error
    if not len(samples) or not np.isfinite(samples).all():
        what = "values that are no numbers" if len(samples) else "no samples"
        raise DataError(f"the clip {where} has {what}", hint=_REPLACE)
    return trimmed(resampled(samples, found, rate), rate)


def resampled(samples: np.ndarray, found: int, rate: int) -> np.ndarray:
    """A clip of `found` samples a second at another rate."""
    if found == rate:
        return samples
    return np.asarray(_library("soxr").resample(samples, found, rate), dtype=np.float32)


def trimmed(samples: np.ndarray, rate: int) -> np.ndarray:
    """A clip from its first to its last part that is no silence; of silence alone the whole."""
    step = max(1, round(_PART * rate))
    power = np.add.reduceat(samples.astype(np.float64) ** 2, np.arange(0, len(samples), step))
    loud = np.flatnonzero(power > power.max() * 10 ** (-SILENCE / 10))
    return samples[loud[0] * step : (loud[-1] + 1) * step] if len(loud) else samples


def fitted(samples: np.ndarray, length: int) -> np.ndarray:
    """A clip of `length` samples: cut, or padded with silence, alike at both ends."""
    before = (len(samples) - length) // 2
    if before >= 0:
        return samples[before : before + length]
    return np.pad(samples, (-before, length - len(samples) + before))


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    """A clip as a WAV file of 16 bits a sample; the same clip gives the same bytes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(
            f"audio needs the library {name}, which is not installed",
            hint="install it, with all that audio needs: pip install 'gptfl-dist[audio]'",
        ) from error
