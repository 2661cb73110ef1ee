"""Trains the glyph generator from nothing: fonts, renders, VAE, then UNet and text encoder together.

Every stage leaves its result in the work folder and is skipped where that is there; the two training loops also leave a
checkpoint every few hundred steps. So the same command, run again after an interruption, goes on where it stopped, and
with the same seed, thread count and machine it ends at the same weights. The UNet never meets the VAE: the latents
are computed once. At regular steps the averaged weights are written as a whole pipeline, for
evaluate.py to rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fonts
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from model import (
    TRAIN_TIMES,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    normalise_latents,
    save_pipeline,
    tokenise,
)
from render import Renders, render, trace
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

CHECKPOINT_EVERY = 250
EMPTY_CAPTIONS = 0.12
WARM_UP = 100


@dataclass(frozen=True)
class Plan:
    """How much of everything; the quick plan only shows that all stages run."""

    pictures: int
    vae_steps: int
    vae_batch: int
    steps: int
    batch: int
    ema_decay: float


FULL = Plan(pictures=40_000, vae_steps=2_000, vae_batch=32, steps=5_000, batch=48, ema_decay=0.999)
QUICK = Plan(pictures=2_000, vae_steps=150, vae_batch=32, steps=200, batch=48, ema_decay=0.95)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    plan = QUICK if args.quick else FULL
    fonts.fetch(args.work / "fonts")
    renders = make_renders(args.work, plan, args.seed)
    vae = train_vae(args.work, renders.images, plan, args.seed)
    latents = encode(args.work, vae, renders.images)
    train_denoiser(args.work, args.out, vae, latents, renders, plan, args.seed, args.export_every)
    print(f"the pipeline is in {args.out}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("glyph-work"), help="fonts, renders, checkpoints (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("glyphs"), help="the pipeline's folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--export-every",
        type=int,
        default=1_000,
        metavar="STEPS",
        help="write the pipeline of these steps below WORK/pipelines too (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="about two minutes: shows that it runs; the digits are poor. Use a work folder of its own",
    )
    return parser.parse_args()


def make_renders(work: Path, plan: Plan, seed: int) -> Renders:
    """The training pictures, drawn once."""
    file = work / "renders.npz"
    if not file.exists():
        print(f"drawing {plan.pictures} pictures from {len(fonts.TRAINING_FACES)} faces", flush=True)
        drawn = render(trace(fonts.TRAINING_FACES, work / "fonts"), plan.pictures, seed)
        partial = work / "renders.partial.npz"
        np.savez(partial, images=drawn.images, digits=drawn.digits, ink=drawn.ink, slant=drawn.slant)
        partial.rename(file)
    with np.load(file) as arrays:
        return Renders(arrays["images"], arrays["digits"], arrays["ink"], arrays["slant"])


def pixels(images: np.ndarray[Any, Any]) -> Tensor:
    """Grey bytes as the RGB in [-1, 1] that Stable Diffusion works on."""
    return (torch.from_numpy(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def train_vae(work: Path, images: np.ndarray[Any, Any], plan: Plan, seed: int) -> AutoencoderKL:
    """The VAE, its latents normalised."""
    vae = build_vae()
    file = work / "vae.safetensors"
    if file.exists():
        vae.load_state_dict(load_file(file))
        return vae.eval()
    loop = Loop("vae", work / "vae-checkpoint.safetensors", [vae], plan.vae_steps, peak_rate=2.5e-3, seed=seed)
    for generator in loop:
        batch = pixels(images[torch.randint(len(images), (plan.vae_batch,), generator=generator).numpy()])
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        loss = functional.mse_loss(restored, batch) + 0.05 * functional.l1_loss(restored, batch) + 5e-4 * divergence
        loop.descend(loss)
    vae.eval()
    # Divide by the spread of what the decoder was trained on, means with their noise: a channel that holds little more
    # than noise then stays small, and the UNet spends little on it.
    means, variances = _posteriors(vae, images[:4096])
    spread = (means.var(dim=(0, 2, 3)) + variances.mean(dim=(0, 2, 3))).sqrt()
    normalise_latents(vae, means.mean(dim=(0, 2, 3)), spread)
    _save(vae.state_dict(), file)
    return vae


def encode(work: Path, vae: AutoencoderKL, images: np.ndarray[Any, Any]) -> Tensor:
    """The latents of all pictures, without the posterior's noise."""
    file = work / "latents.safetensors"
    if not file.exists():
        _save({"means": _posteriors(vae, images)[0]}, file)
    means: Tensor = load_file(file)["means"]
    return means


@torch.no_grad()
def _posteriors(vae: AutoencoderKL, images: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    parts = [vae.encode(pixels(images[start : start + 256])).latent_dist for start in range(0, len(images), 256)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.var for part in parts])


