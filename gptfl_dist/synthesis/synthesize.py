"""Generation in order: prompts, samples, pictures, shards. What is there is kept; what is missing is made.

Batches are cut inside a shard only, and in it by guidance scale (a pipeline's call takes one): kernels differ
bitwise by batch size, so a resumed set must run the very batches that an undisturbed one would have run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from gptfl_dist.config.federation import Generator, Synthesis, Task
from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.generator import (
    GeneratorFolder,
    ImageGenerator,
    Placement,
    find_generator,
    load_generator,
    place,
    require_known_labels,
)
from gptfl_dist.synthesis.prompts import build_prompts
from gptfl_dist.synthesis.samples import Sample, plan_samples
from gptfl_dist.synthesis.store import Environment, GeneratorRequest, Manifest, Request, Shard, TaskRequest

_LIBRARIES = ("diffusers", "numpy", "pillow", "pyarrow", "torch", "transformers")


@dataclass(frozen=True)
class SyntheticSet:
    """A finished synthetic data set."""

    folder: Path
    manifest: Manifest

    @property
    def count(self) -> int:
        """How many images it has."""
        return self.manifest.request.count


def synthesize(
    settings: Synthesis,
    task: Task,
    labels: Sequence[str],
    seed: int,
    folder: Path,
    progress: Callable[[int, int], None],
) -> SyntheticSet:
    """Make the synthetic set in `folder`, or finish it, or find it finished.

    `progress(done, total)` counts images, first with those that were kept, then after each batch. May be interrupted
    at any moment; the same call goes on from there and ends with the same bytes.
    Raises GeneratorError (no such generator, or it fails), StorageError (the folder holds another set, a full disk).
    """
    require_known_labels(settings.generator, labels)
    found = find_generator(settings.generator)
    request = _request(settings, task, labels, seed, found)
    with store.locked(folder):
        manifest = store.read_manifest(folder)
        if manifest is not None:
            store.require_same(manifest.request, request, folder, "another synthetic set")
        kept = {shard.file: shard for shard in manifest.shards if store.intact(folder, shard)} if manifest else {}
        progress(sum(shard.rows for shard in kept.values()), request.count)
        if manifest is None or len(kept) < request.shard_count:
            manifest = _fill(settings, folder, request, manifest, kept, found, progress)
        return SyntheticSet(folder, manifest)


def _fill(
    settings: Synthesis,
    folder: Path,
    request: Request,
    earlier: Manifest | None,
    kept: dict[str, Shard],
    found: GeneratorFolder,
    progress: Callable[[int, int], None],
) -> Manifest:
    """Make the shards that are not kept."""
    threads = settings.threads or (earlier.environment.threads if earlier else len(os.sched_getaffinity(0)))
    environment = _environment(place(settings.generator), threads)
    if earlier is not None and kept:
        store.require_same(
            earlier.environment,
            environment,
            folder,
            "an unfinished set that was begun in another environment",
            hint="Restore that environment to finish it, or delete the folder to have it made anew.",
        )
    generator = load_generator(settings.generator, found)

    def entered() -> Manifest:
        shards = tuple(kept[name] for name in sorted(kept))
        return Manifest(generator=generator.describe()["id"], request=request, environment=environment, shards=shards)

    store.write_manifest(folder, entered())
    samples = plan_samples(
        request.labels, request.prompts, request.generator.guidance, request.seed, request.images_per_label
    )
    done = sum(shard.rows for shard in kept.values())
    with _torch_threads(threads):
        for number in range(request.shard_count):
            if store.shard_name(number) in kept:
                continue
            part = samples[number * request.shard_size : (number + 1) * request.shard_size]
            pngs: dict[int, bytes] = {}
            for batch in _batches(part, request.generator.batch_size):
                pngs |= _pngs(generator, part, batch, request)
                progress(done + len(pngs), request.count)
            done += len(part)
            ordered = [pngs[position] for position in range(len(part))]
            shard = store.write_shard(folder, number, request.labels, part, ordered, generator.takes_guidance)
            kept[shard.file] = shard
            store.write_manifest(folder, entered())
    return entered()


def _batches(part: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Positions in a shard, batch by batch: equal guidance together, scales ascending, storage order within."""
    for scale in sorted({sample.guidance for sample in part}):
        positions = [position for position, sample in enumerate(part) if sample.guidance == scale]
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def _pngs(generator: ImageGenerator, part: Sequence[Sample], batch: list[int], request: Request) -> dict[int, bytes]:
    pictures = generator.images([part[position] for position in batch], request.labels)
    task = request.task
    return {
        position: store.encode_png(picture, task.size, task.channels)
        for position, picture in zip(batch, pictures, strict=True)
    }


def _request(settings: Synthesis, task: Task, labels: Sequence[str], seed: int, found: GeneratorFolder) -> Request:
    generator: Generator = settings.generator
    guidance = generator.guidance if isinstance(generator.guidance, list) else [generator.guidance]
    return Request(
        labels=list(labels),
        prompts={label: list(prompts) for label, prompts in build_prompts(settings.prompts, labels).items()},
        seed=seed,
        images_per_label=settings.images_per_label,
        shard_size=settings.shard_size,
        task=TaskRequest(size=task.size, channels=task.channels),
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
