"""The section `mixing`: synthetic samples that every silo is given once, to train on beside its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from gptfl_dist.config.base import Section

Use = Literal["all", "missing"]
"""What a silo trains on of them: all, or of each label of which it has too few as many as it lacks."""


class Mixing(Section):
    """Whether silos are given synthetic samples, what they do with them, and how many of each label there are."""

    samples: Literal["none", "all", "missing"] = "none"
    per_label: PositiveInt = 100


class HandedOut(Section):
    """What a silo is told of the samples before it asks for them: BLAKE3 in hex, how many there are, and their use.

    Their shape and their labels are those of the task, so their size is known before a byte of them is.
    """

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    count: PositiveInt
    use: Use
    per_label: PositiveInt
