"""The forms in which a silo may have its samples: label folders, Parquet files or a saved `datasets` folder, .npz.

A reader lists every sample's own label name and where it is; it decodes nothing.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptfl_dist.audio import clip
from gptfl_dist.config.silo import Data
from gptfl_dist.errors import DataError
from gptfl_dist.learning import images

Kind = Literal["image", "audio"]
Raw = Path | bytes | np.ndarray
CHECK = "check that the file is whole and that this user may read it"
_SPLIT_FILE = re.compile(r"(.+?)-\d+-of-\d+\.parquet")


@dataclass(frozen=True)
class _Look:
    """What one kind of sample is called in messages, and how it is told from other files and columns."""

    one: str
    suffixes: frozenset[str]
    layout: str
    feature: str
    columns: tuple[str, ...]


_LOOK: dict[Kind, _Look] = {
    "image": _Look(
        one="image",
        suffixes=images.SUFFIXES,
        layout="put the images into one sub-folder a label: {path}/cat/1.png, {path}/dog/2.png",
        feature="Image",
        columns=("image", "img", "images"),
    ),
    "audio": _Look(
        one="clip",
        suffixes=clip.SUFFIXES,
        layout="put the clips into one sub-folder a label: {path}/yes/1.wav, {path}/no/2.wav",
        feature="Audio",
        columns=("audio", "clip", "clips"),
    ),
}


@dataclass(frozen=True)
class Samples:
    """What a reader found: each sample's own label name, and in the same order where it is and what to decode."""

    labels: list[str]
    raw: Iterator[tuple[str, Raw]]


def list_samples(data: Data, kind: Kind) -> Samples:
    """What the reader of the data's form finds, at least one sample. Raises DataError or OSError."""
    path = data.path
    form = _form(data)
    samples = {"folder": _read_folder, "parquet": _read_parquet, "npz": _read_npz}[form](path, _LOOK[kind])
    if not samples.labels:
        raise DataError(f"{path} holds no samples", hint="check that the path is the folder or file you mean")
    return samples if data.samples is None else _only(samples, data.samples)


def _only(samples: Samples, path: Path) -> Samples:
    numbers = numbers_in(path, len(samples.labels))
    labels = [label for number, label in enumerate(samples.labels) if number in numbers]
    return Samples(labels, (raw for number, raw in enumerate(samples.raw) if number in numbers))


def numbers_in(path: Path, count: int) -> set[int]:
    """The numbers, from 0, of some of `count` samples, which stand in a text file, one a line. Raises DataError."""
    try:
        numbers = {int(line) for line in path.read_text(encoding="utf-8").split()}
    except ValueError:
        raise DataError(f"{path}: expected a whole number in each line, the numbers of samples from 0") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="check data.samples") from None
    if not numbers or not 0 <= min(numbers) <= max(numbers) < count:
        raise DataError(f"{path}: expected numbers of samples from 0 to {count - 1}, one at least")
    return numbers


def kind_of(data: Data) -> Kind:
    """What the data holds: images, or audio where no image can be found. Raises DataError or OSError."""
    try:
        list_samples(data, "image")
    except DataError as no_image:
        try:
            list_samples(data, "audio")
        except DataError:
            raise no_image from None
        return "audio"
    return "image"


def _form(data: Data) -> str:
    """The form of the data: folder, parquet or npz. Raises DataError where there is none."""
    if not data.path.exists():
        raise DataError(
            f"the data {data.path} does not exist",
            hint="check the path: it is relative to the silo or federation file that names it",
        )
    return _detect(data.path) if data.format == "auto" else data.format


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


def _read_folder(path: Path, look: _Look) -> Samples:
    layout = look.layout.format(path=path)
    if not path.is_dir():
        raise DataError(f"the data {path} is a file, expected a folder", hint=layout)
    files: list[tuple[str, Path]] = []
    for entry in _visible(path):
        if entry.is_dir():
            found = [file for file in sorted(entry.rglob("*")) if _is_sample(file, look)]
            if not found:
                raise DataError(
                    f"the label folder {entry} holds no {look.one} ({', '.join(sorted(look.suffixes))})",
                    hint=f"remove the folder, or put that label's {look.one}s into it",
                )
            files += [(entry.name, file) for file in found]
        elif _is_sample(entry, look):
            raise DataError(
                f"the {look.one} {entry} lies beside the label folders, so it has no label",
                hint=layout,
            )
    if not files:
        raise DataError(f"the folder {path} holds no label folders", hint=layout)
    return Samples([label for label, _ in files], ((str(file), file) for _, file in files))


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_sample(path: Path, look: _Look) -> bool:
    return path.suffix.lower() in look.suffixes and not path.name.startswith(".") and path.is_file()


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


