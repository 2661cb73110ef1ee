"""Clips from files of many forms, and what a damaged or oversized file is answered with."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.audio.clip import MAX_SAMPLES, fitted, read_clip, trimmed, wav_bytes
from gptfl_dist.errors import DataError

RATE = 16_000


def tone(rate: int, hertz: float = 440.0, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32) / 2


def pitch(clip: np.ndarray, rate: int) -> float:
    """The frequency of a clip's loudest tone, hertz."""
    return float(np.abs(np.fft.rfft(clip)).argmax() * rate / len(clip))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_files_of_any_form_and_rate_are_the_same_sound(tmp_path: Path, name: str, rate: int) -> None:
    soundfile.write(tmp_path / name, tone(rate), rate)
    clip = read_clip(name, tmp_path / name, RATE)
    assert clip.dtype == np.float32
    assert abs(len(clip) / RATE - 0.5) < 0.02
    assert abs(pitch(clip, RATE) - 440) < 4


def test_channels_are_averaged_and_depths_do_not_matter(tmp_path: Path) -> None:
    left = tone(RATE)
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT"):
        soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), RATE, subtype=subtype)
        assert np.allclose(read_clip("a", tmp_path / "a.wav", RATE), left / 2, atol=0.01), subtype


def test_silence_at_the_ends_goes_and_silence_alone_stays() -> None:
    quiet = np.full(RATE // 4, 1e-4, np.float32)
    spoken = np.concatenate([quiet, tone(RATE), quiet * 100, tone(RATE), quiet])
    assert abs(len(trimmed(spoken, RATE)) - 1.25 * RATE) <= 2 * RATE // 100
    assert len(trimmed(np.zeros(500, np.float32), RATE)) == 500


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_fitted_clip_is_of_the_length_with_its_middle_in_the_middle(found: int, length: int) -> None:
    clip = np.arange(1, found + 1, dtype=np.float32)
    made = fitted(clip, length)
    assert len(made) == length
    kept = made[made > 0]
    assert len(kept) == min(found, length)
    assert np.array_equal(kept, clip[kept[0].astype(int) - 1 :][: len(kept)])
    outside = np.flatnonzero(made > 0)[[0, -1]]
    assert abs(outside[0] - (length - 1 - outside[1])) <= 1
    assert abs((kept[0] - 1) - (found - kept[-1])) <= 1


def test_a_clip_is_written_and_read_back(tmp_path: Path) -> None:
    clip = trimmed(tone(RATE), RATE)
    data = wav_bytes(clip, RATE)
    assert wav_bytes(clip, RATE) == data
    assert np.allclose(read_clip("a", data, RATE), clip, atol=1e-4)


def wav(samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "damaged, empty or of no known format"),
        (b"RIFF, or not", "damaged, empty or of no known format"),
        (wav(np.zeros(0, np.float32), RATE), "no samples"),
        (wav(np.full(100, np.nan, np.float32), RATE), "no numbers"),
        (wav(np.zeros(MAX_SAMPLES // 4, np.float32), 1000, "PCM_U8"), "too long"),  # sixteen times so long at our rate
        (wav(np.zeros((100_000, 200), np.float32), RATE, "PCM_U8"), "too long"),  # by its channels
    ],
)
def test_what_is_no_clip_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "7_george_0.wav"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"the clip {path} .*{said}"):
        read_clip(str(path), path, RATE)


@pytest.mark.parametrize("library", ["soundfile", "soxr"])
def test_a_missing_library_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = wav(tone(8000), 8000)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=f"the library {library}") as caught:
        read_clip("a", data, RATE)
    assert "gptfl-dist[audio]" in caught.value.hint
