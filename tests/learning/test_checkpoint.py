"""A pre-training that was ended in mid-epoch goes on from its last whole one, to the weights of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gptfl_dist.config.task import Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.errors import StorageError
from gptfl_dist.learning.checkpoint import Checkpoint
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.pretrain import Pretrained, pretrain

SETTINGS = Pretraining(epochs=6, batch_size=32, learning_rate=3e-3, patience=3, threads=1, device="cpu")
PER_EPOCH = 9  # batches, of 270 samples


class Ended(BaseException):
    """Stands for whatever ends a process."""


def network() -> nn.Module:
    """With dropout, which draws from torch's global generator, and a batch norm, which has buffers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 15 * 15, 10))


def run(
    digits: ImageSet, task: Task, checkpoint: Checkpoint | None, end: int = -1
) -> tuple[Pretrained, nn.Module, int]:
    """A pre-training, ended after `end` batches: its result, its model, and which batch was its first."""
    done: list[int] = []

    def progress(batch: int, total: int) -> None:
        done.append(batch)
        if batch == end:
            raise Ended

    model = network()
    data = digits.subset(range(0, 1500, 5))
    result = pretrain(model, data, SETTINGS, task, seed=5, progress=progress, checkpoint=checkpoint)
    return result, model, done[0] if done else 0


@pytest.fixture(scope="module")
def undisturbed(digits: ImageSet, task: Task) -> tuple[Pretrained, nn.Module]:
    result, model, first = run(digits, task, None)
    assert first == 1
    return result, model


def same(mine: nn.Module, other: nn.Module) -> bool:
    pairs = zip(mine.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(tensor, expected) for (_, tensor), expected in pairs)


def test_what_was_ended_twice_comes_to_the_same_bits(
    digits: ImageSet, task: Task, undisturbed: tuple[Pretrained, nn.Module], tmp_path: Path
) -> None:
    for end in (2 * PER_EPOCH + 4, 4 * PER_EPOCH + 1):
        with pytest.raises(Ended):
            run(digits, task, Checkpoint(tmp_path / "state", "mine"), end)
    result, model, first = run(digits, task, Checkpoint(tmp_path / "state", "mine"))
    assert first == 4 * PER_EPOCH + 1
    assert result == undisturbed[0]
    assert same(model, undisturbed[1])
    assert [path.name for path in tmp_path.iterdir()] == ["state"]

    # Ended after its last epoch, it has nothing left to train.
    again, model, first = run(digits, task, Checkpoint(tmp_path / "state", "mine"))
    assert (again, first) == (result, 0)
    assert same(model, undisturbed[1])


def test_the_state_of_another_training_or_a_damaged_one_is_not_taken(
    digits: ImageSet, task: Task, undisturbed: tuple[Pretrained, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    with pytest.raises(Ended):
        run(digits, task, Checkpoint(path, "another"), 2 * PER_EPOCH)
    with pytest.raises(Ended):
        run(digits, task, Checkpoint(path, "mine"), 1)  # begins anew
    whole = path.read_bytes()
    assert Checkpoint(path, "another").read() == whole
    assert Checkpoint(path, "mine").read() == b""
    for damaged in (b"", whole[:-10], b"x" * len(whole)):
        path.write_bytes(damaged)
        assert Checkpoint(path, "another").read() == b""
    result, model, first = run(digits, task, Checkpoint(path, "mine"))
    assert (result, first) == (undisturbed[0], 1)
    assert same(model, undisturbed[1])
    Checkpoint(path, "mine").remove()
    assert not path.exists()


def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Is a directory"):
        Checkpoint(tmp_path, "mine").read()