def _read_parquet(path: Path, look: _Look) -> Samples:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir() and _saved_dataset(path):
        return _read_saved_dataset(path, look)
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
    columns: list[str] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                column, label, names = _columns(parquet.schema_arrow, file, look)
                labels += _label_names(parquet.read([label]).column(label).to_pylist(), names, file)
        except pa.ArrowException as error:
            raise DataError(f"{file} is no readable Parquet file: {error}", hint=CHECK) from error
        columns.append(column)

    def encoded() -> Iterator[tuple[str, bytes]]:
        for file, column in zip(files, columns, strict=True):
            try:
                with pq.ParquetFile(file) as parquet:
                    yield from _encoded(parquet.iter_batches(batch_size=1024, columns=[column]), file, look)
            except pa.ArrowException as error:
                raise DataError(f"{file} is damaged: {error}", hint=CHECK) from error

    return Samples(labels, encoded())


def _read_saved_dataset(path: Path, look: _Look) -> Samples:
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
        raise DataError(f"{path} is no readable datasets folder: {error}", hint=CHECK) from error
    column, label, names = _columns(table.schema, path, look)
    labels = _label_names(table.column(label).to_pylist(), names, path)
    return Samples(labels, _encoded(table.select([column]).to_batches(max_chunksize=1024), path, look))


def _columns(schema: Any, where: Path, look: _Look) -> tuple[str, str, list[str] | None]:
    """The samples' column, the labels' column and the names of its integers (None where none are declared)."""
    metadata = (schema.metadata or {}).get(b"huggingface", b"{}")
    features: dict[str, Any] = json.loads(metadata).get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    column = _one_column(schema.names, kinds, look.feature, look.columns, where)
    label = _one_column(schema.names, kinds, "ClassLabel", ("label", "labels"), where)
    names = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    return column, label, names


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


def _encoded(batches: Any, where: Path, look: _Look) -> Iterator[tuple[str, bytes]]:
    """The bytes of each sample in record batches of one column: either raw bytes or {bytes, path}."""
    row = 0
    for batch in batches:
        for value in batch.column(0).to_pylist():
            place = f"row {row} of {where}"
            if isinstance(value, dict):
                value = value.get("bytes")
            if not isinstance(value, bytes):
                raise DataError(
                    f"the {look.one} in {place} has no bytes",
                    hint=f"save the data set with its {look.one}s embedded "
                    "(datasets: Dataset.to_parquet or save_to_disk)",
                )
            yield place, value
            row += 1


# .npz files

_NPZ = "save it as np.savez(path, images=..., labels=...)"


def _read_npz(path: Path, look: _Look) -> Samples:
    if look.one != "image":
        raise DataError(f"{path} is an .npz file, which holds images", hint=look.layout.format(path=path.parent))
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file: it is no zip archive", hint=_NPZ)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"images", "labels"} - set(archive.files)
            if missing:
                raise DataError(
                    f"{path} has the arrays {', '.join(archive.files) or 'none'}: {', '.join(sorted(missing))} missing",
                    hint=_NPZ,
                )
            pictures, labels = archive["images"], archive["labels"]
            names = archive["label_names"] if "label_names" in archive.files else None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as .npz: {error}",
            hint=f"{_NPZ} with plain arrays: object arrays are never read",
        ) from error
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
        raise DataError(
            f"images in {path} is {pictures.dtype} of shape {pictures.shape}, expected uint8 (N, H, W) or (N, H, W, C)",
            hint="store pixels of 0 to 255 as uint8, channels last",
        )
    if labels.shape != (len(pictures),) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels in {path} is {labels.dtype} of shape {labels.shape}, expected ({len(pictures)},) ints or strings",
            hint="give one label an image, as integers or with dtype='U'",
        )
    declared = [str(name) for name in names] if names is not None else None
    found = _label_names(labels.tolist(), declared, path)
    return Samples(found, ((f"image {index} of {path}", image) for index, image in enumerate(pictures)))
