"""Trains the generator of the study on Fashion-MNIST: a class-conditional latent diffusion pipeline.

    python benchmarks/fashion_generator.py --images public.npz --out generator --threads 2

The parts and the training are those of examples/glyph_generator, with garments in place of drawn digits: a VAE, then a
DiT of 1.6 million parameters on its latents, both with checkpoints, from which an interrupted training goes on. The
classes of the pipeline are the labels' places in `labels`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "glyph_generator"))

from class_conditional import train_transformer
from model import build_scheduler
from train import Plan, encode, train_vae

FULL = Plan(pictures=10_000, vae_steps=400, vae_batch=48, steps=2_000, batch=96, ema_decay=0.998)
QUICK = Plan(pictures=2_000, vae_steps=60, vae_batch=32, steps=60, batch=48, ema_decay=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="an .npz of images (N, 32, 32) and labels")
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="shows that it runs; its pictures are poor")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    plan = QUICK if options.quick else FULL
    with np.load(options.images) as arrays:
        images, labels = arrays["images"][: plan.pictures], torch.from_numpy(arrays["labels"][: plan.pictures])
    work = options.out.with_name(f"{options.out.name}-work")
    work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(work, images, plan, options.seed)
    transformer = train_transformer(work, encode(work, vae, images), labels, plan, options.seed)
    partial = work / "pipeline"
    DiTPipeline(transformer, vae, build_scheduler()).save_pretrained(partial)
    partial.rename(options.out)
    print(f"the pipeline is in {options.out}", flush=True)


if __name__ == "__main__":
    main()