def train_denoiser(
    work: Path,
    out: Path,
    vae: AutoencoderKL,
    latents: Tensor,
    renders: Renders,
    plan: Plan,
    seed: int,
    export_every: int,
) -> None:
    """UNet and text encoder, trained together on (latents, caption), and exported with averaged weights."""
    tokenizer = build_tokenizer()
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    averaged_unet, averaged_encoder = build_unet(), build_text_encoder(tokenizer)
    tokens = tokenise(tokenizer, renders.captions(seed))
    empty = tokenise(tokenizer, [""])
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=plan.ema_decay, use_ema_warmup=True, power=0.8, foreach=True)
    loop = Loop(
        "unet",
        work / "unet-checkpoint.safetensors",
        [unet, text_encoder],
        plan.steps,
        peak_rate=1e-3,
        seed=seed,
        average=average,
    )
    for generator in loop:
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        noisy, times, velocity = noised(latents[chosen], generator)
        unconditional = torch.rand(plan.batch, 1, generator=generator) < EMPTY_CAPTIONS
        states = text_encoder(torch.where(unconditional, empty, tokens[chosen])).last_hidden_state
        told = unet(noisy, times, encoder_hidden_states=states).sample
        loop.descend(functional.mse_loss(told, velocity))
        average.step(parameters)
        if loop.step % export_every == 0 or loop.step == plan.steps:
            averaged_unet.load_state_dict(unet.state_dict())
            averaged_encoder.load_state_dict(text_encoder.state_dict())
            average.copy_to([*averaged_unet.parameters(), *averaged_encoder.parameters()])
            folder = work / "pipelines" / f"step-{loop.step:06d}"
            folder.parent.mkdir(exist_ok=True)
            save_pipeline(folder, vae, averaged_unet, averaged_encoder, tokenizer)
    average.copy_to(parameters)
    save_pipeline(out, vae, unet, text_encoder, tokenizer)


def noised(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, C, H, W) with noise, the time of each (N,), and the velocity that is to be predicted.

    One time from each of N equal stretches: a calmer loss than free draws give.
    """
    count = len(clean)
    noise = torch.randn(clean.shape, generator=generator)
    spread = torch.arange(count) + torch.rand(count, generator=generator)
    times = (spread * TRAIN_TIMES / count).long()
    kept = build_scheduler().alphas_cumprod[times, None, None, None]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    return alpha * clean + sigma * noise, times, alpha * noise - sigma * clean


class Loop:
    """Counts steps, steps the optimiser, prints progress, and keeps a checkpoint from which a later run goes on.

    Each step gets a generator seeded by (seed, step), so a resumed run draws what an unbroken one would have.
    The rate warms up, stays, and falls to nothing over the second half.
    """

    def __init__(
        self,
        name: str,
        file: Path,
        modules: Sequence[nn.Module],
        steps: int,
        *,
        peak_rate: float,
        seed: int,
        average: EMAModel | None = None,
    ) -> None:
        self.name, self.file, self.steps, self.peak_rate, self.seed = name, file, steps, peak_rate, seed
        self.modules, self.average = modules, average
        self.parameters = list(itertools.chain.from_iterable(module.parameters() for module in modules))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak_rate, weight_decay=1e-4, fused=True)
        self.step = 0
        self.loss = 0.0
        if file.exists():
            self._go_on()

    def __iter__(self) -> Iterator[torch.Generator]:
        began, first = time.monotonic(), self.step
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak_rate * min(1.0, (self.step + 1) / WARM_UP, 2 * (1 - self.step / self.steps))
            yield torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            if self.step % 50 == 0:
                left = (time.monotonic() - began) / (self.step - first) * (self.steps - self.step)
                print(
                    f"{self.name} {self.step}/{self.steps} loss {self.loss:.4f}, {left / 60:.1f} min left", flush=True
                )
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.steps:
                self._keep()

    def descend(self, loss: Tensor) -> None:
        """One step down the gradient of this loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it out
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.loss = loss.item() if self.step == 1 else 0.98 * self.loss + 0.02 * loss.item()

    def _keep(self) -> None:
        """Tensors under names such as optimizer/3/exp_avg; the numbers as JSON in the file's metadata."""
        tensors = {
            f"module/{place}/{name}": tensor
            for place, module in enumerate(self.modules)
            for name, tensor in module.state_dict().items()
        }
        for place, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{place}/{name}": tensor for name, tensor in moments.items()}
        numbers: dict[str, Any] = {"step": self.step, "loss": self.loss}
        if self.average is not None:
            numbers["average"] = self.average.state_dict()
            shadows = numbers["average"].pop("shadow_params")
            tensors |= {f"average/{place}": tensor for place, tensor in enumerate(shadows)}
        _save(tensors, self.file, json.dumps(numbers))

    def _go_on(self) -> None:
        """Restores what `_keep` wrote; the optimiser's settings are those it was built with."""
        tensors = load_file(self.file)
        with safe_open(self.file, framework="pt") as kept:
            numbers = json.loads(kept.metadata()["numbers"])
        self.step, self.loss = numbers["step"], numbers["loss"]
        for number, module in enumerate(self.modules):
            prefix = f"module/{number}/"
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, place, *rest = name.split("/")
            if kind == "optimizer":
                moments.setdefault(int(place), {})[rest[0]] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.average is not None:
            shadows = [tensors[f"average/{place}"] for place in range(len(self.average.shadow_params))]
            self.average.load_state_dict({**numbers["average"], "shadow_params": shadows})


def _save(tensors: dict[str, Tensor], file: Path, numbers: str = "") -> None:
    partial = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"numbers": numbers})
    partial.rename(file)


if __name__ == "__main__":
    main()
