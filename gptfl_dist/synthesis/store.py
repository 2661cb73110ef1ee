"""The synthetic data set on disk: Parquet shards that Hugging Face `datasets` reads, and a manifest.

The manifest is written first, with the request (everything that decides what the set is) and the environment that
makes it; each finished shard is then written under a temporary name, renamed, and entered with its digest. So after a
kill at any moment, what the manifest names is whole, and what it does not name is made again. A folder whose manifest
holds another request is refused, never overwritten.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from PIL import Image
from pydantic import Field, ValidationError

from gptfl_dist.audio.clip import read_clip
from gptfl_dist.audio.spectrogram import spectrogram
from gptfl_dist.config.base import Section
from gptfl_dist.config.task import Task
from gptfl_dist.config.units import format_duration
from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.lock import held
from gptfl_dist.synthesis.samples import Sample

MANIFEST = "manifest.json"
_SHOWN = 80  # characters of a value in a message
_ANOTHER = "Choose another synthesis.folder, or delete this one to have it made anew."


class GeneratorRequest(Section):
    """The generator, by the digest of its files or engines, and the settings that shape its samples."""

    digest: str
    guidance: list[float]
    steps: int
    scheduler: str | None
    dtype: str
    batch_size: int
    size: int | None


class TaskRequest(Section):
    """The size and the channels that pictures are stored in."""

    size: int
    channels: int

    @property
    def shown_as(self) -> Task:
        """The pictures, for a look at them."""
        return Task.model_validate(self.model_dump())


class ClipRequest(Section):
    """The rate that clips are stored at, and the seconds that pipelines make; engines speak as long as they must."""

    sample_rate: int
    duration: float

    @property
    def shown_as(self) -> Task:
        """The clips' spectrograms, for a look at them; models may see others."""
        durations = {"duration": self.duration, "window": min(Task().window, self.duration)}
        texts = {name: format_duration(seconds) for name, seconds in durations.items()}
        return Task.model_validate({"kind": "audio", "sample_rate": self.sample_rate, **texts})


