"""Reading images in each form, and what a wrong data set is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gptfl_dist.config.silo import Data
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError
from gptfl_dist.learning.data import ImageSet, load_images, split

LABELS = ["no", "yes"]
TASK = Task(size=8, channels=1)


def picture(value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value,) * 3)


def encoded(value: int, folder: Path) -> bytes:
    file = folder / "encoded.png"
    picture(value).save(file)
    return file.read_bytes()


def image_folder(root: Path) -> Path:
    for label, values in {"no": (10, 20), "yes": (200,)}.items():
        (root / label).mkdir(parents=True)
        for value in values:
            picture(value).save(root / label / f"{value}.png")
    return root


def brightness(images: ImageSet) -> list[int]:
    return [int(image.float().mean()) for image in images.images]


def refused(path: Path, *words: str, task: Task = TASK, **data: object) -> None:
    with pytest.raises(DataError) as caught:
        load_images(Data.model_validate({"path": path, **data}), task, LABELS)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.hint


def test_folder_of_label_folders(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    picture(250).save(root / "yes" / "photo.BMP")
    (root / "yes" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    loaded = load_images(Data(path=root), TASK, LABELS)
    assert loaded.images.shape == (4, 1, 8, 8)
    assert loaded.images.dtype == torch.uint8
    assert loaded.labels.dtype == torch.int64
    assert loaded.label_names == ("no", "yes")
    assert brightness(loaded) == [10, 20, 200, 250]
    assert loaded.labels.tolist() == [0, 0, 1, 1]


def test_labels_follow_names_not_positions(tmp_path: Path) -> None:
    loaded = load_images(Data(path=image_folder(tmp_path / "data")), TASK, ["yes", "maybe", "no"])
    assert loaded.labels.tolist() == [2, 2, 0]


def test_renamed_labels(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    (root / "yes").rename(root / "oui")
    loaded = load_images(Data(path=root, labels={"oui": "yes"}), TASK, LABELS)
    assert loaded.labels.tolist() == [0, 0, 1]


def test_pixels_change_only_where_size_or_channels_differ(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "yes").mkdir()
    Image.fromarray(noise).save(tmp_path / "yes" / "a.png")
    Image.fromarray(np.stack([noise] * 3, axis=2)).resize((16, 16), Image.Resampling.NEAREST).save(
        tmp_path / "yes" / "b.png"
    )
    grey = load_images(Data(path=tmp_path), TASK, LABELS)
    assert np.array_equal(grey.images[0, 0].numpy(), noise)
    assert abs(float(grey.images[1].float().mean()) - noise.mean()) < 2
    colour = load_images(Data(path=tmp_path), Task(size=16, channels=3), LABELS)
    assert colour.images.shape == (2, 3, 16, 16)
    assert torch.equal(colour.images[0, 0], colour.images[0, 2])


def test_sixteen_bit_images_keep_their_brightness(tmp_path: Path) -> None:
    (tmp_path / "yes").mkdir()
    Image.fromarray(np.full((8, 8), 128 * 256, dtype=np.uint16)).save(tmp_path / "yes" / "scan.png")
    assert brightness(load_images(Data(path=tmp_path), TASK, LABELS)) == [128]


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    (tmp_path / "yes").mkdir()
    photo = Image.new("L", (8, 8), 0)
    photo.paste(255, (0, 0, 8, 4))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.save(tmp_path / "yes" / "photo.png", exif=exif)
    image = load_images(Data(path=tmp_path), TASK, LABELS).images[0, 0]
    assert image[0].float().mean() == 0
    assert image[-1].float().mean() == 255


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("names", [None, ["yes", "no"]])
def test_parquet_shards(tmp_path: Path, raw: bool, names: list[str] | None) -> None:
    """The form of the synthetic store: shards beside a manifest, labels as strings or as positions in names."""
    for shard, (label, value) in enumerate([("no", 30), ("yes", 220)]):
        image: object = encoded(value, tmp_path)
        image = image if raw else {"bytes": image, "path": None}
        table = pa.table({"image": [image], "label": [label if names is None else names.index(label)], "seed": [1]})
        if names is not None:
            features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / f"shard-{shard:05d}.parquet")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / ".shard-00002.parquet.tmp").write_text("half")
    loaded = load_images(Data(path=tmp_path), TASK, LABELS)
    assert brightness(loaded) == [30, 220]
    assert loaded.labels.tolist() == [0, 1]


def test_datasets_library_files(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    dataset = Dataset.from_dict(
        {"image": [picture(40), picture(50), picture(210)], "label": [1, 1, 0]},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=["yes", "no"])}),
    )
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "one.parquet"))
    for path in ("saved", "one.parquet"):
        loaded = load_images(Data(path=tmp_path / path), TASK, LABELS)
        assert brightness(loaded) == [40, 50, 210]
        assert loaded.labels.tolist() == [0, 0, 1]
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "both"))
    refused(tmp_path / "both", "several splits", "train", "test")


def test_splits_of_a_data_set_are_never_mixed(tmp_path: Path) -> None:
    for name in ("train", "test"):
        table = pa.table({"image": [encoded(1, tmp_path)], "label": ["no"]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    refused(tmp_path, "several splits", "test, train")


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 1), (3, 8, 8, 3), (3, 5, 7)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.full(shape, 90, dtype=np.uint8)
    np.savez(tmp_path / "names.npz", images=images, labels=np.array(["yes", "no", "yes"]))
    np.savez(tmp_path / "ints.npz", images=images, labels=np.array([1, 0, 1]), label_names=np.array(LABELS))
    for name in ("names.npz", "ints.npz"):
        loaded = load_images(Data(path=tmp_path / name), TASK, LABELS)
        assert loaded.labels.tolist() == [1, 0, 1]
        assert brightness(loaded) == [90, 90, 90]


def test_integers_without_names_are_their_own_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([7, 3]))
    assert load_images(Data(path=tmp_path / "a.npz"), TASK, ["3", "7"]).labels.tolist() == [1, 0]


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "does not exist")


def test_empty_folders(tmp_path: Path) -> None:
    refused(tmp_path, "no label folders")
    image_folder(tmp_path)
    (tmp_path / "maybe").mkdir()
    refused(tmp_path, "maybe", "holds no image")


def test_an_image_without_a_label(tmp_path: Path) -> None:
    picture(1).save(image_folder(tmp_path) / "stray.png")
    refused(tmp_path, "stray.png")


def test_an_unknown_label_is_named_with_its_nearest(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    (root / "yes").rename(root / "yess")
    refused(root, "'yess'", "1 sample", "'yess: yes'", "data.labels")
    refused(root, "'yess'", "'sure'", "data.labels", labels={"yess": "sure"})


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    (root / "no" / "torn.png").write_bytes((root / "no" / "10.png").read_bytes()[:40])
    refused(root, "torn.png")
    (root / "no" / "torn.png").write_bytes(b"")
    refused(root, "torn.png")
    pq.write_table(pa.table({"image": [b"rubbish"], "label": ["no"]}), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "row 0", "x.parquet")


def test_an_image_bomb_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    Image.new("1", (20_000, 12_000)).save(root / "no" / "bomb.png")
    refused(root, "bomb.png", "too large")


def test_damaged_files_of_each_form(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.npz"):
        (tmp_path / name).write_bytes(b"PAR1 or PK, but broken")
        refused(tmp_path / name, name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    refused(tmp_path / "array.npy", "array.npy", "no zip archive", format="npz")
    (tmp_path / "a.bin").write_bytes(b"?")
    refused(tmp_path / "a.bin", "no known form")
    np.savez(tmp_path / "pickle.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.array([None], dtype=object))
    refused(tmp_path / "pickle.npz", "pickle.npz")
    np.savez(tmp_path / "float.npz", images=np.zeros((1, 8, 8)), labels=np.array(["no"]))
    refused(tmp_path / "float.npz", "float64", "uint8")
    np.savez(tmp_path / "names.npz", x=np.zeros(3))
    refused(tmp_path / "names.npz", "images, labels")
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 8, 8), np.uint8), labels=np.array([], dtype="U1"))
    refused(tmp_path / "none.npz", "no samples")
    pq.write_table(pa.table({"picture": [b""], "label": ["no"]}), tmp_path / "columns.parquet")
    refused(tmp_path / "columns.parquet", "picture, label")
    pq.write_table(pa.table({"image": [b""], "label": [None]}), tmp_path / "null.parquet")
    refused(tmp_path / "null.parquet", "no label in row 0")


def numbered(labels: list[int]) -> ImageSet:
    """Each image carries its own number, so that a test can follow it."""
    numbers = torch.arange(len(labels))
    images = torch.stack([numbers // 256, numbers % 256]).T.to(torch.uint8).reshape(-1, 1, 1, 2)
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), ("a", "b", "c", "d"))


def numbers(data: ImageSet) -> list[int]:
    return [int(high) * 256 + int(low) for high, low in data.images.reshape(-1, 2)]


label_lists = st.lists(st.integers(0, 3), min_size=2, max_size=300)


@given(label_lists, st.floats(0.01, 0.99), st.integers(0, 2**63 - 1))
def test_split_is_disjoint_complete_and_repeatable(labels: list[int], share: float, seed: int) -> None:
    data = numbered(labels)
    training, held_out = split(data, share, seed)
    assert len(training) >= 1
    assert len(held_out) >= 1
    assert sorted(numbers(training) + numbers(held_out)) == list(range(len(labels)))
    assert all(labels[n] == label for n, label in zip(numbers(held_out), held_out.labels.tolist(), strict=True))
    assert numbers(split(data, share, seed)[1]) == numbers(held_out)


@given(st.lists(st.integers(20, 80), min_size=4, max_size=4), st.floats(0.05, 0.9), st.integers(0, 2**63 - 1))
def test_split_takes_each_label_by_its_share(counts: list[int], share: float, seed: int) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    _, held_out = split(numbered(labels), share, seed)
    taken = np.bincount(held_out.labels.numpy(), minlength=4)
    assert np.all(np.abs(taken - np.array(counts) * share) <= 1)


def test_a_label_of_one_sample_stays_in_training() -> None:
    training, held_out = split(numbered([0] * 10 + [1, 2]), 0.4, 0)
    assert len(held_out) == 5
    assert set(held_out.labels.tolist()) == {0}
    assert set(training.labels.tolist()) == {0, 1, 2}


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(DataError, match="cannot be split"):
        split(numbered([0]), 0.5, 0)


def test_subset_keeps_the_order_asked_for() -> None:
    data = numbered([0, 1, 2, 3])
    assert numbers(data.subset([3, 0])) == [3, 0]
    assert data.subset(np.array([2])).labels.tolist() == [2]
