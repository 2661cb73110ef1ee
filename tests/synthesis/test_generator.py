from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptfl_dist.config.synthesis import Generator
from gptfl_dist.errors import GeneratorError
from gptfl_dist.synthesis import find_generator, load_generator
from gptfl_dist.synthesis.generator import require_known_labels
from gptfl_dist.synthesis.samples import Sample, plan_samples

LABELS = ["one", "two", "three"]


def settings(folder: Path | str, **changes: Any) -> Generator:
    return Generator(source=str(folder), **({"steps": 2, "guidance": 2.0, "device": "cpu"} | changes))


def samples(count: int, guidance: float = 2.0) -> list[Sample]:
    prompts = {label: (f"a photo of a {label}", label) for label in LABELS}
    return plan_samples(LABELS, prompts, [guidance], run_seed=3, images_per_label=count)[:count]


def edited_index(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("fixture", "size"),
    [("text_pipeline_folder", 16), ("class_pipeline_folder", 16), ("unguided_pipeline_folder", 8)],
)
def test_one_adapter_runs_every_kind(fixture: str, size: int, request: pytest.FixtureRequest) -> None:
    generator = load_generator(settings(request.getfixturevalue(fixture)))
    batch = samples(4)
    first, again = generator.images(batch, LABELS), generator.images(batch, LABELS)
    assert first.dtype == np.uint8
    assert first.shape == (4, size, size, 3)
    assert np.array_equal(first, again)
    assert len({picture.tobytes() for picture in first}) == 4


def test_the_prompt_shapes_the_picture(text_pipeline_folder: Path) -> None:
    generator = load_generator(settings(text_pipeline_folder, guidance=8.0))
    one, other = (Sample(0, 0, 5, prompt, 8.0) for prompt in ("one", "a very different thing"))
    assert not np.array_equal(generator.images([one], LABELS), generator.images([other], LABELS))


def test_the_class_shapes_the_picture(class_pipeline_folder: Path) -> None:
    generator = load_generator(settings(class_pipeline_folder))
    one, other = (Sample(label, 0, 5, "", 2.0) for label in (0, 1))
    assert not np.array_equal(generator.images([one], LABELS), generator.images([other], LABELS))


def test_settings_reach_the_pipeline(text_pipeline_folder: Path) -> None:
    batch = samples(2)
    plain = load_generator(settings(text_pipeline_folder)).images(batch, LABELS)
    larger = load_generator(settings(text_pipeline_folder, size=32)).images(batch, LABELS)
    assert larger.shape == (2, 32, 32, 3)
    for changes in ({"steps": 4}, {"scheduler": "EulerAncestralDiscreteScheduler"}, {"dtype": "bfloat16"}):
        changed = load_generator(settings(text_pipeline_folder, **changes)).images(batch, LABELS)
        assert changed.shape == plain.shape
        assert not np.array_equal(changed, plain), changes


def test_the_digest_follows_the_weights(text_pipeline_folder: Path, tmp_path: Path) -> None:
    before = find_generator(settings(text_pipeline_folder))
    copy = tmp_path / "copy"
    shutil.copytree(text_pipeline_folder, copy)
    (copy / "README.md").write_text("a model card changes no picture")
    assert find_generator(settings(copy)).digest == before.digest
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_generator(settings(copy)).digest != before.digest


def test_classes_that_have_names_are_found_by_name(class_pipeline_folder: Path, tmp_path: Path) -> None:
    named = edited_index(
        class_pipeline_folder, tmp_path / "named", id2label={"4": "two", "7": "one, uno", "9": "three"}
    )
    generator, plain = load_generator(settings(named)), load_generator(settings(class_pipeline_folder))
    one = generator.images([Sample(0, 0, 5, "", 2.0)], LABELS)
    assert np.array_equal(one, plain.images([Sample(7, 0, 5, "", 2.0)], [str(n) for n in range(8)]))
    with pytest.raises(GeneratorError, match="no class named cat"):
        generator.images([Sample(0, 0, 5, "", 2.0)], ["one", "cat"])


def test_too_few_classes(unguided_pipeline_folder: Path) -> None:
    generator = load_generator(settings(unguided_pipeline_folder))
    with pytest.raises(GeneratorError, match="3 classes, but the federation has 4 labels"):
        generator.images(samples(2), [*LABELS, "four"])


