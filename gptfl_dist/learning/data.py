"""Labelled images in memory, and how they are read from what a silo has on its disk.

Three forms are read: a folder with one sub-folder a label; Parquet files or a saved `datasets` folder; an .npz file.
A reader lists the samples' label names first and decodes pixels second, so that a label the federation does not know
is found before an hour of decoding. The data's names become indices into the federation's labels, by name and never by
position. Pixels are touched only where size or channels differ from the task's.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from gptfl_dist.config.federation import Task
from gptfl_dist.config.silo import Data
from gptfl_dist.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_SPLIT_FILE = re.compile(r"(.+?)-\d+-of-\d+\.parquet")
_CHECK = "check that the file is whole and that this user may read it"
_REPLACE = "replace it, or remove it from the data"
_FOLDER_LAYOUT = "put the images into one sub-folder a label: {path}/cat/1.png, {path}/dog/2.png"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`images` uint8 (N, C, H, W), `labels` int64 (N,) as indices into `label_names`."""

    images: torch.Tensor
    labels: torch.Tensor
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray | torch.Tensor | Sequence[int]) -> ImageSet:
        """The samples at `indices`, copied, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[chosen], self.labels[chosen], self.label_names)


@dataclass(frozen=True)
class _Samples:
    """What a reader found: each sample's own label name, and in the same order where it is and what to decode."""

    labels: list[str]
    images: Iterator[tuple[str, Path | bytes | np.ndarray]]


def load_images(data: Data, task: Task, labels: Sequence[str]) -> ImageSet:
    """Reads `data.path` into images of `task.size` and `task.channels`, labelled by the federation's `labels`.

    Raises DataError, naming the file, where something is missing, unreadable, empty or has an unknown label.
    """
    path = data.path
    try:
        samples = _samples(data)
        targets = _translate(samples.labels, data.labels, labels, path)
        pixels = np.empty((len(targets), task.channels, task.size, task.size), dtype=np.uint8)
        for index, (where, raw) in enumerate(samples.images):
            pixels[index] = _pixels(where, raw, task)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}", hint=_CHECK) from error
    return ImageSet(torch.from_numpy(pixels), torch.tensor(targets, dtype=torch.int64), tuple(labels))


def count_labels(data: Data) -> dict[str, int]:
    """How many samples `data.path` has of each label, by the names that `data.labels` gives them. Decodes no image.

    Raises DataError like `load_images`.
    """
    try:
        return dict(Counter(data.labels.get(name, name) for name in _samples(data).labels))
    except OSError as error:
        raise DataError(
            f"{error.filename or data.path} cannot be read: {error.strerror or error}", hint=_CHECK
        ) from error


def split(data: ImageSet, validation_share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """A training and a validation part: disjoint, every label in both by its share as far as counts allow.

    Each part has at least one sample. Raises DataError for fewer than two samples.
    """
    if len(data) < 2:
        raise DataError(
            f"{len(data)} sample(s) cannot be split into a training and a validation part",
            hint="give at least two images",
        )
    labels = data.labels.numpy()
    counts = np.bincount(labels, minlength=len(data.label_names))
    wanted = counts * validation_share
    total = min(max(round(len(data) * validation_share), 1), len(data) - 1)
    # Whole samples first, then one by one to the label that is furthest below its share. A label gives its last
    # sample to validation only when every other label has one left: what is never trained on is never learnt.
    taken = np.minimum(np.floor(wanted).astype(np.int64), np.maximum(counts - 1, 0))
    while taken.sum() < total:
        lacking = wanted - taken
        open_labels = taken < counts - 1
        if not open_labels.any():
            open_labels = taken < counts
        taken[np.argmax(np.where(open_labels, lacking, -np.inf))] += 1
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(data), dtype=bool)
    for label, count in enumerate(taken):
        held_out[generator.permutation(np.flatnonzero(labels == label))[:count]] = True
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out))


def _samples(data: Data) -> _Samples:
    """What the reader of the data's form finds, at least one sample. Raises DataError or OSError."""
    path = data.path
    if not path.exists():
        raise DataError(
            f"the data {path} does not exist",
            hint="check the path: it is relative to the silo or federation file that names it",
        )
    form = _detect(path) if data.format == "auto" else data.format
    samples = {"folder": _read_folder, "parquet": _read_parquet, "npz": _read_npz}[form](path)
    if not samples.labels:
        raise DataError(f"{path} holds no samples", hint="check that the path is the folder or file you mean")
    return samples


def _detect(path: Path) -> str:
    if path.suffix == ".npz":
        return "npz"
    if path.suffix == ".parquet" or (path.is_dir() and (_saved_dataset(path) or _parquet_files(path))):
        return "parquet"
    if path.is_dir():
        return "folder"
    raise DataError(
        f"the data {path} is a file of no known form",
        hint="give a folder of label folders, a .parquet file or folder, a saved datasets folder, or an .npz file",
    )


