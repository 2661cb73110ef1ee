"""Untrained pipelines of a few thousand parameters, built here and saved as folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from spelling import spelling_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these tests ask the hub for nothing that exists

ENCODER = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
"""How small the encoders of texts are."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two threads beside other work on the same cores are many times slower than one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline of 16x16 pictures from 8x8 latents."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = spelling_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        **ENCODER,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipeline, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def class_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiTPipeline of 16x16 pictures from 8x8 latents; its DDPM scheduler draws noise in each step."""
    import torch
    from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
    )
    # Its last layers start at zero, where every class would give one picture.
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = DiTPipeline(transformer=transformer, vae=_vae(), scheduler=DDPMScheduler(num_train_timesteps=100))
    return _saved(pipeline, tmp_path_factory.mktemp("class"))


@pytest.fixture(scope="session")
def unguided_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional ConsistencyModelPipeline: three classes, 8x8 pixels, no guidance scale."""
    import torch
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    pipeline = ConsistencyModelPipeline(unet=unet, scheduler=CMStochasticIterativeScheduler())
    return _saved(pipeline, tmp_path_factory.mktemp("unguided"))


@pytest.fixture(scope="session")
def audio_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AudioLDMPipeline of clips at 16 kHz."""
    import torch
    from diffusers import AudioLDMPipeline, AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import ClapTextConfig, ClapTextModelWithProjection, SpeechT5HifiGan, SpeechT5HifiGanConfig

    torch.manual_seed(0)
    tokenizer = spelling_tokenizer()
    text_config = ClapTextConfig(
        vocab_size=len(tokenizer),
        **ENCODER,
        max_position_embeddings=32,
        projection_dim=8,
        pad_token_id=1,  # from which the positions count on
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        sample_size=32,
        cross_attention_dim=(8, 16),
        attention_head_dim=4,
        norm_num_groups=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16_000,
            upsample_initial_channel=16,
            upsample_rates=[8, 8],
            upsample_kernel_sizes=[16, 16],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )
    pipeline = AudioLDMPipeline(
        vae=vae,
        text_encoder=ClapTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1),
        vocoder=vocoder,
    )
    return _saved(pipeline, tmp_path_factory.mktemp("audio"))


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