class TestRefused:
    def test_a_folder_that_is_no_pipeline(self, tmp_path: Path) -> None:
        with pytest.raises(GeneratorError, match=r"without model_index\.json") as caught:
            load_generator(settings(tmp_path))
        assert "embedded" in caught.value.hint

    def test_an_index_that_is_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{")
        with pytest.raises(GeneratorError, match="cannot be read as JSON"):
            load_generator(settings(tmp_path))

    def test_an_empty_index(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(GeneratorError, match="cannot be loaded"):
            load_generator(settings(tmp_path))

    @pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "plainword"])
    def test_a_missing_folder(self, source: str) -> None:
        with pytest.raises(GeneratorError, match="does not exist"):
            load_generator(settings(source))

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(GeneratorError, match="is a file"):
            load_generator(settings(tmp_path / "model.safetensors"))

    def test_a_hub_id_that_cannot_be_had(self) -> None:
        with pytest.raises(GeneratorError, match="the hub gave no such pipeline") as caught:
            load_generator(settings("no-such-owner/no-such-pipeline"))
        assert "connection" in caught.value.hint

    def test_an_unknown_scheduler_with_the_nearest_names(self, text_pipeline_folder: Path) -> None:
        with pytest.raises(GeneratorError, match="DPMSolverMultiStep") as caught:
            load_generator(settings(text_pipeline_folder, scheduler="DPMSolverMultiStep"))
        assert "DPMSolverMultistepScheduler" in caught.value.hint

    def test_a_name_of_diffusers_that_is_no_scheduler(self, text_pipeline_folder: Path) -> None:
        with pytest.raises(GeneratorError, match="no scheduler"):
            load_generator(settings(text_pipeline_folder, scheduler="UNet2DModel"))

    def test_drawn_guidance_without_guidance(self, unguided_pipeline_folder: Path) -> None:
        with pytest.raises(GeneratorError, match="has no guidance scale"):
            load_generator(settings(unguided_pipeline_folder, guidance=[1.0, 2.0]))

    def test_a_size_where_the_size_is_fixed(self, class_pipeline_folder: Path) -> None:
        with pytest.raises(GeneratorError, match="whose size is fixed"):
            load_generator(settings(class_pipeline_folder, size=32))

    def test_an_unconditional_pipeline(self, unguided_pipeline_folder: Path, tmp_path: Path) -> None:
        folder = edited_index(unguided_pipeline_folder, tmp_path / "ddpm", _class_name="DDPMPipeline")
        with pytest.raises(GeneratorError, match="neither prompts nor class labels"):
            load_generator(settings(folder))

    def test_pickled_weights(self, class_pipeline_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "pickled"
        shutil.copytree(class_pipeline_folder, folder)
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(GeneratorError, match="cannot be loaded"):
            load_generator(settings(folder))

    def test_damaged_weights(self, class_pipeline_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "damaged"
        shutil.copytree(class_pipeline_folder, folder)
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(GeneratorError, match="cannot be loaded"):
            load_generator(settings(folder))

    def test_code_in_the_folder_is_not_run(self, class_pipeline_folder: Path, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        code = f"open({str(mark)!r}, 'w')\nfrom diffusers import DiTPipeline as Own, AutoencoderKL as OwnPart\n"
        whole = edited_index(class_pipeline_folder, tmp_path / "whole", _class_name=["own", "Own"])
        (whole / "own.py").write_text(code)
        part = edited_index(class_pipeline_folder, tmp_path / "part", vae=["own", "OwnPart"])
        (part / "vae" / "own.py").write_text(code)
        for folder in (whole, part):
            with pytest.raises(GeneratorError, match="cannot be loaded"):
                load_generator(settings(folder))
            assert not mark.exists()


def test_the_embedded_generator_refuses_labels_that_it_never_saw():
    require_known_labels(Generator(), ["three", "seven"])
    with pytest.raises(GeneratorError, match="does not know cat, dog"):
        require_known_labels(Generator(), ["three", "cat", "dog"])
    require_known_labels(Generator(source="some/pipeline"), ["cat"])


def test_the_same_call_makes_clips(audio_pipeline_folder: Path) -> None:
    generator = load_generator(settings(audio_pipeline_folder, guidance=4.0))
    batch = samples(3, guidance=4.0)
    first, again = generator.clips(batch, LABELS, 16_000, 0.5), generator.clips(batch, LABELS, 16_000, 0.5)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({clip.tobytes() for clip in first}) == 3
    assert all(clip.dtype == np.float32 and np.abs(clip).max() <= 1 for clip in first)
    assert all(0.3 < len(clip) / 16_000 <= 0.51 for clip in first)
    slower = generator.clips(batch, LABELS, 8_000, 0.5)
    assert all(abs(2 * len(one) - len(other)) < 500 for one, other in zip(slower, first, strict=True))
    prompts = (Sample(0, 0, 5, prompt, 4.0) for prompt in ("one", "a very different thing"))
    one, other = (generator.clips([sample], LABELS, 16_000, 0.5)[0] for sample in prompts)
    assert not np.array_equal(one, other)


def test_pictures_are_no_clips_and_clips_no_pictures(audio_pipeline_folder: Path, text_pipeline_folder: Path) -> None:
    with pytest.raises(GeneratorError, match="for 2 clips, expected") as caught:
        load_generator(settings(text_pipeline_folder)).clips(samples(2), LABELS, 16_000, 0.5)
    assert "task.kind image" in caught.value.hint
    with pytest.raises(GeneratorError, match="for 2 pictures, expected") as caught:
        load_generator(settings(audio_pipeline_folder)).images(samples(2), LABELS)
    assert "task.kind audio" in caught.value.hint
