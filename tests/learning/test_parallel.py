"""Training by several ranks: the weights of one rank, but for rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parallel_weights import Weights, weights_of
from ranks import torchrun


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights_of([sys.executable], tmp_path_factory.mktemp("alone") / "weights", "cpu")


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_of_a_group_come_to_the_weights_of_one(ranks: int, alone: Weights, tmp_path: Path) -> None:
    """Whole model, head alone, batch norms, terms of strategies, clipping, warps, a batch smaller than the group."""
    together = weights_of(torchrun(ranks), tmp_path / "weights", "cpu")
    assert together.keys() == alone.keys()
    for name, weights in together.items():
        # Adam makes a step of a gradient that is all rounding, so its weights differ by more than those of SGD.
        tolerance = 1e-4 if name == "pretrained" else 1e-5
        assert torch.allclose(weights, alone[name], rtol=tolerance, atol=tolerance), (
            name,
            float((weights - alone[name]).abs().max()),
        )
