"""Training on a GPU: as on the CPU but for rounding, alone and by several ranks, gone on from a checkpoint too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parallel_weights import Weights, weights_of
from ranks import torchrun
from torch import nn

from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.learning.checkpoint import Checkpoint
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.pretrain import Pretrained, pretrain

pytestmark = pytest.mark.gpu
TASK = Task(size=16)
PER_EPOCH = 9  # batches, of 270 samples


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights_of([sys.executable], tmp_path_factory.mktemp("cpu") / "weights", "cpu")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights_of([sys.executable], tmp_path_factory.mktemp("gpu") / "weights", "cuda")


def near(mine: Weights, other: Weights, tolerance: float) -> None:
    assert mine.keys() == other.keys()
    # Pre-training computes in 16 bits on a GPU, and Adam makes a step of a gradient that is all rounding.
    for name in mine.keys() - {"pretrained", "pretrained-figures"}:
        furthest = float((mine[name] - other[name]).abs().max())
        assert torch.allclose(mine[name], other[name], rtol=tolerance, atol=tolerance), (name, furthest)
    figures = (mine["pretrained-figures"] - other["pretrained-figures"]).abs()
    assert float(figures.max()) < 0.1, figures


def test_a_gpu_comes_to_the_weights_of_a_cpu(on_gpu: Weights, on_cpu: Weights) -> None:
    """Whole model, head alone, batch norms, terms of strategies, clipping, warps."""
    near(on_gpu, on_cpu, 5e-3)  # convolutions take the TF32 of the GPU


def test_ranks_that_share_a_gpu_come_to_the_weights_of_one(on_gpu: Weights, tmp_path: Path) -> None:
    near(weights_of(torchrun(2 * torch.cuda.device_count()), tmp_path / "weights", "cuda"), on_gpu, 5e-3)


def test_ranks_with_a_gpu_each_come_to_the_weights_of_one(on_gpu: Weights, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    near(weights_of(torchrun(torch.cuda.device_count()), tmp_path / "weights", "cuda"), on_gpu, 5e-3)


class Ended(BaseException):
    """Stands for whatever ends a process."""


def striped(samples: int) -> ImageSet:
    """Images whose brightness tells the label, under noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 3
    images = torch.randint(0, 120, (samples, 1, 16, 16), generator=draw) + 60 * labels.view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels, ("a", "b", "c"))


def pretrained(checkpoint: Checkpoint | None = None, end: int = -1) -> tuple[Pretrained, nn.Module, int]:
    """A pre-training on the GPU, ended after `end` batches: its result, its model, and which batch was its first."""
    done: list[int] = []

    def progress(batch: int, total: int) -> None:
        done.append(batch)
        if batch == end:
            raise Ended

    model = build_model(Model(), TASK, 3, seed=0)
    settings = Pretraining(epochs=6, batch_size=30, learning_rate=3e-3, threads=1, device="cuda")
    result = pretrain(model, striped(300), settings, TASK, seed=5, progress=progress, checkpoint=checkpoint)
    return result, model, done[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_pretraining_learns_in_half_precision_and_goes_on_from_a_checkpoint(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 with scaled gradients, where a GPU has no bfloat16. The weights themselves stay float32."""
    if precision == "float16":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    undisturbed, expected, _ = pretrained()
    assert undisturbed.validation_accuracy > 0.9
    assert {parameter.dtype for parameter in expected.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in expected.parameters()} == {"cuda"}

    with pytest.raises(Ended):
        pretrained(Checkpoint(tmp_path / "checkpoint", "a"), end=3 * PER_EPOCH + 2)
    resumed, model, first = pretrained(Checkpoint(tmp_path / "checkpoint", "a"))
    assert first == 3 * PER_EPOCH + 1
    assert resumed.epochs == undisturbed.epochs
    assert abs(resumed.validation_loss - undisturbed.validation_loss) < 1e-2
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-2)
