"""Generation in order: prompts, samples, their files, shards. What is there is kept; what is missing is made.

Batches are cut inside a shard only, and in it by guidance scale (a pipeline's call takes one): kernels differ
bitwise by batch size, so a resumed set must run the very batches that an undisturbed one would have run.

Several ranks take turns of one shard each. Rank 0 plans, and alone writes: the others send it their shards. So a set
is the same whatever the number of ranks, provided that each has as many threads as one alone would have, by which
kernels differ too: `threads` is never shared out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from gptfl_dist.audio.clip import wav_bytes
from gptfl_dist.config.base import Section
from gptfl_dist.config.synthesis import Generator, Synthesis
from gptfl_dist.config.task import Task
from gptfl_dist.errors import GeneratorError
from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.generator import find_generator, load_generator, place, require_known_labels
from gptfl_dist.synthesis.pipeline import GeneratorFolder, PipelineGenerator, Placement
from gptfl_dist.synthesis.prompts import build_prompts
from gptfl_dist.synthesis.samples import Sample, plan_samples
from gptfl_dist.synthesis.speech import Engines, SpeechGenerator
from gptfl_dist.synthesis.store import (
    ClipRequest,
    Environment,
    GeneratorRequest,
    Manifest,
    Request,
    Shard,
    TaskRequest,
)

_LIBRARIES = ("diffusers", "numpy", "pillow", "pyarrow", "torch", "transformers")


@dataclass(frozen=True)
class SyntheticSet:
    """A finished synthetic data set."""

    folder: Path
    manifest: Manifest

    @property
    def count(self) -> int:
        """How many samples it has."""
        return self.manifest.request.count


class Ranks(Protocol):
    """The processes that make one set together, such as `gptfl_dist.learning.group.Group`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, at every rank."""

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank gives, by rank, at rank 0; nothing at the others."""


class _Work(Section):
    """What rank 0 found to do: the numbers of the shards that are missing, and where all must make them."""

    environment: Environment
    missing: list[int]


def synthesize(
    settings: Synthesis,
    task: Task,
    labels: Sequence[str],
    seed: int,
    folder: Path,
    progress: Callable[[int, int], None],
    ranks: Ranks,
) -> SyntheticSet:
    """Make the synthetic set in `folder`, or finish it, or find it finished.

    `progress(done, total)` counts samples at rank 0, first with those that were kept, then after each batch. May be
    interrupted at any moment; the same call goes on from there and ends with the same bytes. Every rank calls it alike,
    except that `settings.generator.device` is its own; rank 0 alone needs `folder`.
    Raises GeneratorError (no such generator, or it fails), StorageError (the folder holds another set, a full disk).
    """
    require_known_labels(settings.generator, labels)
    found = find_generator(settings.generator)
    request = _request(settings, task, labels, seed, found)
    if ranks.rank > 0:
        work = _Work.model_validate_json(ranks.share(None))
        if work.missing:
            _require_environment(settings, work.environment, ranks.rank)
            for _ in _made(load_generator(settings.generator, found), request, work, ranks, lambda made: None):
                pass
        return SyntheticSet(folder, Manifest.model_validate_json(ranks.share(None)))
    with store.locked(folder):
        manifest = store.read_manifest(folder)
        if manifest is not None:
            store.require_same(manifest.request, request, folder, "another synthetic set")
        kept = {shard.file: shard for shard in manifest.shards if store.intact(folder, shard)} if manifest else {}
        progress(sum(shard.rows for shard in kept.values()), request.count)
        if manifest is None or len(kept) < request.shard_count:
            manifest = _fill(settings, folder, request, manifest, kept, found, progress, ranks)
        else:
            ranks.share(_Work(environment=manifest.environment, missing=[]).model_dump_json().encode())
        ranks.share(manifest.model_dump_json().encode())
        return SyntheticSet(folder, manifest)


def is_synthesized(settings: Synthesis, task: Task, labels: Sequence[str], seed: int, folder: Path) -> bool:
    """Whether `synthesize` has nothing left to make in `folder`. Waits for nobody who holds it, and writes nothing.

    Raises GeneratorError, StorageError.
    """
    manifest = store.read_manifest(folder)
    if manifest is None or not manifest.complete:
        return False
    request = _request(settings, task, labels, seed, find_generator(settings.generator))
    return manifest.request == request and all(store.intact(folder, shard) for shard in manifest.shards)