# Folders of label folders


def _read_folder(path: Path) -> _Samples:
    if not path.is_dir():
        raise DataError(f"the data {path} is a file, expected a folder", hint=_FOLDER_LAYOUT.format(path=path))
    files: list[tuple[str, Path]] = []
    for entry in _visible(path):
        if entry.is_dir():
            found = [file for file in sorted(entry.rglob("*")) if _is_image(file)]
            if not found:
                raise DataError(
                    f"the label folder {entry} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})",
                    hint="remove the folder, or put that label's images into it",
                )
            files += [(entry.name, file) for file in found]
        elif _is_image(entry):
            raise DataError(
                f"the image {entry} lies beside the label folders, so it has no label",
                hint=_FOLDER_LAYOUT.format(path=path),
            )
    if not files:
        raise DataError(f"the folder {path} holds no label folders", hint=_FOLDER_LAYOUT.format(path=path))
    return _Samples([label for label, _ in files], ((str(file), file) for _, file in files))


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


# Parquet files and saved `datasets` folders


def _saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _parquet_files(path: Path) -> list[Path]:
    """The Parquet files of a folder, or of its `data` folder, which is where the hub's convention puts them."""
    for folder in (path, path / "data"):
        files = [entry for entry in _visible(folder) if entry.suffix == ".parquet"] if folder.is_dir() else []
        if files:
            return files
    return []


def _read_parquet(path: Path) -> _Samples:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir() and _saved_dataset(path):
        return _read_saved_dataset(path)
    files = _parquet_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no Parquet file", hint="check the path, and format in the data section")
    splits = sorted({match[1] for file in files if (match := _SPLIT_FILE.fullmatch(file.name))})
    if len(splits) > 1:
        raise DataError(
            f"{path} holds the Parquet files of several splits: {', '.join(splits)}",
            hint="put the files of the split to train on into a folder of their own and name that folder",
        )
    labels: list[str] = []
    image_columns: list[str] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                image, label, names = _columns(parquet.schema_arrow, file)
                labels += _label_names(parquet.read([label]).column(label).to_pylist(), names, file)
        except pa.ArrowException as error:
            raise DataError(f"{file} is no readable Parquet file: {error}", hint=_CHECK) from error
        image_columns.append(image)

    def images() -> Iterator[tuple[str, bytes]]:
        for file, image in zip(files, image_columns, strict=True):
            try:
                with pq.ParquetFile(file) as parquet:
                    yield from _encoded(parquet.iter_batches(batch_size=1024, columns=[image]), file)
            except pa.ArrowException as error:
                raise DataError(f"{file} is damaged: {error}", hint=_CHECK) from error

    return _Samples(labels, images())


def _read_saved_dataset(path: Path) -> _Samples:
    """A folder written by `Dataset.save_to_disk`."""
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file():
        splits = [entry.name for entry in _visible(path) if entry.is_dir()]
        raise DataError(
            f"{path} holds a data set of several splits: {', '.join(splits)}",
            hint=f"name the split to train on, such as {path / (splits[0] if splits else 'train')}",
        )
    try:
        table = load_from_disk(str(path)).with_format("arrow")[:]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no readable datasets folder: {error}", hint=_CHECK) from error
    image, label, names = _columns(table.schema, path)
    labels = _label_names(table.column(label).to_pylist(), names, path)
    return _Samples(labels, _encoded(table.select([image]).to_batches(max_chunksize=1024), path))


def _columns(schema: Any, where: Path) -> tuple[str, str, list[str] | None]:
    """The image column, the label column and the names of its integers (None where none are declared) of a schema."""
    metadata = (schema.metadata or {}).get(b"huggingface", b"{}")
    features: dict[str, Any] = json.loads(metadata).get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = _one_column(schema.names, kinds, "Image", ("image", "img", "images"), where)
    label = _one_column(schema.names, kinds, "ClassLabel", ("label", "labels"), where)
    names = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    return image, label, names


def _one_column(columns: list[str], kinds: dict[str, Any], kind: str, usual: tuple[str, ...], where: Path) -> str:
    candidates = [name for name in usual if name in columns] or [name for name in columns if kinds.get(name) == kind]
    if len(candidates) != 1:
        raise DataError(
            f"{where} has the columns {', '.join(columns)}: expected one named {usual[0]!r}"
            + (f", found {' and '.join(candidates)}" if candidates else ""),
            hint=f"rename the {usual[0]} column to {usual[0]!r} and drop the others of its kind",
        )
    return candidates[0]


