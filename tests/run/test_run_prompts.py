"""`gptfl prompts`: a prompt set from templates, WordNet and a text model, and images made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_text_models import LABELS, write_small_text_models
from small_wordnet import write_small_wordnet
from support import Commands
from typer.testing import CliRunner

from gptfl_dist.cli.main import app
from gptfl_dist.config.document import dump_yaml
from gptfl_dist.errors import GeneratorError, GptflError
from gptfl_dist.run.prompts import DEFAULT_INSTRUCTION, PromptSet, Writing, make_prompt_set
from gptfl_dist.synthesis.prompts import read_prompt_set


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_small_text_models(folder)
    return folder


def federation(folder: Path, labels: tuple[str, ...] = LABELS, **prompts: Any) -> Path:
    file = folder / "federation.yaml"
    generator = {"source": "embedded", "steps": 1, "device": "cpu"}
    synthesis = {"generator": generator, "prompts": prompts, "images_per_label": 6, "threads": 1}
    file.write_text(
        dump_yaml({"name": "digits", "labels": list(labels), "synthesis": synthesis, "silos": [{"name": "a"}]})
    )
    return file


def make(file: Path, model: Path, said: list[str], *, draws: int = 60, **writing: Any) -> PromptSet:
    """What `gptfl prompts` does with a text model, in this process."""
    asked = Writing(
        str(model), **{"instruction": DEFAULT_INSTRUCTION, "keep": 20, "temperature": 1.0, **writing}, draws=draws
    )
    return make_prompt_set(
        file, None, writing=asked, wordnet=None, senses=[], force=True, command="gptfl prompts", say=said.append
    )


def test_a_prompt_set_of_all_sources_drives_a_generation(models: Path, gptfl: Commands, tmp_path: Path) -> None:
    file = federation(tmp_path, templates=["a photo of a {label}", "a {style} {label}"], styles=["bold"])
    wordnet = write_small_wordnet(tmp_path / "wordnet")
    text_model = ("--text-model", models / "chat", "--draws", "120", "--keep", "10")
    done = gptfl.run("prompts", file, "--wordnet", wordnet, *text_model, "--format", "json")
    told = json.loads(done.stdout)
    target = tmp_path / "prompts.yaml"
    assert told["file"] == str(target)
    assert set(told["dropped"]) >= {"not a whole sentence", "does not name the label", "repeats itself"}
    assert "prompts: 240 sentences" in done.stderr

    text = target.read_text()
    assert f"--text-model {models / 'chat'} --draws 120" in text
    assert "# seed: 0\n" in text
    assert "# WordNet: sense 1 of 1\n# > 1 three, 3, III: the cardinal number that is the sum of two and one\n" in text
    prompts = read_prompt_set(target, LABELS)
    assert {label: len(given) for label, given in prompts.items()} == told["prompts"]
    three = prompts["three"]
    assert three[:2] == ("a photo of a three", "a bold three")
    assert {"a photo of a 3", "a bold III"} < set(three[2:8])
    assert "a photo of a three, the cardinal number that is the sum of two and one" in three[2:8]
    assert len(three) == 8 + 10
    # Of the WordNet names a sentence may hold any; the model, asked as in a chat, writes whole captions of the label.
    assert all(" three stands on " in sentence and sentence.endswith(".") for sentence in three[8:])

    federation(tmp_path, file="prompts.yaml")
    gptfl.run("generate", file)
    manifest = json.loads((tmp_path / "synthetic" / "manifest.json").read_text())
    assert manifest["request"]["prompts"] == {label: list(given) for label, given in prompts.items()}
    shard = pq.read_table(tmp_path / "synthetic" / "shard-00000.parquet")
    for label, prompt in zip(shard["label"].to_pylist(), shard["prompt"].to_pylist(), strict=True):
        assert prompt in prompts[LABELS[label]]

    target.write_text(text.replace("- a bold three\n", ""))
    refused = gptfl.start("generate", file)
    assert refused.wait() == 10
    assert "another synthetic set: prompts.three: found ['a bold three'] where nothing was expected" in refused.stderr


@pytest.mark.parametrize("kind", ["causal", "text-to-text"])
def test_sentences_of_both_kinds_of_model(models: Path, tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    made = make(federation(tmp_path), models / kind, said)
    first = made.file.read_text()
    (warned,) = said  # the file's generator is the embedded one
    assert "has never read some" in warned or "has never read stands" in warned
    assert "synthesis.generator.source" in warned
    for label, prompts in read_prompt_set(made.file, LABELS).items():
        assert len(prompts) > 5
        assert all(f" {label} stands on " in sentence for sentence in prompts[1:])
    assert make(federation(tmp_path), models / kind, said).file.read_text() == first
    federation(tmp_path).write_text(federation(tmp_path).read_text() + "seed: 1\n")
    assert make(tmp_path / "federation.yaml", models / kind, said).file.read_text() != first


def test_labels_that_the_model_hardly_writes_of_are_told(models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    file = federation(tmp_path, ("three", "unicorn"))
    made = make(file, models / "causal", said)
    assert made.prompts["unicorn"] == 1
    assert "unicorn: 0 of 60 sentences kept" in said[0]
    assert "dropped: does not name the label, such as " in said[0]
    assert "--instruction" in said[0]
    assert "three: " not in said[0]
    made.file.unlink()
    with pytest.raises(GeneratorError, match="wrote no sentence that can be used"):
        make(federation(tmp_path, ("griffin", "unicorn")), models / "causal", said)
    assert not made.file.exists()


def missing(models: Path, folder: Path) -> str:
    return "does not exist"


def without_safetensors(models: Path, folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text((models / "causal" / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return "cannot be loaded"


def without_a_tensor(models: Path, folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in (models / "causal").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "1 of its tensors are absent"


def with_code_of_its_own(models: Path, folder: Path) -> str:
    folder.mkdir()
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit(77)")
    return "cannot be loaded"


@pytest.mark.parametrize("spoilt", [missing, without_safetensors, without_a_tensor, with_code_of_its_own])
def test_a_source_that_is_no_text_model(spoilt: Callable[[Path, Path], str], models: Path, tmp_path: Path) -> None:
    told = spoilt(models, tmp_path / "model")
    with pytest.raises(GeneratorError, match=told) as refused:
        make(federation(tmp_path), tmp_path / "model", [])
    assert str(tmp_path / "model") in str(refused.value)
    assert "--text-model" in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["--out", "federation.yaml"], 2, "is there already"),
        (["--wordnet", "nowhere"], 3, "index.noun cannot be read"),
        (["--sense", "three=2"], 2, "--sense is given without --wordnet"),
        (["--wordnet", ".", "--sense", "three"], 2, "expected LABEL=NUMBER"),
        (["--wordnet", ".", "--sense", "four=1"], 2, "there is no label four"),
        (["--instruction", "a {label}"], 2, "without --text-model"),
        (["--text-model", "x/y", "--instruction", "write"], 2, "has no {label}"),
        (["--out", "federation.yaml/prompts.yaml"], 10, "is a file, expected a folder"),
    ],
)
def test_what_the_user_did_wrong(arguments: list[str], exit_code: int, told: str, tmp_path: Path) -> None:
    file = federation(tmp_path)
    before = file.read_text()
    paths = {".", "nowhere"}
    placed = [str(tmp_path / text) if text in paths or text.startswith("federation") else text for text in arguments]
    error = CliRunner().invoke(app, ["prompts", str(file), *placed]).exception
    assert isinstance(error, GptflError)
    assert error.exit_code == exit_code
    assert told in error.message
    assert error.hint
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["federation.yaml"]


def test_a_wrong_prompt_set_ends_generation(gptfl: Commands, tmp_path: Path) -> None:
    file = federation(tmp_path, file="prompts.yaml")
    (tmp_path / "prompts.yaml").write_text("three: [a three]\nseven: a seven\n")
    command = gptfl.start("generate", file, "--format", "json")
    assert command.wait() == 2
    message = json.loads(command.stdout)["message"]
    assert (
        message
        == f'{tmp_path / "prompts.yaml"}:2:8: seven: found "a seven" (text), expected a list of at least one prompt'
    )
    assert "Traceback" not in command.stderr
