"""Text-to-speech engines: real ones, which say the same again, share a set, and say what to do where they fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gptfl_dist.config.synthesis import Engine, Generator, Synthesis
from gptfl_dist.config.task import Task
from gptfl_dist.errors import GeneratorError
from gptfl_dist.learning.group import ALONE
from gptfl_dist.synthesis import contact_sheet, find_generator, load_generator, synthesize
from gptfl_dist.synthesis.samples import Sample, plan_samples
from gptfl_dist.synthesis.speech import SpeechGenerator, find_engines

RATE = 8000
TASK = Task.model_validate({"kind": "audio", "sample_rate": RATE})
LABELS = ["yes", "no"]
needs_programs = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")), reason="needs espeak-ng and flite (Debian's packages)"
)


def samples(text: str, count: int) -> list[Sample]:
    return plan_samples(["word"], {"word": [text]}, [1.0], run_seed=3, images_per_label=count)


def spoken(engine: Engine, text: str, count: int = 3) -> list[np.ndarray]:
    return SpeechGenerator(find_engines([engine])).clips(samples(text, count), ["word"], RATE, 1.0)


@needs_programs
@pytest.mark.parametrize("engine", ["espeak-ng", "flite", "hibari"])
def test_an_engine_says_the_same_again_and_each_sample_in_another_voice(engine: Engine) -> None:
    clips = spoken(engine, "seven")
    for clip, again in zip(clips, spoken(engine, "seven"), strict=True):
        assert np.array_equal(clip, again)
    assert len({clip.tobytes() for clip in clips}) == 3
    assert all(0.1 < len(clip) / RATE < 1.5 and np.abs(clip).max() > 0.02 for clip in clips)
    longer = spoken(engine, "seven hundred and seventy seven thousand")
    assert min(map(len, longer)) > max(map(len, clips))


@needs_programs
@pytest.mark.parametrize("text", ["--version", "-w stolen.wav", "-o stolen.wav", "; touch stolen", "$(touch stolen)"])
def test_a_label_is_only_ever_spoken(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for engine in ("espeak-ng", "flite"):
        assert spoken(engine, text, 1)[0].any()
    assert list(tmp_path.iterdir()) == []


@needs_programs
def test_engines_share_a_set_in_equal_parts(tmp_path: Path) -> None:
    engines: list[Engine] = ["flite", "espeak-ng"]
    both = SpeechGenerator(find_engines(engines)).clips(samples("nine", 4), ["word"], RATE, 1.0)
    for at, clip in enumerate(both):
        alone = spoken(engines[at % 2], "nine", 4)[at]
        assert np.array_equal(clip, alone)


@needs_programs
def test_an_engine_that_says_nothing_is_named() -> None:
    with pytest.raises(GeneratorError, match="the engine espeak-ng says nothing for ','") as caught:
        spoken("espeak-ng", ",", 1)
    assert "generator.engines" in caught.value.hint


def test_an_engine_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    settings = Generator.model_validate({"source": "tts", "engines": ["flite"]})
    with pytest.raises(GeneratorError, match=r"generator\.engines names flite, which is not installed") as caught:
        load_generator(settings)
    assert "apt-get install flite" in caught.value.hint


@needs_programs
def test_another_choice_of_engines_is_another_generator() -> None:
    found = {
        find_generator(Generator.model_validate({"source": "tts", "engines": engines})).digest
        for engines in (["flite"], ["espeak-ng"], ["flite", "espeak-ng"], ["flite", "hibari"])
    }
    assert len(found) == 4


def synthesis(**settings: object) -> Synthesis:
    generator = {"source": "tts", "engines": ["espeak-ng", "flite"], "batch_size": 3}
    return Synthesis.model_validate(
        {"generator": generator, "images_per_label": 6, "shard_size": 4, "threads": 1} | settings
    )


@needs_programs
def test_a_spoken_set_is_resumed_to_the_same_bytes_and_can_be_looked_at(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    made = synthesize(synthesis(), TASK, LABELS, 0, whole, lambda done, total: None, ALONE)
    assert made.count == 12
    assert made.manifest.request.prompts == {"yes": ["yes"], "no": ["no"]}

    def stop(done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(synthesis(), TASK, LABELS, 0, stopped, stop, ALONE)
    assert 0 < len(list(stopped.glob("shard-*.parquet"))) < 3
    synthesize(synthesis(), TASK, LABELS, 0, stopped, lambda done, total: None, ALONE)
    for path in whole.glob("shard-*.parquet"):
        assert (stopped / path.name).read_bytes() == path.read_bytes()

    contact_sheet(whole, tmp_path / "sheet.png", per_label=3)
    from PIL import Image

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * 96
        assert np.asarray(sheet)[:, -90:].std() > 20


@needs_programs
def test_datasets_reads_the_clips_of_a_shard(tmp_path: Path) -> None:
    from datasets import Audio, load_dataset

    synthesize(synthesis(), TASK, LABELS, 0, tmp_path / "set", lambda done, total: None, ALONE)
    files = [str(path) for path in sorted((tmp_path / "set").glob("shard-*.parquet"))]
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["audio"].sampling_rate == RATE
    assert loaded.features["label"].names == LABELS
    assert loaded.cast_column("audio", Audio(decode=False))[0]["audio"]["bytes"].startswith(b"RIFF")
