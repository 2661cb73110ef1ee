"""Every kind of generator on a GPU, where `auto` is float16: what it makes is what the CPU makes, but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptfl_dist.config.synthesis import Generator
from gptfl_dist.synthesis import load_generator
from gptfl_dist.synthesis.generator import EMBEDDED_LABELS, place
from gptfl_dist.synthesis.pipeline import PipelineGenerator
from gptfl_dist.synthesis.samples import plan_samples

pytestmark = pytest.mark.gpu


def loaded(source: Path | str, **changes: Any) -> PipelineGenerator:
    generator = load_generator(Generator(source=str(source), **({"steps": 4, "guidance": 2.0} | changes)))
    assert isinstance(generator, PipelineGenerator)
    return generator


def samples(labels: tuple[str, ...]) -> Any:
    prompts = {label: (f"a handwritten {label}",) for label in labels}
    return plan_samples(labels, prompts, [2.0], run_seed=3, images_per_label=2)


def test_auto_is_half_precision_on_a_gpu() -> None:
    found = place(Generator(source="embedded"))
    assert (found.device, found.dtype) == ("cuda", "float16")


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1.0), ("float16", 2.0), ("bfloat16", 4.0)])
def test_the_embedded_generator_draws_the_digits_of_the_cpu(dtype: str, allowed: float) -> None:
    """Compared in one number format: noise is drawn in it, and may be another in another one."""
    batch = samples(EMBEDDED_LABELS)
    expected, found = (
        loaded("embedded", steps=10, device=device, dtype=dtype).images(batch, EMBEDDED_LABELS).astype(float)
        for device in ("cpu", "cuda")
    )
    assert np.abs(found - expected).mean() < allowed  # of 255 shades


@pytest.mark.parametrize("fixture", ["text_pipeline_folder", "class_pipeline_folder", "unguided_pipeline_folder"])
def test_every_kind_of_pipeline_makes_pictures_again_alike(fixture: str, request: pytest.FixtureRequest) -> None:
    generator = loaded(request.getfixturevalue(fixture))
    batch = samples(("one", "two"))
    first, again = (generator.images(batch, ("one", "two")) for _ in range(2))
    assert len({picture.tobytes() for picture in first}) == len(batch)
    assert np.array_equal(first, again)


def test_a_pipeline_makes_clips(audio_pipeline_folder: Path) -> None:
    generator = loaded(audio_pipeline_folder)
    clips = generator.clips(samples(("one", "two")), ("one", "two"), 16_000, 0.5)
    assert len(clips) == 4
    assert all(clip.dtype == np.float32 and np.isfinite(clip).all() and len(clip) for clip in clips)
