"""The alternative that was not shipped: the same latents, steps and sampler, with the digit as a class and no text.

    python class_conditional.py --work glyph-work --out glyphs-by-class      # after train.py with the same work folder
    python evaluate.py glyphs-by-class --work glyph-work

A class-conditional DiT of 1.6 million parameters takes the place of UNet and text encoder, all else is `train.py`'s:
VAE, latents, optimiser, averaging, number of steps. So what `evaluate.py` says of both compares the two ways to tell a
generator what to draw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from model import LATENT_CHANNELS, LATENT_SIZE, build_scheduler
from torch.nn import functional
from train import EMPTY_CAPTIONS, FULL, QUICK, Loop, Plan, encode, make_renders, noised, train_vae

# DiTPipeline takes class 1000 for "no class", as ImageNet's classes end before it.
NO_CLASS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("glyph-work"), help="train.py's (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("glyphs-by-class"), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="shows that it runs; the digits are poor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    plan = QUICK if args.quick else FULL
    renders = make_renders(args.work, plan, args.seed)
    vae = train_vae(args.work, renders.images, plan, args.seed)
    latents = encode(args.work, vae, renders.images)
    transformer = train_transformer(args.work, latents, torch.from_numpy(renders.digits), plan, args.seed)
    DiTPipeline(transformer, vae, build_scheduler()).save_pretrained(args.out)
    print(f"the pipeline is in {args.out}", flush=True)


def train_transformer(
    work: Path, latents: torch.Tensor, labels: torch.Tensor, plan: Plan, seed: int
) -> DiTTransformer2DModel:
    """The DiT, trained on latents (N, C, H, W) and their labels (N,), with averaged weights."""
    # In evaluation mode, so that no class is dropped but by us, from the step's own generator.
    transformer = build_transformer().eval()
    parameters = list(transformer.parameters())
    average = EMAModel(parameters, decay=plan.ema_decay, use_ema_warmup=True, power=0.8, foreach=True)
    loop = Loop(
        "transformer",
        work / "transformer-checkpoint.safetensors",
        [transformer],
        plan.steps,
        peak_rate=1e-3,
        seed=seed,
        average=average,
    )
    for generator in loop:
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        noisy, times, velocity = noised(latents[chosen], generator)
        unconditional = torch.rand(plan.batch, generator=generator) < EMPTY_CAPTIONS
        classes = torch.where(unconditional, NO_CLASS, labels[chosen])
        told = transformer(noisy, timestep=times, class_labels=classes).sample
        loop.descend(functional.mse_loss(told, velocity))
        average.step(parameters)
    average.copy_to(parameters)
    return transformer


def build_transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,  # with 1 a step takes four times as long as one of the UNet
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        num_embeds_ada_norm=NO_CLASS,
    )


if __name__ == "__main__":
    main()
