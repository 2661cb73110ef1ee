"""Federations that train for real, under each strategy: what malicious silos can do, and what skew does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federated import in_loop
from flat_buffers import Flat
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from trained import TrainedWorld

from gptfl_dist.learning.data import ImageSet, load_images, split
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.preprocess import normalise
from gptfl_dist.learning.seeding import derive_seed
from gptfl_dist.weights import Layout
from gptfl_dist.weights.beside import control_places
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


def skewed(*samples: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Silos that have so many digits each, sorted by label: none has what another has; and a thousand to test on."""
    order, labels = shuffled(), load_digits().target
    chosen = order[: sum(samples)]
    parts = np.split(chosen[np.argsort(labels[chosen], kind="stable")], np.cumsum(samples)[:-1])
    return {f"silo-{number}": part for number, part in enumerate(parts)}, order[-700:]


class Paper:
    """SCAFFOLD as algorithm 1 has it, full-batch, with flat vectors in memory: nothing of ours but model and data."""

    def __init__(self, world: TrainedWorld, steps: int, rate: float) -> None:
        self.model = build_model(world.file.model, world.file.task, 10, seed=0)
        self.data, self.steps, self.rate = {}, steps, rate
        for name, silo in world.silos.items():
            images = load_images(silo.data, world.file.task, world.file.labels)
            self.data[name], _ = split(images, 0.1, derive_seed(world.file.seed, "validation", name))
        self.x = parameters_to_vector(self.model.parameters()).detach()
        self.c = torch.zeros_like(self.x)
        self.own = {name: torch.zeros_like(self.x) for name in world.silos}
        self.task = world.file.task

    def round(self, cohort: tuple[str, ...]) -> None:
        moved, more = torch.zeros_like(self.x), torch.zeros_like(self.c)
        for silo in cohort:
            y = self.x.clone()
            for _ in range(self.steps):
                y = y - self.rate * (self.gradient(y, self.data[silo]) - self.own[silo] + self.c)
            now = self.own[silo] - self.c + (self.x - y) / (self.steps * self.rate)
            moved, more = moved + (y - self.x) / len(cohort), more + (now - self.own[silo])
            self.own[silo] = now
        self.x, self.c = self.x + moved, self.c + more / len(self.own)

    def gradient(self, weights: torch.Tensor, data: ImageSet) -> torch.Tensor:
        vector_to_parameters(weights.clone(), self.model.parameters())
        loss = F.cross_entropy(self.model(normalise(data.images, self.task)), data.labels)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(self.model.parameters()))])