def _label_names(values: list[Any], names: list[str] | None, where: Path) -> list[str]:
    """Each value's name. An integer stands for a position only where the data declares names; else it is its own."""
    found: list[str] = []
    for row, value in enumerate(values):
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise DataError(
                    f"{where} has the label {value} in row {row}, expected 0 to {len(names) - 1}",
                    hint="remove the samples without a label",
                )
            found.append(names[value])
        elif value is None:
            raise DataError(f"{where} has no label in row {row}", hint="remove the samples without a label")
        else:
            found.append(str(value))
    return found


def _encoded(batches: Any, where: Path) -> Iterator[tuple[str, bytes]]:
    """The bytes of each image in record batches of one column: either raw bytes or {bytes, path}."""
    row = 0
    for batch in batches:
        for value in batch.column(0).to_pylist():
            place = f"row {row} of {where}"
            if isinstance(value, dict):
                value = value.get("bytes")
            if not isinstance(value, bytes):
                raise DataError(
                    f"the image in {place} has no bytes",
                    hint="save the data set with its images embedded (datasets: Dataset.to_parquet or save_to_disk)",
                )
            yield place, value
            row += 1


# .npz files


def _read_npz(path: Path) -> _Samples:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"images", "labels"} - set(archive.files)
            if missing:
                raise DataError(
                    f"{path} has the arrays {', '.join(archive.files) or 'none'}: {', '.join(sorted(missing))} missing",
                    hint="save it as np.savez(path, images=..., labels=...)",
                )
            images, labels = archive["images"], archive["labels"]
            names = archive["label_names"] if "label_names" in archive.files else None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as .npz: {error}",
            hint="save it as np.savez(path, images=..., labels=...) with plain arrays: object arrays are never read",
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"images in {path} is {images.dtype} of shape {images.shape}, expected uint8 (N, H, W) or (N, H, W, C)",
            hint="store pixels of 0 to 255 as uint8, channels last",
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels in {path} is {labels.dtype} of shape {labels.shape}, expected ({len(images)},) ints or strings",
            hint="give one label an image, as integers or with dtype='U'",
        )
    declared = [str(name) for name in names] if names is not None else None
    found = _label_names(labels.tolist(), declared, path)
    return _Samples(found, ((f"image {index} of {path}", image) for index, image in enumerate(images)))


# Labels and pixels


def _translate(found: list[str], renames: dict[str, str], labels: Sequence[str], path: Path) -> list[int]:
    """The data's label names as indices into the federation's labels."""
    index_of = {label: index for index, label in enumerate(labels)}
    for name, count in Counter(found).items():
        label = renames.get(name, name)
        if label not in index_of:
            nearest = difflib.get_close_matches(label, labels, n=1, cutoff=0.0)[0]
            renamed = f" (renamed to {label!r} by data.labels)" if name in renames else ""
            raise DataError(
                f"the label {name!r}{renamed} of {count} sample(s) in {path} is none of the federation's labels: "
                f"{', '.join(labels)}",
                hint=f"the nearest is {nearest!r}: add '{name}: {nearest}' to data.labels in the silo file if it is "
                "meant, or remove those samples",
            )
    return [index_of[renames.get(name, name)] for name in found]


def _pixels(where: str, raw: Path | bytes | np.ndarray, task: Task) -> np.ndarray:
    """One image as uint8 (C, size, size)."""
    if isinstance(raw, np.ndarray) and raw.shape == (task.size, task.size):
        raw = raw[:, :, None]
    if isinstance(raw, np.ndarray) and raw.shape == (task.size, task.size, task.channels):
        return raw.transpose(2, 0, 1)
    image = _decode(where, raw)
    mode = "L" if task.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (task.size, task.size):
        image = image.resize((task.size, task.size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if task.channels == 1 else pixels.transpose(2, 0, 1)


def _decode(where: str, raw: Path | bytes | np.ndarray) -> Image.Image:
    """The image with 8 bits a channel, turned upright. Raises DataError where it is damaged or unreasonably large."""
    try:
        if isinstance(raw, np.ndarray):
            return Image.fromarray(raw[:, :, 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw)
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as opened:
            # Pillow itself only warns up to twice its limit.
            if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"it has {opened.width} x {opened.height} pixels")
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits a channel")
        return image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"the image {where} is too large to decode safely: {error}",
            hint=f"scale it down to at most {Image.MAX_IMAGE_PIXELS} pixels, or remove it from the data",
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(f"the image {where} is damaged, empty or of no known format", hint=_REPLACE) from error
    except Exception as error:  # a decoder may raise nearly anything on a damaged file
        raise DataError(f"the image {where} cannot be decoded: {error or repr(error)}", hint=_REPLACE) from error
