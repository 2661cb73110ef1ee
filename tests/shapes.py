"""Drawn shapes: small pictures of three kinds that a small model tells apart, sets of them, a classifier of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.samples import plan_samples
from gptfl_dist.synthesis.store import Environment, GeneratorRequest, Manifest, Request, TaskRequest

SHAPES = ("disc", "frame", "bars")
SIZE = 12


def shapes(shown: Sequence[int], seed: int = 0) -> np.ndarray:
    """One picture for each position in SHAPES, white on black with noise: uint8 (N, SIZE, SIZE, 1)."""
    random = np.random.default_rng(seed)
    pictures = np.empty((len(shown), SIZE, SIZE, 1), np.uint8)
    for number, shape in enumerate(shown):
        image = Image.new("L", (SIZE, SIZE))
        draw = ImageDraw.Draw(image)
        left, top = random.integers(0, 3, 2)
        box = (left, top, left + random.integers(7, 9), top + random.integers(7, 9))
        if shape == 0:
            draw.ellipse(box, fill=255)
        elif shape == 1:
            draw.rectangle(box, outline=255, width=2)
        else:
            for across in range(box[0], box[2], 4):
                draw.line((across, box[1], across, box[3]), fill=255, width=2)
        noisy = np.asarray(image) * 0.8 + random.integers(0, 50, (SIZE, SIZE))
        pictures[number, ..., 0] = noisy.astype(np.uint8)
    return pictures


def shape_set(folder: Path, per_label: int, wrong: Sequence[int] = ()) -> Request:
    """A finished synthetic set of SHAPES in `folder`; the images at the positions `wrong` show the next shape."""
    labels = list(SHAPES)
    request = Request(
        labels=labels,
        prompts={label: [f"a {label}"] for label in labels},
        seed=0,
        images_per_label=per_label,
        shard_size=10,
        task=TaskRequest(size=SIZE, channels=1),
        generator=GeneratorRequest(
            digest="", guidance=[1.0], steps=1, scheduler=None, dtype="auto", batch_size=1, size=None
        ),
    )
    samples = plan_samples(labels, request.prompts, [1.0], 0, per_label)
    pictures = shapes([(sample.label + (at in wrong)) % len(SHAPES) for at, sample in enumerate(samples)])
    pngs = [store.encode_png(picture, SIZE, 1) for picture in pictures]
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(samples), 10)):
        part = samples[start : start + 10]
        data = store.encode_shard(request, part, pngs[start : start + 10], True)
        shards.append(store.write_shard(folder, number, len(part), data))
    environment = Environment(device="cpu", dtype="float32", threads=1, libraries={})
    store.write_manifest(
        folder, Manifest(generator="none", request=request, environment=environment, shards=tuple(shards))
    )
    return request


def shape_classifier(folder: Path, names: Sequence[str]) -> Path:
    """A small `transformers` ResNet that was trained on shapes, saved in `folder`; `names` are those of its labels."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(names)),
    )
    model = ResNetForImageClassification(config).train()
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_pct=1.0, do_resize=False, image_mean=[0.5], image_std=[0.5]
    )
    shown = torch.arange(300) % len(SHAPES)
    pixels = (torch.from_numpy(shapes(shown.tolist(), seed=1)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for chosen in torch.randperm(300).split(30):
            loss = model(pixel_values=pixels[chosen], labels=shown[chosen]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
