"""The front end: a clip as its log-mel spectrogram, a grey picture with a row a mel band and a column a window.

Power spectra of Hann windows, summed by triangular bands that are evenly spaced in mel (HTK's scale), in decibels below
the clip's loudest value, so that how loud a recording is makes no difference. The `depth` decibels from black to white
are stored in 256 steps, finer than anything that tells two clips apart. Everything after it deals with pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from gptfl_dist.audio.clip import fitted
from gptfl_dist.config.task import Task

_LARGEST_FFT = 2**17


def spectrogram(samples: np.ndarray, task: Task) -> np.ndarray:
    """A clip at the task's rate, cut or padded to its duration, as uint8 (bins, windows), the lowest band first.

    Silence is black.
    """
    clip = np.asarray(fitted(samples, task.clip_samples), dtype=np.float32)
    length = task.window_samples
    windows = np.lib.stride_tricks.sliding_window_view(clip, length)[:: task.hop_samples]
    bands = _bands(task.sample_rate, length, task.bins)
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)
    spectrum = np.fft.rfft(windows * hann, n=bands.transform)
    powers = spectrum.real**2 + spectrum.imag**2
    power = np.stack([powers[:, part] @ weights for part, weights in bands.weights], axis=1)
    loudest, faintest = power.max(), 10 ** (-task.depth / 10)
    share = power / loudest if loudest > 0 else power
    level = 1 + 10 * np.log10(np.maximum(share, faintest)) / task.depth
    picture: np.ndarray = np.rint(level.T * 255).astype(np.uint8)
    return picture


@dataclass(frozen=True)
class _Bands:
    """The length of the transform, and of each band the frequencies that it holds, with their weights."""

    transform: int
    weights: list[tuple[slice, np.ndarray]]


@cache
def _bands(rate: int, window: int, bins: int) -> _Bands:
    """`mel_filters` without what is 0.

    A product with all of them is large enough for the linear algebra library to share it out over the cores, which for
    one clip takes ten times as long as the product itself.
    """
    filters = mel_filters(rate, window, bins)
    held = [np.flatnonzero(row) for row in filters]
    parts = [slice(int(each[0]), int(each[-1]) + 1) for each in held]
    weights = [(part, row[part].copy()) for part, row in zip(parts, filters, strict=True)]
    return _Bands(2 * (filters.shape[1] - 1), weights)


def mel_filters(rate: int, window: int, bins: int) -> np.ndarray:
    """The weights (bins, frequencies) of the triangular bands from 0 Hz to half the rate, each 1 at its centre.

    The transform is as long as needed for every band to hold a frequency: low bands are narrower than the resolution
    of a short window.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bins + 2) / 2595) - 1)
    size = 1 << (window - 1).bit_length()
    while True:
        frequencies = np.linspace(0, rate / 2, size // 2 + 1)
        rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
        falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
        filters = np.maximum(0, np.minimum(rising, falling))
        if filters.any(axis=1).all() or size >= _LARGEST_FFT:
            return filters.astype(np.float32)
        size *= 2
