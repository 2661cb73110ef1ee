"""The front end against the one of `transformers`, and by what it must show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.audio.spectrogram import mel_filters, spectrogram
from gptfl_dist.config.task import Task
from gptfl_dist.config.units import format_duration


def task(**settings: object) -> Task:
    return Task.model_validate({"kind": "audio", **settings})


def noise(task: Task, seed: int = 0) -> np.ndarray:
    """Coloured noise, so that the bands differ."""
    return np.convolve(np.random.default_rng(seed).normal(size=task.clip_samples), np.ones(8) / 8, "same") / 8


@pytest.mark.parametrize(("rate", "bins"), [(8000, 40), (16_000, 80), (16_000, 128), (44_100, 128)])
def test_it_is_the_log_mel_spectrogram_of_transformers(rate: int, bins: int) -> None:
    from transformers import audio_utils

    settings = task(sample_rate=rate, bins=bins)
    clip = noise(settings)
    length = settings.window_samples
    filters = mel_filters(rate, length, bins)
    expected_filters = audio_utils.mel_filter_bank(filters.shape[1], bins, 0.0, rate / 2, rate, mel_scale="htk")
    assert np.allclose(filters.T, expected_filters, atol=1e-5)
    decibels = audio_utils.spectrogram(
        clip,
        audio_utils.window_function(length, "hann"),
        frame_length=length,
        hop_length=settings.hop_samples,
        fft_length=2 * (filters.shape[1] - 1),
        power=2.0,
        center=False,
        mel_filters=expected_filters,
        mel_floor=1e-12,
        log_mel="dB",
    )
    expected = 255 * (1 + np.maximum(decibels - decibels.max(), -settings.depth) / settings.depth)
    made = spectrogram(clip, settings)
    assert made.shape == expected.shape == settings.shape[1:]
    assert np.abs(made - expected).max() < 0.6  # of 255 steps: rounding


@pytest.mark.parametrize("hertz", [200, 1000, 3000])
def test_a_tone_is_a_line_in_its_band(hertz: int) -> None:
    settings = task(sample_rate=8000)
    clip = np.sin(2 * np.pi * hertz * np.arange(8000) / 8000)
    rows = spectrogram(clip, settings).mean(axis=1)
    mel = 2595 * np.log10(1 + hertz / 700) / (2595 * np.log10(1 + 4000 / 700))
    assert abs(int(rows.argmax()) - mel * 129 + 1) <= 2


def test_loudness_makes_no_difference_and_silence_is_black() -> None:
    settings = task()
    clip = noise(settings)
    assert np.array_equal(spectrogram(clip, settings), spectrogram(clip / 64, settings))
    assert spectrogram(clip, settings).max() == 255
    assert spectrogram(np.zeros(100), settings).max() == 0
    short = spectrogram(clip[:4000], settings)
    assert short[:, :30].max() == short[:, -30:].max() == 0


@given(
    rate=st.integers(1000, 48_000),
    milliseconds=st.tuples(st.integers(60, 1500), st.integers(10, 60), st.integers(2, 40)),
    bins=st.integers(1, 128),
    depth=st.floats(1, 120),
)
def test_every_task_gets_the_shape_that_it_says(
    rate: int, milliseconds: tuple[int, int, int], bins: int, depth: float
) -> None:
    duration, window, hop = (format_duration(count / 1000) for count in milliseconds)
    settings = task(sample_rate=rate, duration=duration, window=window, hop=hop, bins=bins, depth=depth)
    made = spectrogram(noise(settings), settings)
    assert (1, *made.shape) == settings.shape
    assert made.dtype == np.uint8
    assert mel_filters(rate, settings.window_samples, bins).any(axis=1).all()  # no band hears nothing
