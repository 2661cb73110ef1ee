"""SCAFFOLD at the server (arXiv:1910.06378, algorithm 1): its control variate c, an estimate of the mean gradient.

Each silo has a control variate c_i of its own and sends its increase with its update. With N silos in the federation,
of which those in S took part:

    x <- x + step of 1 / |S| sum_S (y_i - x)         c <- c + |S| / N * 1 / |S| sum_S (c_i+ - c_i)

So c stays the mean of all c_i, those of the absent ones included. As in the paper each silo counts alike. c is part of
the strategy's state; how it is used: see `learning.scaffold`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gptfl_dist.aggregation.mean import weighted_mean
from gptfl_dist.aggregation.updates import Updates, Vector
from gptfl_dist.config.strategy import Strategy
from gptfl_dist.weights import FlatReader, Layout
from gptfl_dist.weights.beside import control_layout


def scaffold(updates: Updates, strategy: Strategy) -> Vector:
    return np.full(len(updates), 1 / len(updates))


def next_control(
    model: Layout, control: FlatReader, increases: Sequence[FlatReader], silos: int
) -> Iterator[bytes | memoryview]:
    """The next c as consecutive blocks; `increases` are those of c_i of the silos that took part, of `silos` in all."""
    named = {f"{number:09d}": increase for number, increase in enumerate(increases)}
    shares = dict.fromkeys(named, 1 / silos)
    return weighted_mean(control_layout(model), control, named, shares, lambda place, before, more: before + more)
