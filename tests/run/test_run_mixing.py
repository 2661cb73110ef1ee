"""Silos that are given synthetic samples: once, checked, as far as they allow it, and to the same weights on any wire.

In one event loop the "synthetic" samples are digits that no silo has: a generator that draws well.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from federated import in_loop
from sklearn.datasets import load_digits
from support import RULES, Commands, Federation
from trained import TrainedWorld

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.config.silo import Data
from gptfl_dist.config.synthesis import Filter, Synthesis
from gptfl_dist.errors import PolicyError, StorageError
from gptfl_dist.learning.data import load_images
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.mixing import drawn, write_samples
from gptfl_dist.learning.models import build_model
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.settings import request_of
from gptfl_dist.run.stages import is_generated
from gptfl_dist.run.synthetic import SAMPLES, samples_for_silos, synthetic_parts
from gptfl_dist.synthesis.store import locked
from gptfl_dist.weights import WeightsFile
from gptfl_dist.weights.flat import FlatModel
from gptfl_dist.weights.sealed import use_key

QUICK = {"epochs": 4, "batch_size": 16, "learning_rate": 0.3}
PER_LABEL = 20


class MixedWorld(TrainedWorld):
    """Two silos, of which one has the digits 0 to 4 and the other 5 to 9, 200 each; both are given 20 of each label."""

    def __init__(self, folder: Path, use: str = "missing", **settings: Any) -> None:
        order, labels = np.random.default_rng(0).permutation(1797), load_digits().target
        low, high = order[labels[order] < 5], order[labels[order] >= 5]
        parts = {"low": low[:200], "high": high[:200], "drawn": np.concatenate([low[200:400], high[200:400]])}
        test = np.concatenate([low[400:], high[400:]])
        silos = [{"name": "low"}, {"name": "high"}]
        mixing = {"samples": use, "per_label": PER_LABEL}
        super().__init__(folder, parts, test, silos=silos, training=QUICK, mixing=mixing, **settings)
        synthetic = load_images(Data(path=folder / "drawn.npz"), self.file.task, self.file.labels)
        write_samples(self.file.run_folder / SAMPLES, drawn(synthetic, PER_LABEL, 0))
        self.trainers = dict.fromkeys(("low", "high"))
        self.progress: list[tuple[str, int, int]] = []

    def given(self, silo: str) -> Path:
        return self.folder / silo / "samples.safetensors"


async def after_rounds(folder: Path, use: str, rounds: int = 3) -> MixedWorld:
    folder.mkdir()
    async with MixedWorld(folder, use, federation={"rounds": rounds}) as world:
        await world.federate()
    return world


@in_loop
async def test_silos_with_half_of_the_labels_each_learn_all_where_the_others_are_filled(tmp_path: Path) -> None:
    plain, filled, whole = [await after_rounds(tmp_path / use, use) for use in ("none", "missing", "all")]
    assert not plain.given("low").exists()
    assert filled.accuracy() > plain.accuracy() + 0.1
    assert whole.accuracy() > plain.accuracy() + 0.1


@in_loop
async def test_what_a_silo_tells_is_of_its_own_samples_alone(tmp_path: Path) -> None:
    told = {}
    for use in ("none", "missing", "all"):
        world = await after_rounds(tmp_path / use, use, rounds=1)
        record = world.record()
        told[use] = [(order.silo, order.samples, order.metrics["samples"]) for order in record.rounds[0].orders]
        for silo in ("low", "high"):
            assert len(world.trainers[silo].trainer._training) == 180
    assert told["missing"] == told["all"] == told["none"]
    assert {samples for _, samples, _ in told["none"]} == {180}


@in_loop
async def test_progress_is_told_in_batches_of_its_own_samples(tmp_path: Path) -> None:
    async with MixedWorld(tmp_path, "all", federation={"rounds": 1}) as world:
        await world.federate()
        trainer = world.trainers["low"].trainer
        (order,) = (each for each in world.trainers["low"].orders if each.training is not None)
        seen: list[tuple[int, int]] = []
        trainer.train(
            round_=1, settings=order.training, weights=world.folder / "low" / "weights.safetensors", update=None,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
    batches = QUICK["epochs"] * (180 // 16 + 1)
    assert {total for _, total in seen} == {batches}
    assert seen == sorted(seen)
    assert (seen[-1], len(seen)) == ((batches, batches), 4 * (380 // 16 + 1))
    told = trainer._as_of_own(lambda done, total: seen.append((done, total)), order.training)
    told(0, 0)  # as a training function says that does not know how much there is to do
    assert seen[-1] == (0, 0)


@in_loop
async def test_they_are_fetched_once_and_kept_over_a_restart(tmp_path: Path) -> None:
    async with MixedWorld(tmp_path, federation={"rounds": 3}) as world:
        size = (world.file.run_folder / SAMPLES).stat().st_size
        held = world.network.hold("low", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await held.reached.wait()
        made = world.given("low").stat()
        await world.kill("low")
        world.join("low")
        record = await run
        assert world.given("low").stat() == made
    down = [r.bytes_down for r in record.rounds]
    weights = world.layout.nbytes
    assert down[1:] == [3 * weights, 2 * weights, 2 * weights]  # the weights themselves are fetched anew
    assert 2 * weights + 2 * size - 1024 < down[0] < 2 * weights + 2 * size


@in_loop
async def test_what_was_changed_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    async with MixedWorld(tmp_path, federation={"rounds": 2}) as world:
        held = world.network.hold("low", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await held.reached.wait()
        await world.kill("low")
        content = bytearray(world.given("low").read_bytes())
        content[-1] ^= 1
        world.given("low").write_bytes(content)
        world.join("low")
        await run
        with WeightsFile(world.given("low")) as here, WeightsFile(world.file.run_folder / SAMPLES) as there:
            assert here.digest() == there.digest()


@pytest.mark.parametrize("how", ["deleted", "changed"])
@in_loop
async def test_what_is_lost_while_the_silo_runs_is_fetched_again(tmp_path: Path, how: str) -> None:
    async with MixedWorld(tmp_path, federation={"rounds": 2}) as world:
        held = world.network.hold("low", "upload", round=1)
        run = asyncio.create_task(world.federate())
        await held.reached.wait()
        if how == "deleted":
            world.given("low").unlink()
        else:
            world.given("low").write_bytes(world.given("low").read_bytes()[:-1] + b"?")
        held.release()
        await run
        with WeightsFile(world.given("low")) as here, WeightsFile(world.file.run_folder / SAMPLES) as there:
            assert here.digest() == there.digest()


@in_loop
async def test_a_run_hands_out_the_samples_that_it_began_with_or_none(tmp_path: Path) -> None:
    async with MixedWorld(tmp_path) as world:
        async with world.coordinator():
            pass
        samples = world.file.run_folder / SAMPLES
        whole = samples.read_bytes()
        samples.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StorageError, match=r"samples\.safetensors .* began with") as refusal:
            async with world.coordinator():
                pass
        assert "delete it" in refusal.value.hint
        samples.write_bytes(whole)
        async with world.coordinator():
            pass


@in_loop
async def test_a_silo_takes_no_more_than_its_policy_allows(tmp_path: Path) -> None:
    async with MixedWorld(tmp_path) as world:
        silo = world.silos["low"]
        none = silo.policy.model_copy(update={"max_synthetic": 0})
        world.silos["low"] = silo.model_copy(update={"policy": none})
        async with world.coordinator():
            world.join("low")
            with pytest.raises(PolicyError, match=r"hands out \d+ bytes of synthetic samples, policy.max_synthetic"):
                await world._running["low"]
    assert not world.given("low").exists()


# Real processes


Make = Callable[..., Federation]


def handing_out(folder: Path, use: str = "all", **settings: Any) -> Federation:
    """A federation from random weights that hands out digits which the embedded generator drew."""
    return Federation(
        folder, epochs=2, labels=["zero", "one"],
        synthesis={"generator": {"steps": 2}, "images_per_label": 30, "shard_size": 20},
        mixing={"samples": use, "per_label": 25}, **settings,
    )  # fmt: skip


@pytest.fixture
def mixing(tmp_path: Path) -> Make:
    return lambda name, use="all", **settings: handing_out(tmp_path / name, use, **settings)


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """One that was run in one process."""
    folder = tmp_path_factory.mktemp("memory")
    federation = handing_out(folder / "federation")
    Commands(folder).run("run", federation.path, "--exchange", "memory")
    return federation


@pytest.mark.parametrize("way", ["grpc", "mpi"])
def test_every_wire_comes_to_the_same_weights(gptfl: Commands, mixing: Make, in_memory: Federation, way: str) -> None:
    each = mixing(way)
    command = gptfl.start("run", each.path) if way == "grpc" else gptfl.mpi(2, "run", each.path)
    assert command.wait() == 0, command.stderr
    assert each.result() == in_memory.result()
    with WeightsFile(each.run_folder / SAMPLES) as given:
        assert given.layout.tensors[0].shape == (50,)


def test_a_finished_set_is_read_while_another_run_holds_it(
    gptfl: Commands, mixing: Make, in_memory: Federation
) -> None:
    beside = mixing("beside")
    made = shutil.copytree(in_memory.folder / "synthetic", beside.folder / "synthetic")
    with locked(made):
        gptfl.run("run", beside.path, "--exchange", "memory")
    assert beside.result() == in_memory.result()
    file = load_federation(beside.path)
    assert is_generated(file, beside.folder)
    assert not is_generated(file.model_copy(update={"seed": 1}), beside.folder), "of other noise"
    assert not is_generated(file.model_copy(update={"synthesis": filtered(file)}), beside.folder), "not selected from"
    shard = min(made.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not is_generated(file, beside.folder), "a shard is to be made again"


def filtered(file: FederationFile) -> Synthesis:
    return file.synthesis.model_copy(update={"filter": Filter(judge="cross")})


def test_without_mixing_no_synthetic_set_is_made(gptfl: Commands, mixing: Make, in_memory: Federation) -> None:
    plain = mixing("plain", "none")
    gptfl.run("run", plain.path, "--exchange", "memory")
    assert plain.result() != in_memory.result()
    assert not (plain.folder / "synthetic").exists()


def test_they_are_encrypted_at_rest_where_weights_are(gptfl: Commands, mixing: Make) -> None:
    federation = mixing("sealed")
    key = federation.folder / "silo.key"
    key.write_text("b6" * 32)
    key.chmod(0o600)
    for name in federation.silos:
        path = federation.folder / f"{name}.yaml"
        path.write_text(dump_yaml({**yaml.safe_load(path.read_text()), "at_rest": {"key_file": key.name}}))
    gptfl.run("run", federation.path)
    (given,) = (federation.run_folder / "silos" / "silo-1").glob("samples.safetensors")
    with WeightsFile(federation.run_folder / SAMPLES) as plain:
        content = plain.read(0, plain.nbytes)
    assert content[-4096:] not in given.read_bytes()
    try:
        use_key(bytes.fromhex("b6" * 32))
        with WeightsFile(given) as sealed:
            assert sealed.read(0, sealed.nbytes) == content
    finally:
        use_key(None)


@pytest.mark.parametrize("exchange", ["grpc", "memory"])
def test_models_are_judged_by_what_no_silo_and_no_pretraining_is_given(
    gptfl: Commands, mixing: Make, exchange: str
) -> None:
    rules = {**RULES, "rounds": 2, "choose_by": "synthetic"}
    federation = mixing("judged", federation=rules, training={"batch_size": 8, "learning_rate": 0.01})
    gptfl.run("run", federation.path, "--exchange", exchange)
    assert federation.summary()["chosen_by"] == "synthetic"
    assert "chosen on held-out synthetic data" in (federation.run_folder / "report.html").read_text()
    file = load_federation(federation.path)
    trained, held_out = synthetic_parts(file, federation.folder)
    given = samples_for_silos(file, federation.folder)
    assert (len(trained), len(held_out), len(given)) == (54, 6, 50)
    seen = {image.numpy().tobytes() for image in (*trained.images, *given.images)}
    assert not seen & {image.numpy().tobytes() for image in held_out.images}
    with closing(Ledger(file.run_folder, request_of(federation.path, file))) as ledger:
        record = ledger.arm("fedavg_random")
    assert record is not None
    assert len(record.judged) == 3
    assert record.best_round == max(range(3), key=lambda r: (record.judged[r][0], -record.judged[r][1]))
    model = FlatModel(build_model(file.model, file.task, 2, 0))
    model.load(federation.run_folder / "models" / "fedavg_random-final.safetensors")
    found = evaluate(model.model, held_out, file.task, device="cpu")
    assert record.judged[2] == pytest.approx((found.accuracy, found.loss), rel=1e-5)
