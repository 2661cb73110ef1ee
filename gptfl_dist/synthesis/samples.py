"""Which images make up a synthetic set: label, prompt, seed and guidance scale of each, from the run's seed alone.

One hash of (run seed, label, index) gives a sample everything that is drawn for it. Nothing depends on the other
samples, so any part of the set can be made at any time, on any process, and comes out the same. Samples are
interleaved by label: the first pictures that are made already show every label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3


@dataclass(frozen=True)
class Sample:
    """One image to make: the `index`-th of its label; `label` is a position in the federation's labels."""

    label: int
    index: int
    seed: int
    prompt: str
    guidance: float


def draws(run_seed: int, label: str, index: int) -> tuple[int, int, int]:
    """Three independent numbers of 63 bits for one sample: its seed, and those that choose its prompt and guidance."""
    digest = blake3(json.dumps([run_seed, label, index]).encode()).digest()
    seed, prompt, guidance = (int.from_bytes(digest[at : at + 8], "big") >> 1 for at in (0, 8, 16))
    return seed, prompt, guidance


def plan_samples(
    labels: Sequence[str],
    prompts: Mapping[str, Sequence[str]],
    guidance: Sequence[float],
    run_seed: int,
    images_per_label: int,
) -> list[Sample]:
    """All samples of a set in storage order. Each one's prompt and guidance scale are drawn from those given."""
    samples = []
    for index in range(images_per_label):
        for position, label in enumerate(labels):
            seed, prompt, scale = draws(run_seed, label, index)
            choices = prompts[label]
            samples.append(
                Sample(position, index, seed, choices[prompt % len(choices)], guidance[scale % len(guidance)])
            )
    return samples