class Request(Section):
    """Everything that decides what the set is. Two equal requests are the same set."""

    labels: list[str]
    prompts: dict[str, list[str]]
    seed: int
    images_per_label: int
    shard_size: int
    task: TaskRequest | ClipRequest
    generator: GeneratorRequest

    @property
    def count(self) -> int:
        """How many samples the set has."""
        return self.images_per_label * len(self.labels)

    @property
    def shard_count(self) -> int:
        """How many shards the set has."""
        return -(-self.count // self.shard_size)

    def rows_of(self, number: int) -> int:
        """How many samples a shard has."""
        return min(self.shard_size, self.count - number * self.shard_size)


class Environment(Section):
    """What can change the last bit of a sample without changing the request: it must stay until the set is whole."""

    device: str
    dtype: str
    threads: int
    libraries: dict[str, str]


class Shard(Section):
    """A finished shard: its file name, its rows, the BLAKE3 digest of its bytes."""

    file: Annotated[str, Field(pattern=r"^shard-\d{5,}\.parquet$")]
    rows: int
    digest: str


class Manifest(Section):
    """`manifest.json`: what the set is, who makes it and how, and the shards that are finished."""

    format: int = 1
    generator: str
    request: Request
    environment: Environment
    shards: tuple[Shard, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every shard is entered."""
        return len(self.shards) == self.request.shard_count


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.parquet"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against other processes; a killed process lets go by itself. Raises StorageError."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = StorageError(f"another process is generating into {folder}", hint="Wait until it ends, or stop it.")
    with held(folder / ".lock", refusal):
        with storing(folder):
            for part in folder.glob(".*.part"):
                part.unlink()  # of a process that was killed while it wrote
        yield


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where it holds no synthetic set. Raises StorageError if it is damaged."""
    path = folder / MANIFEST
    with storing(path):
        if not path.exists():
            if next(folder.glob("shard-*.parquet"), None) is not None:
                raise StorageError(f"{folder} holds shards but no {MANIFEST}", hint=_ANOTHER)
            return None
        text = path.read_bytes()
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise StorageError(
            f"{path} is no manifest of a synthetic set: {where}: {first['msg']}", hint=_ANOTHER
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place in one step. Raises StorageError."""
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())


def require_same(found: Section, expected: Section, folder: Path, what: str, hint: str = _ANOTHER) -> None:
    """Raise StorageError naming the fields in which the folder's manifest differs from what is wanted now."""
    here, wanted = _flat(found.model_dump()), _flat(expected.model_dump())
    differing = [name for name in dict.fromkeys([*here, *wanted]) if here.get(name) != wanted.get(name)]
    if differing:
        lines = [f"{name}: {_difference(here.get(name), wanted.get(name))}" for name in differing]
        more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
        raise StorageError(f"{folder} holds {what}: {'; '.join(lines[:5])}{more}", hint=hint)


def intact(folder: Path, shard: Shard) -> bool:
    """Whether the shard's file is there with the digest that the manifest gives."""
    path = folder / shard.file
    with storing(path):
        return path.is_file() and blake3(path.read_bytes()).hexdigest() == shard.digest


def encode_shard(request: Request, samples: Sequence[Sample], files: Sequence[bytes], guided: bool) -> bytes:
    """A shard's file; the same arguments give the same bytes. `guided` false leaves the guidance column empty.

    `files` are the samples as PNG or WAV files, by what the request asks for.
    """
    column, suffix = _column(request)
    columns = {
        column: [
            {"bytes": file, "path": f"{sample.label:03d}-{sample.index:06d}.{suffix}"}
            for sample, file in zip(samples, files, strict=True)
        ],
        "label": [sample.label for sample in samples],
        "prompt": [sample.prompt for sample in samples],
        "seed": [sample.seed for sample in samples],
        "guidance": [sample.guidance if guided else None for sample in samples],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_schema(request)), buffer)
    return buffer.getvalue()


def write_shard(folder: Path, number: int, rows: int, data: bytes) -> Shard:
    """Write what `encode_shard` gave. Raises StorageError."""
    write_file(folder / shard_name(number), data)
    return Shard(file=shard_name(number), rows=rows, digest=blake3(data).hexdigest())


def read_shard(folder: Path, shard: Shard, task: Task) -> tuple[list[np.ndarray], list[int]]:
    """A shard's samples as `task` shows them, each uint8 (H, W, C), of clips the spectrogram; and their labels.

    Raises StorageError if the file is missing or damaged.
    """
    path = folder / shard.file
    with storing(path):
        data = path.read_bytes()
    if blake3(data).hexdigest() != shard.digest:
        raise StorageError(
            f"{path} is damaged: its BLAKE3 digest is not the one in {MANIFEST}",
            hint="Run the generation again: it makes damaged shards anew and keeps the others.",
        )
    column = "image" if task.kind == "image" else "audio"
    table = pq.read_table(pa.BufferReader(data), columns=[column, "label"])
    files = [row["bytes"] for row in table[column].to_pylist()]
    if task.kind == "image":
        pictures = [decode_png(file, task.channels) for file in files]
    else:
        clips = [read_clip(f"{number} of {path}", file, task.sample_rate) for number, file in enumerate(files)]
        pictures = [spectrogram(clip, task)[..., None] for clip in clips]
    return pictures, table["label"].to_pylist()


def complete_manifest(folder: Path) -> Manifest:
    """The manifest of a finished set. Raises StorageError if there is none or shards are missing."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise StorageError(f"{folder} holds no synthetic set (no {MANIFEST})", hint="Generate it first.")
    if not manifest.complete:
        raise StorageError(
            f"{folder} has {len(manifest.shards)} of {manifest.request.shard_count} shards",
            hint="Run the generation again: it goes on where it stopped.",
        )
    return manifest


def encode_png(picture: np.ndarray, size: int, channels: int) -> bytes:
    """A uint8 (H, W, 1 or 3) picture as the PNG of a square image of `size` pixels in grey or RGB."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(png: bytes, channels: int) -> np.ndarray:
    """A PNG as uint8 (H, W, C)."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], channels)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a file into a StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def _column(request: Request) -> tuple[str, str]:
    """The name of the column that holds the samples, and the suffix of their files."""
    return ("audio", "wav") if isinstance(request.task, ClipRequest) else ("image", "png")


def _schema(request: Request) -> pa.Schema:
    """The Arrow schema with the metadata from which `datasets` learns images or audio, and label names."""
    column, _ = _column(request)
    sample: dict[str, object] = {"_type": "Image"}
    if isinstance(request.task, ClipRequest):
        sample = {"_type": "Audio", "sampling_rate": request.task.sample_rate}
    features = {
        column: sample,
        "label": {"names": request.labels, "_type": "ClassLabel"},
        "prompt": {"dtype": "string", "_type": "Value"},
        "seed": {"dtype": "int64", "_type": "Value"},
        "guidance": {"dtype": "float64", "_type": "Value"},
    }
    return pa.schema(
        {
            column: pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "label": pa.int64(),
            "prompt": pa.string(),
            "seed": pa.int64(),
            "guidance": pa.float64(),
        },
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _difference(here: object, wanted: object) -> str:
    """What was found and what was expected; of long lists only what the other one lacks, or they would look alike."""
    if isinstance(here, list) and isinstance(wanted, list) and max(len(str(here)), len(str(wanted))) > _SHOWN:
        more, less = [item for item in here if item not in wanted], [item for item in wanted if item not in here]
        if more or less:
            return f"found {_short(more or None)} where {_short(less or None)} was expected"
    return f"found {_short(here)}, expected {_short(wanted)}"


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
