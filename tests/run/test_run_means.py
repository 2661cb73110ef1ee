"""FedNCM: a first round in which silos send class means, which make the last layer; then they train everything."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated import in_loop
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from support import RULES, Commands, Federation
from test_run_restart import live
from trained import TrainedWorld

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.silo import Data, SiloFile
from gptfl_dist.config.task import Model, Task
from gptfl_dist.errors import FederationError, ModelError, PolicyError
from gptfl_dist.federation.orders import Order
from gptfl_dist.learning.data import ImageSet, load_images, split
from gptfl_dist.learning.means import add_sums, head_from_sums, last_weight, require_means
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.preprocess import normalise
from gptfl_dist.learning.seeding import derive_seed
from gptfl_dist.run import evaluator
from gptfl_dist.run.requirements import require_built_in, require_training

HEAD = "9"  # the last layer of the model cnn
ALLOWED = {"policy": {"class_means": True}}


class MeansWorld(TrainedWorld):
    """Three silos that share no label, two of which allow class means to leave; the third as `allowed` says."""

    def __init__(self, folder: Path, *, allowed: bool = True, **settings: Any) -> None:
        order, labels = np.random.default_rng(0).permutation(1797), load_digits().target
        parts = {
            f"silo-{number}": order[:900][np.isin(labels[order[:900]], few)]
            for number, few in enumerate(([0, 1, 2], [3, 4, 5, 6], [7, 8]))
        }
        training = {"first_round": "means", "batch_size": 16, **settings.pop("training", {})}
        super().__init__(folder, parts, order[900:], training=training, **settings)
        self.silos = {
            name: silo.model_copy(
                update={"policy": silo.policy.model_copy(update={"class_means": allowed or name != "silo-2"})}
            )
            for name, silo in self.silos.items()
        }
        self._tester = evaluator.Tester(self.file.model_copy(update={"test_data": None}), folder)

    async def make_head(self, base: Path, summed: Path, made: Path) -> None:
        self._tester.make_head(base, summed, made)

    def weights_after(self, round_: int) -> dict[str, torch.Tensor]:
        digest = self.record().weights_of(round_)
        return load_file(self.file.run_folder / "weights" / f"{digest}.safetensors")


def centroids(world: MeansWorld) -> torch.Tensor:
    """The class means of all silos' training data together, each of length 1 as in the paper; label 9 has none."""
    torch.set_num_threads(1)
    model = build_model(world.file.model, world.file.task, 10, seed=0).eval()
    found, labels = [], []
    for name, silo in world.silos.items():
        images = load_images(silo.data, world.file.task, world.file.labels)
        trained, _ = split(images, 0.1, derive_seed(world.file.seed, "validation", name))
        with torch.no_grad():
            found.append(model[:-1](normalise(trained.images, world.file.task)))
        labels.append(trained.labels)
    features, truth = torch.cat(found).double(), torch.cat(labels)
    means = torch.stack([features[truth == label].mean(dim=0) for label in range(9)])
    return torch.cat([means / means.norm(dim=1, keepdim=True), torch.zeros(1, means.shape[1])])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@in_loop
async def test_the_first_rounds_head_is_the_class_means_of_all_samples_and_the_rest_is_as_it_was(
    tmp_path: Path, optimizer: str
) -> None:
    rules = {"rounds": 3, "keep": "all"}
    async with MeansWorld(tmp_path, federation=rules, strategy={"optimizer": optimizer}) as world:
        record = await world.federate()
    start, first = load_file(world.file.run_folder / "random.safetensors"), world.weights_after(1)
    expected = centroids(world)
    assert torch.allclose(first[f"{HEAD}.weight"].double(), expected, atol=1e-5)
    assert first[f"{HEAD}.weight"][9].abs().max() == 0
    assert first[f"{HEAD}.bias"].abs().max() == 0
    assert all(torch.equal(first[name], start[name]) for name in start if not name.startswith(HEAD))
    after = world.weights_after(2)
    assert not any(torch.equal(after[name], first[name]) for name in first)
    (tested,) = (each.tested for each in record.rounds if each.round == 1)
    assert tested is not None
    assert tested.accuracy > 0.5 > world.accuracy(world.file.run_folder / "random.safetensors")
    assert sorted(path.stem for path in (world.file.run_folder / "weights").iterdir()) == sorted(
        {record.weights_of(r) for r in range(4)}
    )


@in_loop
async def test_a_silo_that_does_not_allow_it_says_so_before_the_first_round(tmp_path: Path) -> None:
    async with MeansWorld(tmp_path, allowed=False) as world, world.coordinator():
        world.join("silo-2")
        with pytest.raises(PolicyError, match=r"policy\.class_means is false"):
            await world._running["silo-2"]


