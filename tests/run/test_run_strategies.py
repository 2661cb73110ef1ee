"""Federations that train for real, under each strategy: what malicious silos can do, and what skew does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federated import in_loop
from trained import TrainedWorld

from gptfl_dist.weights.flat import FlatModel


def shuffled(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(1797)


def even(silos: int, samples: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """So many silos that have so many digits each, drawn alike; and the rest, to test on."""
    order = shuffled()
    parts = {f"silo-{number}": order[number * samples : (number + 1) * samples] for number in range(silos)}
    return parts, order[silos * samples :]


def backwards(flat: FlatModel, received: Path) -> None:
    """Goes the other way, ten times as far as it trained."""
    local = {name: tensor.clone() for name, tensor in flat.model.state_dict().items()}
    flat.load(received)
    for name, tensor in flat.model.state_dict().items():
        tensor.sub_(10 * (local[name] - tensor))


def noise(flat: FlatModel, received: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    for tensor in flat.model.state_dict().values():
        tensor.add_(100 * torch.randn(tensor.shape, generator=generator))


QUICK = {"epochs": 4, "batch_size": 16, "learning_rate": 0.5}
BOUNDS = {"median": 5, "trimmed_mean": 5, "geometric_median": 5, "krum": 7, "multi_krum": 7}
"""How many silos each rule needs to bear two."""


@pytest.mark.parametrize("rule", [*BOUNDS, "mean"])
@in_loop
async def test_two_malicious_silos_ruin_the_mean_and_no_robust_rule(tmp_path: Path, rule: str) -> None:
    parts, test = even(BOUNDS.get(rule, 7), 150)
    spoils = {"silo-1": backwards, "silo-2": noise}
    strategy = {"rule": rule, "malicious": 2} if rule in BOUNDS else {}
    async with TrainedWorld(
        tmp_path, parts, test, spoils, strategy=strategy, training=QUICK, federation={"rounds": 6}
    ) as world:
        await world.federate()
    assert world.accuracy() > 0.7 if rule in BOUNDS else world.accuracy() < 0.3
