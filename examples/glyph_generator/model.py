"""The parts of the glyph generator: a Stable Diffusion of 1.7 million parameters, and how its folder is written.

A VAE turns 32 x 32 pictures into 4 x 8 x 8 latents, a CLIP text encoder of two layers reads the caption, a UNet with
cross attention predicts the velocity. All are the stock classes of diffusers and transformers, so that any program that
loads a Stable Diffusion loads this one. The tokenizer is made here: one token for each word of the captions, single
bytes for all else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from render import WORDS
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 4
LATENT_SIZE = 8
CAPTION_LENGTH = 16
TRAIN_TIMES = 1000

_WIDTH = 64
# "leaning" comes first: an earlier merge wins, and the "ni" of "nine" would cut it in two.
_CAPTION_WORDS = ("leaning", "a", "handwritten", "digit", *WORDS, "thin", "bold", "slanted", "upright", "left")
Module = TypeVar("Module", bound=nn.Module)

_CARD = "MODEL_CARD.md"


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=LATENT_SIZE * 4,
        # Latents are normalised inside the VAE (see `normalise_latents`): pipelines need no factor of their own.
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 80),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            projection_dim=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer made without a file: bytes, and merges that join each word of the captions letter by letter."""
    letters = _byte_alphabet()
    merges: list[tuple[str, str]] = []
    for word in _CAPTION_WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merge = ("".join(pieces[:end]), pieces[end])
            if merge not in merges:
                merges.append(merge)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_LENGTH)
    split = [word for word in _CAPTION_WORDS if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise RuntimeError(f"the merges of one word break another: {', '.join(split)}; change the words' order")
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """The captions' token ids, padded as the pipeline pads its prompts."""
    encoded = tokenizer(captions, padding="max_length", max_length=CAPTION_LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler that is saved with the weights; training uses its noise levels too."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_TIMES,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        # What the pipeline would set anyway, with a warning.
        steps_offset=1,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (z - mean) / std per channel into the convolutions around the latents."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert isinstance(quant, nn.Conv2d)
    assert isinstance(post, nn.Conv2d)
    assert quant.bias is not None
    assert post.bias is not None
    means, log_variances = slice(0, LATENT_CHANNELS), slice(LATENT_CHANNELS, None)
    quant.weight[means] /= std[:, None, None, None]
    quant.bias[means] = (quant.bias[means] - mean) / std
    quant.bias[log_variances] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def save_pipeline(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write the pipeline in half precision, beside the target first, so that a reader never meets half a folder."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=_half_copy(vae, build_vae()),
        unet=_half_copy(unet, build_unet()),
        text_encoder=_half_copy(text_encoder, build_text_encoder(tokenizer)),
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(partial, safe_serialization=True)
    # transformers loads in the dtype that the config names, diffusers in float32: left at half, the two would not fit.
    config = partial / "text_encoder" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2, sort_keys=True) + "\n"
    )
    if folder.exists():
        if (folder / _CARD).exists():
            shutil.copy2(folder / _CARD, partial / _CARD)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _half_copy(source: Module, blank: Module) -> Module:
    blank.load_state_dict(source.state_dict())
    return blank.half()
