"""Clips as data: how silos have them, how they are changed at random, and that a model learns from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tones import TASK, TONES, tone_folder

from gptfl_dist.audio.clip import read_clip
from gptfl_dist.audio.spectrogram import spectrogram
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.silo import Data
from gptfl_dist.config.task import Model
from gptfl_dist.errors import DataError
from gptfl_dist.learning.augment_audio import augment_spectrograms
from gptfl_dist.learning.data import count_labels, find_kind, load_images, split
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.local import train
from gptfl_dist.learning.models import build_model
from gptfl_dist.weights.flat import FlatModel

LABELS = tuple(TONES)


def test_a_folder_of_clips_becomes_spectrograms(tmp_path: Path) -> None:
    folder = tone_folder(tmp_path / "data", 2)
    loaded = load_images(Data(path=folder), TASK, LABELS)
    assert loaded.images.shape == (6, *TASK.shape)
    assert loaded.labels.tolist() == [2, 2, 0, 0, 1, 1]  # in the order of the folders' names
    path = folder / "high" / "1.wav"
    expected = spectrogram(read_clip("", path, TASK.sample_rate), TASK)
    assert np.array_equal(loaded.images[1, 0].numpy(), expected)


def test_a_parquet_file_of_clips_is_the_same(tmp_path: Path) -> None:
    folder = tone_folder(tmp_path / "data", 2)
    files = sorted(folder.rglob("*.wav"))
    clips = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"audio": clips, "label": [file.parent.name for file in files]})
    pq.write_table(table, tmp_path / "clips.parquet")
    there, here = (load_images(Data(path=path), TASK, LABELS) for path in (folder, tmp_path / "clips.parquet"))
    assert torch.equal(there.images, here.images)
    assert torch.equal(there.labels, here.labels)


def test_what_a_silo_has_is_found_without_the_federation(tmp_path: Path) -> None:
    data = Data(path=tone_folder(tmp_path / "data", 3))
    assert find_kind(data) == "audio"
    assert count_labels(data, "audio") == dict.fromkeys(TONES, 3)
    with pytest.raises(DataError, match="holds no image"):
        count_labels(data, "image")


def test_what_is_wrong_with_clips_is_named(tmp_path: Path) -> None:
    folder = tone_folder(tmp_path / "data", 2)
    with pytest.raises(DataError, match=r"label 'high'.* is none of the federation's labels"):
        load_images(Data(path=folder), TASK, ("low", "middle"))
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=[0, 1])
    with pytest.raises(DataError, match="which holds images"):
        load_images(Data(path=tmp_path / "a.npz"), TASK, ("0", "1"))
    damaged = folder / "low" / "1.wav"
    damaged.write_bytes(b"no sound")
    with pytest.raises(DataError, match=f"the clip {damaged} is damaged"):
        load_images(Data(path=folder), TASK, LABELS)
    damaged.unlink()
    (folder / "low" / "0.wav").rename(folder / "low" / "0.txt")
    with pytest.raises(DataError, match="holds no clip") as caught:
        load_images(Data(path=folder), TASK, LABELS)
    assert "that label's clips" in caught.value.hint


def test_augmentation_is_repeatable_differs_by_clip_and_keeps_the_range(tmp_path: Path) -> None:
    data = load_images(Data(path=tone_folder(tmp_path / "data", 1)), TASK, LABELS)
    images = data.images[:1].repeat(6, 1, 1, 1).float()
    changed = augment_spectrograms(images, torch.Generator().manual_seed(1))
    assert torch.equal(changed, augment_spectrograms(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(changed, augment_spectrograms(images, torch.Generator().manual_seed(2)))
    assert len({image.numpy().tobytes() for image in changed}) == 6
    assert changed.shape == images.shape
    assert images.min() <= changed.min() <= changed.max() <= images.max()
    # A rank that has part of a batch changes it as one that has all of it.
    part = augment_spectrograms(images[2:4], torch.Generator().manual_seed(1), batch=6, part=slice(2, 4))
    assert torch.equal(part, changed[2:4])


def test_masks_cut_whole_bands_and_whole_windows() -> None:
    images = torch.full((200, 1, 20, 30), 0.5)
    images[:, :, 0, 0] = 0.0  # a clip's silence
    changed = augment_spectrograms(images, torch.Generator().manual_seed(0))
    silent = (changed == 0)[:, 0, 5:, 5:]  # away from the corner
    bands, windows = silent.all(dim=2).sum(dim=1), silent.all(dim=1).sum(dim=1)
    assert torch.equal(silent, silent.all(dim=2)[:, :, None] | silent.all(dim=1)[:, None, :])
    assert 0 < bands.float().mean() < 3
    assert 0 < windows.float().mean() < 5


def test_the_speech_model_learns_and_stays_in_its_flat_buffer(tmp_path: Path) -> None:
    data = load_images(Data(path=tone_folder(tmp_path / "data", 40)), TASK, LABELS)
    training, held_out = split(data, 0.25, seed=0)
    model = build_model(Model(name="conv1d-gru"), TASK, len(LABELS), seed=1)
    flat = FlatModel(model)
    before = flat.buffer.clone()
    settings = LocalTraining(
        epochs=4, batch_size=16, learning_rate=0.1, momentum=0.9, weight_decay=0.0, augmentation=True, threads=1
    )
    train(model, training, settings, TASK, seed=0, device="cpu", progress=lambda done, total: None)
    assert evaluate(model, held_out, TASK, device="cpu").accuracy > 0.9
    assert flat.bound
    assert not torch.equal(before, flat.buffer)
    assert list(model.buffers()) == []  # no statistics of a silo's batches