def _fill(
    settings: Synthesis,
    folder: Path,
    request: Request,
    earlier: Manifest | None,
    kept: dict[str, Shard],
    found: GeneratorFolder | Engines,
    progress: Callable[[int, int], None],
    ranks: Ranks,
) -> Manifest:
    """Make the shards that are not kept, as rank 0."""
    placement = place(settings.generator)
    threads = settings.threads or (earlier.environment.threads if earlier else _threads_for(placement))
    environment = _environment(placement, threads)
    if earlier is not None and kept:
        store.require_same(
            earlier.environment,
            environment,
            folder,
            "an unfinished set that was begun in another environment",
            hint="Restore that environment to finish it, or delete the folder to have it made anew.",
        )
    missing = [number for number in range(request.shard_count) if store.shard_name(number) not in kept]
    work = _Work(environment=environment, missing=missing)
    ranks.share(work.model_dump_json().encode())
    generator = load_generator(settings.generator, found)

    def entered() -> Manifest:
        shards = tuple(kept[name] for name in sorted(kept))
        return Manifest(generator=generator.describe()["id"], request=request, environment=environment, shards=shards)

    store.write_manifest(folder, entered())
    done = sum(shard.rows for shard in kept.values())

    def report(made: int) -> None:
        progress(done + made, request.count)

    for number, data in _made(generator, request, work, ranks, report):
        shard = store.write_shard(folder, number, request.rows_of(number), data)
        kept[shard.file] = shard
        store.write_manifest(folder, entered())
        done += shard.rows
        if ranks.size > 1:  # else the last batch said so
            report(0)
    return entered()


def _made(
    generator: PipelineGenerator | SpeechGenerator,
    request: Request,
    work: _Work,
    ranks: Ranks,
    progress: Callable[[int], None],
) -> Iterator[tuple[int, bytes]]:
    """Makes this rank's part of the missing shards; gives those of all ranks, with their numbers, at rank 0.

    `progress(made)` counts the samples of the shard in work.
    """
    samples = plan_samples(
        request.labels, request.prompts, request.generator.guidance, request.seed, request.images_per_label
    )
    with _torch_threads(work.environment.threads), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as encoders:
        for start in range(0, len(work.missing), ranks.size):
            turn = work.missing[start : start + ranks.size]
            data = b""
            if ranks.rank < len(turn):
                first = turn[ranks.rank] * request.shard_size
                data = _shard(generator, samples[first : first + request.shard_size], request, encoders, progress)
            yield from zip(turn, ranks.gather(data), strict=False)


def _shard(
    generator: PipelineGenerator | SpeechGenerator,
    part: Sequence[Sample],
    request: Request,
    encoders: Executor,
    progress: Callable[[int], None],
) -> bytes:
    """The file of the shard of these samples."""
    files: dict[int, bytes] = {}
    for batch in _batches(part, request.generator.batch_size):
        made = _files(generator, [part[position] for position in batch], request, encoders)
        files |= zip(batch, made, strict=True)
        progress(len(files))
    ordered = [files[position] for position in range(len(part))]
    return store.encode_shard(request, part, ordered, generator.takes_guidance)


def _batches(part: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Positions in a shard, batch by batch: equal guidance together, scales ascending, storage order within."""
    for scale in sorted({sample.guidance for sample in part}):
        positions = [position for position, sample in enumerate(part) if sample.guidance == scale]
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def _files(
    generator: PipelineGenerator | SpeechGenerator, batch: Sequence[Sample], request: Request, encoders: Executor
) -> Iterator[bytes]:
    """The samples of one batch as files. A GPU waits while pictures are made small and encoded: all cores do it."""
    task = request.task
    if isinstance(task, ClipRequest):
        clips = generator.clips(batch, request.labels, task.sample_rate, task.duration)
        return (wav_bytes(clip, task.sample_rate) for clip in clips)
    assert isinstance(generator, PipelineGenerator)  # the config lets engines speak for task.kind audio alone
    pictures = generator.images(batch, request.labels)
    return encoders.map(lambda picture: store.encode_png(picture, task.size, task.channels), pictures)


def _request(
    settings: Synthesis, task: Task, labels: Sequence[str], seed: int, found: GeneratorFolder | Engines
) -> Request:
    generator: Generator = settings.generator
    guidance = generator.guidance if isinstance(generator.guidance, list) else [generator.guidance]
    return Request(
        labels=list(labels),
        prompts={label: list(prompts) for label, prompts in build_prompts(settings.prompts, labels).items()},
        seed=seed,
        images_per_label=settings.images_per_label,
        shard_size=settings.shard_size,
        task=TaskRequest(size=task.size, channels=task.channels)
        if task.kind == "image"
        else ClipRequest(sample_rate=task.sample_rate, duration=task.duration),
        generator=GeneratorRequest(
            digest=found.digest,
            guidance=guidance,
            steps=generator.steps,
            scheduler=generator.scheduler,
            dtype=generator.dtype,
            batch_size=generator.batch_size,
            size=generator.size,
        ),
    )


def _threads_for(placement: Placement) -> int:
    """All usable cores; beside a GPU, on which pictures do not depend on threads, one."""
    return len(os.sched_getaffinity(0)) if placement.device.startswith("cpu") else 1


def _require_environment(settings: Synthesis, expected: Environment, rank: int) -> None:
    """Raises GeneratorError where this rank would make other pictures than rank 0 of the same samples."""
    mine = _environment(place(settings.generator), expected.threads)
    if mine != expected:
        raise GeneratorError(
            f"rank {rank} would generate in another environment than rank 0: {mine}, expected {expected}",
            hint="Run all ranks on the same kind of device, with the same versions of the libraries.",
        )


def _environment(placement: Placement, threads: int) -> Environment:
    return Environment(
        device=placement.device.partition(":")[0],
        dtype=placement.dtype,
        threads=threads,
        libraries={name: version(name) for name in _LIBRARIES},
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