@in_loop
async def test_a_silo_that_does_not_allow_it_sends_nothing_though_the_plan_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Plan.of
    monkeypatch.setattr(Plan, "of", lambda *given: of(*given).model_copy(update={"class_means": False}))
    async with MeansWorld(tmp_path, allowed=False, federation={"rounds": 1}) as world:
        with pytest.raises(FederationError, match=r"silo-2: PolicyError: .* policy\.class_means is false"):
            await world.federate()
    assert world.trainers["silo-2"].orders == []


@pytest.mark.parametrize("instant", ["before close_round", "after close_round", "after commit"])
@in_loop
async def test_a_coordinator_that_was_killed_comes_to_the_same_weights(tmp_path: Path, instant: str) -> None:
    models = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        async with MeansWorld(tmp_path / name, federation={"rounds": 2}) as world:
            world.join(*world.trainers)
            if name == "killed":
                assert (await live(world, [], instant, 1)).over
            assert not (await live(world, [])).over
            models.append(world.model().read_bytes())
    assert models[0] == models[1]


def test_a_last_layer_that_means_cannot_make_is_refused() -> None:
    with pytest.raises(ModelError, match="last layer is Linear, expected a Linear of 3 outputs"):
        last_weight(build_model(Model(), Task(size=8), 4, 0), 3)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 8), torch.nn.Flatten())
    with pytest.raises(ModelError, match="last layer is Conv2d"):
        head_from_sums(network, torch.zeros(3), 3)


class Sequence(torch.nn.Module):
    """Reads an image line by line, and gives its last layer all lines at once, or each by itself."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self._at_once = at_once
        self.head = torch.nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        lines = images[:, 0]
        if self._at_once:
            return self.head(lines).mean(dim=1)
        return self.head(lines[:, 0]) + self.head(lines[:, 1])


@pytest.mark.parametrize(("at_once", "found"), [(True, r"\(2, 8, 8\) for"), (False, r"\(2, 8\) and \(2, 8\) for")])
def test_a_last_layer_that_is_given_more_than_one_row_a_sample_is_refused_before_the_round(
    at_once: bool, found: str
) -> None:
    task = Task(size=8, channels=1)
    with pytest.raises(ModelError, match=rf"last layer {found} 2 samples, expected \(2, 8\), once"):
        require_means(Sequence(at_once), task, 4)
    for name in ("cnn", "convnet"):
        require_means(build_model(Model(name=name), task, 4, 0), task, 4)


def test_no_more_features_than_a_batch_has_are_kept(tmp_path: Path) -> None:
    """By the weak references of what the last layer was given."""
    task, alive = Task(size=8, channels=1), []
    model = build_model(Model(), task, 2, 0)
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(given[0].untyped_storage()))

    model[-1].register_forward_pre_hook(watch)
    images = torch.randint(0, 256, (1000, 1, 8, 8), dtype=torch.uint8)
    add_sums(model, ImageSet(images, torch.arange(1000) % 2, ("a", "b")), task, device="cpu", threads=1)
    assert len(seen) == 8
    assert max(alive) <= 1


def test_a_script_of_ones_own_makes_no_means() -> None:
    silo = SiloFile.model_validate({"name": "s", "code": {"script": "train.py"}})
    training = {"epochs": 1, "batch_size": 1, "learning_rate": 1, "momentum": 0, "weight_decay": 0, "threads": 1}
    orders = [
        Order("train", "n", "a", 1, "", 1.0, LocalTraining(**training, augmentation=False, trained=trained))
        for trained in ("means", "all")
    ]
    with pytest.raises(PolicyError, match="asks for class means"):
        require_training(silo, orders[0])
    require_training(silo, orders[1])
    plan = Plan(federation="f", seed=0, labels=["a", "b"], task=Task(), model=Model(), class_means=True)
    with pytest.raises(PolicyError, match="asks for class means"):  # before the first round
        require_built_in(silo, plan)
    require_built_in(silo, plan.model_copy(update={"class_means": False}))
    require_training(silo.model_copy(update={"code": None, "data": Data(path=Path("x"))}), orders[0])


def test_every_wire_comes_to_the_same_weights(gptfl: Commands, tmp_path: Path) -> None:
    found = {}
    for way in ("grpc", "memory", "mpi"):
        rules = {**RULES, "rounds": 2}
        training = {"batch_size": 8, "learning_rate": 0.01, "first_round": "means"}
        each = Federation(tmp_path / way, federation=rules, training=training)
        for name in each.silos:
            path = each.folder / f"{name}.yaml"
            path.write_text(path.read_text() + dump_yaml(ALLOWED))
        options = () if way == "mpi" else ("--exchange", way)
        command = gptfl.mpi(3, "run", each.path) if way == "mpi" else gptfl.start("run", each.path, *options)
        assert command.wait() == 0, command.stderr
        found[way] = each.result()
    assert found["grpc"] == found["memory"] == found["mpi"]