def in_order(layout: Layout, flat: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Numbers in the layout's order as a vector in the order of the model's parameters."""
    places = dict(control_places(layout))
    return torch.cat([flat[places[name]] for name, _ in model.named_parameters()])


def tensor_of(path: Path, name: str) -> torch.Tensor:
    return load_file(path)[name]


FULL = {"epochs": 3, "batch_size": 1000, "learning_rate": 0.3, "clip_norm": None}
SCAFFOLD = {
    "strategy": {"rule": "scaffold"},
    "training": FULL,
    "federation": {"rounds": 5, "cohort": 2},
}


@in_loop
async def test_scaffold_is_the_papers_over_rounds_that_silos_miss(tmp_path: Path) -> None:
    """Two of three silos a round, of different sizes, as the coordinator draws them."""
    parts, test = skewed(60, 100, 140)
    async with TrainedWorld(tmp_path, parts, test, **SCAFFOLD) as world:
        await world.federate()
        record = world.record()
    paper = Paper(world, FULL["epochs"], FULL["learning_rate"])
    cohorts = [r.cohort for r in record.rounds if r.kind == "train"]
    assert len(set(cohorts)) > 1
    for cohort in cohorts:
        paper.round(cohort)
    layout = world.layout
    flat = torch.from_numpy(np.frombuffer(world.model().read_bytes()[-layout.nbytes :], "<f4").copy())
    torch.testing.assert_close(in_order(layout, flat, paper.model), paper.x, atol=2e-4, rtol=1e-3)
    state = world.file.run_folder / "strategy" / f"{record.final}.safetensors"
    control = tensor_of(state, "control")
    torch.testing.assert_close(in_order(layout, control, paper.model), paper.c, atol=2e-4, rtol=1e-3)
    own = {}
    for silo in world.silos:
        nonce = record.last_committed(silo, len(cohorts) + 1)
        kept = tmp_path / silo / "kept" / f"{nonce}.safetensors"
        assert kept.stat().st_mode & 0o777 == 0o600
        own[silo] = tensor_of(kept, "control")
        torch.testing.assert_close(in_order(layout, own[silo], paper.model), paper.own[silo], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(control, sum(own.values()) / 3, atol=1e-6, rtol=1e-4)  # absent ones included


KEEPING = {
    "scaffold": {"strategy": {"rule": "scaffold"}, "training": QUICK},
    "scaffold, encoded": {
        "strategy": {"rule": "scaffold"}, "training": QUICK, "compression": {"up": "int8", "down": "fp16"},
    },
    "moon": {"training": {**QUICK, "contrastive": 2.0}},
    "fedbn": {"training": {**QUICK, "private_norms": True}, "model": {"name": "convnet"}},
}  # fmt: skip


@pytest.mark.parametrize("strategy", KEEPING)
@in_loop
async def test_what_silos_keep_outlives_their_agents_and_the_coordinator(tmp_path: Path, strategy: str) -> None:
    """Two silos and the coordinator are killed in mid-run and started anew: the weights are those of no such run."""
    results, parts = [], skewed(60, 100, 140)
    settings = {**KEEPING[strategy], "federation": {"rounds": 4}}
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        folder.mkdir()
        async with TrainedWorld(folder, *parts, **settings) as world:
            if name == "disturbed":
                late = world.network.hold("silo-1", "upload", round=3)
                world.join(*world.silos)
                running = asyncio.create_task(world.federate_with())
                await late.reached.wait()
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                for silo in ("silo-0", "silo-1"):
                    await world.kill(silo)
                late.release()
            await world.federate()
            assert [r.kind for r in world.record().rounds] == [*["train"] * 4, "evaluate"]
        results.append(world.model().read_bytes())
    assert results[0] == results[1]


@in_loop
async def test_an_arm_knows_nothing_of_what_silos_kept_in_another(tmp_path: Path) -> None:
    """A grid of one rate twice as good as none: the arm that follows the trials is the one that was run alone."""
    parts, results = skewed(60, 100), []
    for rate in (0.3, [0.3, 1e-9]):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        training = {**FULL, "learning_rate": rate}
        async with TrainedWorld(
            folder,
            *parts,
            strategy={"rule": "scaffold"},
            training=training,
            tuning={"rounds": 2},
            federation={"rounds": 2},
        ) as world:
            await world.federate()
        results.append(world.model().read_bytes())
    assert results[0] == results[1]


@in_loop
async def test_private_norms_never_leave_their_silo(tmp_path: Path) -> None:
    parts, test = skewed(60, 100, 140)
    settings = {**KEEPING["fedbn"], "federation": {"rounds": 3}}
    async with TrainedWorld(tmp_path, parts, test, **settings) as world:
        await world.federate()
        record = world.record()
    start, end = load_file(world.file.run_folder / "random.safetensors"), load_file(world.model())
    norms = {name for name in start if name.split(".")[0] in {"1", "5", "9"}}
    assert len(norms) == 6
    for name in start:
        assert torch.equal(start[name], end[name]) == (name in norms), name
    for silo in world.silos:
        spool = Flat((world.file.run_folder / "spools" / f"{silo}.spool").read_bytes())
        for tensor in world.layout.tensors:
            sent = bytearray(tensor.nbytes)
            spool.read_into(tensor.offset, memoryview(sent))
            assert (not any(sent)) == (tensor.name in norms), tensor.name
    # A silo judges the federation's weights with its own layers: with others the same weights do worse or better.
    runner = world.trainers["silo-0"]
    nonce = record.last_committed("silo-0", 9)
    kept = tmp_path / "silo-0" / "kept" / f"{nonce}.safetensors"
    own, others = (runner.trainer.evaluate(world.model(), kept=k).metrics["loss"] for k in (kept, None))
    assert runner.told[-1]["loss"] == pytest.approx(own)
    assert own != others


@in_loop
async def test_moon_compares_with_the_model_of_the_silos_own_last_round(tmp_path: Path) -> None:
    parts, test = skewed(60, 100)
    settings = {**KEEPING["moon"], "federation": {"rounds": 2, "keep": "all"}}
    async with TrainedWorld(tmp_path, parts, test, **settings) as world:
        await world.federate()
        nonce = world.record().last_committed("silo-1", 9)
    previous = tensor_of(tmp_path / "silo-1" / "kept" / f"{nonce}.safetensors", "previous").numpy().tobytes()
    base = (world.file.run_folder / "weights" / f"{world.record().weights_of(1)}.safetensors").read_bytes()
    update = (world.file.run_folder / "spools" / "silo-1.spool").read_bytes()
    numbers = [np.frombuffer(data[-world.layout.nbytes :], "<f4") for data in (previous, base, update)]
    np.testing.assert_allclose(numbers[0], numbers[1] + numbers[2], atol=1e-6)
    assert len(list((tmp_path / "silo-1" / "kept").iterdir())) == 2  # of its newest update, and of the one before


@in_loop
async def test_fednova_frees_the_model_from_who_makes_more_steps(tmp_path: Path) -> None:
    """One round, against the weighted mean of normalised updates by hand: silos of 60 and 240 digits, batches of 10."""
    parts, test = skewed(60, 240)
    training = {"epochs": 2, "batch_size": 10, "momentum": 0.5, "proximal": 0.1}
    found = {}
    for rule in ("mean", "fednova"):
        folder = tmp_path / rule
        folder.mkdir()
        settings = {"strategy": {"rule": rule}, "training": training, "federation": {"rounds": 1}}
        async with TrainedWorld(folder, parts, test, **settings) as world:
            await world.federate()
        spools = [(world.file.run_folder / "spools" / f"silo-{n}.spool").read_bytes() for n in (0, 1)]
        start = (world.file.run_folder / "random.safetensors").read_bytes()
        found[rule] = [
            np.frombuffer(data[-world.layout.nbytes :], "<f4").astype(float)
            for data in (start, world.model().read_bytes(), *spools)
        ]
    start, end, *updates = found["fednova"]
    lengths = []
    for samples in (54, 216):
        way = speed = 0.0
        for _ in range(2 * -(-samples // 10)):
            speed = 0.5 * speed + 1 - 0.2 * 0.1 * way
            way += speed
        lengths.append(way)
    shares = [54 / 270, 216 / 270]
    effective = sum(share * length for share, length in zip(shares, lengths, strict=True))
    expected = start + sum(s * effective / n * u for s, n, u in zip(shares, lengths, updates, strict=True))
    np.testing.assert_allclose(end, expected, atol=1e-5)
    assert np.abs(found["mean"][1] - end).max() > 1e-3
