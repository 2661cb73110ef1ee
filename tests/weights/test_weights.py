"""Layout, weights file and flat model: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from gptfl_dist.errors import ModelError, StorageError
from gptfl_dist.weights import ITEM_SIZE, Layout, WeightsFile, write_weights
from gptfl_dist.weights.file import header_of
from gptfl_dist.weights.flat import FlatModel, layout_of

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
triples = st.dictionaries(
    names.filter(lambda n: n != "__metadata__"),
    st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(sorted(ITEM_SIZE))),
    max_size=8,
).map(lambda d: [(name, shape, dtype) for name, (shape, dtype) in d.items()])


@given(triples, st.randoms())
def test_a_layout_has_no_holes_is_aligned_and_does_not_depend_on_the_order_given(tensors, random):
    layout = Layout.of(tensors)
    end = 0
    for spec in layout.tensors:
        assert spec.offset == end
        assert spec.offset % ITEM_SIZE[spec.dtype] == 0
        end += math.prod(spec.shape) * ITEM_SIZE[spec.dtype]
    assert end == layout.nbytes == sum(s.stop - s.start for s in layout.segments())
    random.shuffle(tensors)
    assert Layout.of(tensors).digest == layout.digest
    assert Layout.from_json(layout.to_json()) == layout


@given(st.binary(max_size=200))
def test_garbage_is_no_layout(text):
    try:
        layout = Layout.from_json(text)
    except ModelError:
        return
    assert Layout.from_json(layout.to_json()) == layout


@given(triples, st.data())
def test_a_weights_file_gives_back_its_bytes_and_digest(tmp_path_factory, tensors, data):
    layout = Layout.of(tensors)
    flat = data.draw(st.binary(min_size=layout.nbytes, max_size=layout.nbytes))
    cut = data.draw(st.integers(0, layout.nbytes))
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    digest = write_weights(path, layout, [flat[:cut], flat[cut:]])
    with WeightsFile(path) as file:
        assert file.layout == layout
        assert file.read(0, layout.nbytes) == flat
        assert file.read(cut, layout.nbytes - cut) == flat[cut:]
        assert file.digest() == digest == blake3(flat).hexdigest()


class Net(nn.Module):
    """Has every kind of state: parameters, a batch counter, half precision, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 3, bias=False)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.second.weight
        self.low = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))


def test_our_file_is_read_by_the_safetensors_library_and_theirs_by_us(tmp_path: Path):
    flat = FlatModel(Net())
    flat.save(tmp_path / "ours.safetensors")
    loaded = load_file(tmp_path / "ours.safetensors")
    for name, tensor in loaded.items():
        assert torch.equal(tensor, flat.model.state_dict()[name])
    save_file(loaded, tmp_path / "theirs.safetensors")
    other = FlatModel(Net())
    other.load(tmp_path / "theirs.safetensors")
    assert torch.equal(other.buffer, flat.buffer)


def test_training_a_bound_model_changes_the_flat_buffer_and_the_update_is_the_difference(tmp_path: Path):
    flat = FlatModel(Net())
    flat.save(tmp_path / "base.safetensors")
    before = {name: tensor.clone() for name, tensor in flat.model.state_dict().items()}
    optimizer = torch.optim.SGD(flat.model.parameters(), 0.1)
    model = flat.model
    loss = model.tied(model.norm(model.first(torch.randn(8, 3)))).square().mean() + model.low.float().sum()
    loss.backward()
    optimizer.step()
    flat.save_update(tmp_path / "base.safetensors", tmp_path / "update.safetensors")
    update = load_file(tmp_path / "update.safetensors")
    assert "tied.weight" not in update
    for name, tensor in update.items():
        assert torch.equal(tensor, flat.model.state_dict()[name] - before[name]), name
    assert update["norm.num_batches_tracked"].item() == 1
    assert update["first.weight"].abs().sum() > 0


@given(st.floats(0.5, 1000), st.integers(0, 10))
def test_a_model_becomes_its_update_in_place(factor: float, seed: int):
    torch.manual_seed(seed)
    flat = FlatModel(nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400)))
    received = flat.buffer.clone()
    before = {name: tensor.clone() for name, tensor in flat.model.state_dict().items()}
    for tensor in flat.model.state_dict().values():
        tensor += torch.ones((), dtype=tensor.dtype) if tensor.dtype == torch.int64 else torch.randn(tensor.shape)
    updates = {name: tensor - before[name] for name, tensor in flat.model.state_dict().items()}
    length = flat.become_update(received, factor)
    for name, tensor in flat.model.state_dict().items():
        expected = updates[name] if tensor.dtype == torch.int64 else updates[name] * factor
        assert torch.equal(tensor, expected), name
    floats = torch.cat([update.double().flatten() for update in updates.values() if update.is_floating_point()])
    assert length == pytest.approx(float(floats.norm()), rel=1e-5)


@pytest.mark.parametrize(("value", "length"), [(float("nan"), None), (float("inf"), None), (3e30, 3e30)])
def test_the_norm_of_an_update_tells_whether_all_of_it_is_finite(value: float, length: float | None):
    flat = FlatModel(nn.Linear(300, 400))
    received = flat.buffer.clone()
    with torch.no_grad():
        flat.model.bias[399] += value
    found = flat.become_update(received, 1.0)
    assert math.isnan(found) if length is None else found == pytest.approx(length)


def test_weights_of_another_model_are_refused_by_the_name_of_the_tensor(tmp_path: Path):
    FlatModel(nn.Linear(3, 4)).save(tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="weight"):
        FlatModel(nn.Linear(3, 5)).load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("damage", ["cut", "longer", "garbage", "empty", "missing"])
def test_a_damaged_weights_file_is_refused(tmp_path: Path, damage: str):
    path = tmp_path / "w.safetensors"
    FlatModel(nn.Linear(3, 4)).save(path)
    content = path.read_bytes()
    damaged = {"cut": content[:-1], "longer": content + b"x", "garbage": b"\xff" * 100, "empty": b""}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match=r"w\.safetensors"):
        WeightsFile(path)


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    layout = layout_of(nn.Linear(3, 4))
    write_weights(path, layout, [bytes(layout.nbytes)])
    before = path.read_bytes()

    def broken():
        yield b"\1" * 8
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_weights(path, layout, broken())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    with pytest.raises(StorageError):
        write_weights(Path("/proc/nowhere/w.safetensors"), layout, [bytes(layout.nbytes)])


def test_a_file_beyond_two_gib_is_read_at_any_byte(tmp_path: Path) -> None:
    """It is mostly a hole, so that nothing of it is stored; what lies at its end is real."""
    layout = Layout.of([("w", ((5 << 29) // 4,), "F32")])  # 2.5 GiB
    header, tail = header_of(layout), bytes(range(256)) * 64
    with (tmp_path / "huge").open("wb") as file:
        file.write(header)
        file.seek(len(header) + layout.nbytes - len(tail))
        file.write(tail)
    with WeightsFile(tmp_path / "huge") as weights:
        assert weights.nbytes == 5 << 29
        assert weights.read(layout.nbytes - len(tail), len(tail)) == tail
        block = bytearray(100)
        weights.read_into(layout.nbytes - 100, memoryview(block))
        assert bytes(block) == tail[-100:]
