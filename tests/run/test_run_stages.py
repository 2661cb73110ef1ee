"""Pre-training as a stage: its weights are used again only where they are those that it wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptfl_dist.config.load import load_federation
from gptfl_dist.run.stages import pretrain
from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.samples import plan_samples
from gptfl_dist.synthesis.store import Environment, GeneratorRequest, Manifest, Request, TaskRequest
from gptfl_dist.testing.federations import LABELS, tiny_federation


def synthetic_set(folder: Path) -> None:
    """Eight pictures of noise a label."""
    labels, prompts = list(LABELS), {label: [label] for label in LABELS}
    generator = GeneratorRequest(
        digest="", guidance=[1.0], steps=1, scheduler=None, dtype="auto", batch_size=1, size=None
    )
    request = Request(
        labels=labels,
        prompts=prompts,
        seed=0,
        images_per_label=8,
        shard_size=16,
        task=TaskRequest(size=8, channels=1),
        generator=generator,
    )
    samples = plan_samples(labels, prompts, [1.0], 0, 8)
    noise = [np.random.default_rng(sample.seed).integers(0, 256, (8, 8, 1), np.uint8) for sample in samples]
    folder.mkdir()
    shard = store.write_shard(folder, 0, labels, samples, [store.encode_png(part, 8, 1) for part in noise], True)
    environment = Environment(device="cpu", dtype="float32", threads=1, libraries={})
    store.write_manifest(folder, Manifest(generator="none", request=request, environment=environment, shards=(shard,)))


def test_pretrained_weights_are_reused_while_they_are_whole(tmp_path: Path) -> None:
    settings = {"pretraining": {"epochs": 1, "threads": 1}, "synthesis": {"images_per_label": 8}}
    path = tiny_federation(tmp_path, arms=["synthetic_only"], **settings)
    synthetic_set(tmp_path / "synthetic")
    file = load_federation(path)
    first = pretrain(file, tmp_path)
    weights = file.run_folder / "pretrained.safetensors"
    whole, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert pretrain(file, tmp_path) == first
    assert weights.stat().st_mtime_ns == written

    for damaged in (whole[:-4] + b"\0\0\0\1", whole[:-4], b""):
        weights.write_bytes(damaged)
        assert pretrain(file, tmp_path) == first
        assert weights.read_bytes() == whole
