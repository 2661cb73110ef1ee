"""What a GPU makes of the coordinator's two stages at a real size, against the bare libraries on the same GPU.

    python benchmarks/gpu.py --json runs/gpu/result.json

Generation: a pipeline with the networks of Stable Diffusion 1.5 at 512 pixels, with random weights, since only its
speed is asked for. `gptfl generate` writes shards of pictures at the size of the task; the bare pipeline is called in a
loop with the same batches and throws its pictures away. Pre-training: a ResNet-50 on 224 pixels, with warped images and
without; the bare loop has the same network, precision and optimiser, and one batch that lies on the GPU already.
The first batch and, of ours, the last of an epoch, which is smaller, are left out. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gptfl_dist.config.plan import batch_count
from gptfl_dist.config.synthesis import Generator, Prompts, Synthesis
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.group import ALONE
from gptfl_dist.learning.models import build_model, logits
from gptfl_dist.learning.pretrain import pretrain, split_synthetic
from gptfl_dist.synthesis.generator import EMBEDDED
from gptfl_dist.synthesis.pipeline import pipeline_class
from gptfl_dist.synthesis.synthesize import synthesize

LABELS = ("cat", "dog")
TASK = Task(size=224, channels=3)
GUIDANCE = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=80, help="pictures to generate, whole batches")
    parser.add_argument("--steps", type=int, default=25, help="of the scheduler")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time")
    parser.add_argument("--training-images", type=int, default=4096)
    parser.add_argument("--training-batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path, default=None, help="also written to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here")
    if options.images % (len(LABELS) * options.batch_size):
        parser.error(f"--images: expected a multiple of {len(LABELS)} times --batch-size")
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        result["generation"] = generation(Path(folder), options.images, options.steps, options.batch_size)
        result["pretraining"] = pretraining(Path(folder), options.training_images, options.training_batch_size)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


class Clock:
    """A progress report that takes the time between two counts, once the GPU has done what they count."""

    def __init__(self, first: int, last: int) -> None:
        self._times = dict.fromkeys((first, last), 0.0)

    def __call__(self, done: int, total: int) -> None:
        if done in self._times:
            torch.cuda.synchronize()
            self._times[done] = time.monotonic()

    def each(self) -> float:
        """Seconds for one of what is counted."""
        (first, started), (last, ended) = self._times.items()
        return (ended - started) / (last - first)


def generation(folder: Path, images: int, steps: int, batch_size: int) -> dict[str, float]:
    """Seconds a picture, ours and bare, and GiB of GPU memory at the most."""
    stable_diffusion(folder / "pipeline")
    generator = Generator(source=str(folder / "pipeline"), steps=steps, guidance=GUIDANCE, batch_size=batch_size)
    settings = Synthesis(
        generator=generator,
        prompts=Prompts(templates=["a photo of a {label}"]),
        images_per_label=images // len(LABELS),
        shard_size=2 * batch_size,
        folder=folder / "set",
    )
    ours, bare = Clock(batch_size, images), Clock(batch_size, images)
    torch.cuda.reset_peak_memory_stats()
    synthesize(settings, TASK, LABELS, 0, settings.folder, ours, ALONE)
    memory = torch.cuda.max_memory_allocated()
    pipeline = pipeline_class().from_pretrained(folder / "pipeline", dtype=torch.float16).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    for done in range(batch_size, images + 1, batch_size):
        prompts = ["a photo of a cat"] * batch_size
        pipeline(prompt=prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np")
        bare(done, images)
    return {"seconds a picture": ours.each(), "bare": bare.each(), "GiB": memory / 2**30}


def stable_diffusion(folder: Path) -> None:
    """Saves a pipeline of the sizes of Stable Diffusion 1.5 in half precision."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    with torch.device("cuda"):
        torch.manual_seed(0)
        parts = {
            "vae": AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512],
                layers_per_block=2,
                sample_size=512,
            ),
            "unet": UNet2DConditionModel(
                sample_size=64,
                down_block_types=down,
                up_block_types=up,
                block_out_channels=[320, 640, 1280, 1280],
                cross_attention_dim=768,
                attention_head_dim=8,
            ),
            "text_encoder": CLIPTextModel(text),
        }
    pipeline = StableDiffusionPipeline(
        **{name: part.half() for name, part in parts.items()},
        tokenizer=AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def pretraining(folder: Path, images: int, batch_size: int) -> dict[str, float]:
    """Images a second: ours without warped images and with them, and bare."""
    from transformers import ResNetConfig

    ResNetConfig().save_pretrained(folder / "resnet-50")
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *TASK.shape), generator=draw, dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(images) % len(LABELS), LABELS)
    found = {}
    for name, augmentation in (("images a second", False), ("with warped images", True)):
        settings = Pretraining(epochs=1, batch_size=batch_size, augmentation=augmentation, device="cuda")
        clock = Clock(1, batch_count(len(split_synthetic(data, settings, seed=0)[0]), batch_size) - 1)
        pretrain(resnet(folder), data, settings, TASK, seed=0, progress=clock)
        found[name] = batch_size / clock.each()
    return {**found, "bare": bare_training(resnet(folder).to("cuda"), batch_size)}


def resnet(folder: Path) -> nn.Module:
    return build_model(Model(name="transformers", source=str(folder / "resnet-50")), TASK, len(LABELS), seed=0)


def bare_training(model: nn.Module, batch_size: int, batches: int = 30) -> float:
    """Images a second of a loop that does nothing but train."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters())
    images = torch.randn(batch_size, *TASK.shape, device="cuda")
    labels = torch.arange(batch_size, device="cuda") % len(LABELS)
    clock = Clock(1, batches)
    for batch in range(1, batches + 1):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = cross_entropy(logits(model, images), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it out
        optimiser.step()
        clock(batch, batches)
    return batch_size / clock.each()


if __name__ == "__main__":
    main()
