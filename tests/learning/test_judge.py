"""Judges from elsewhere: a trained classifier, an encoder, and folders that are neither."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import SHAPES, SIZE, shape_classifier, shapes
from spelling import spelling_tokenizer
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gptfl_dist.errors import ModelError
from gptfl_dist.learning.judge import Classifier, Encoder, columns_of
from gptfl_dist.synthesis.source import find_model

SETTING = "synthesis.filter.source"


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its names are in another case, order and spelling than ours, with synonyms."""
    return shape_classifier(tmp_path_factory.mktemp("classifier"), ["DISC", "Picture_Frame, frame", "bars"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP for pictures of 12x12 in colour."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = spelling_tokenizer()
    narrow = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**narrow, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**narrow, "image_size": SIZE, "patch_size": 4}, projection_dim=8
    )
    model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    return folder


def test_a_classifier_judges_by_its_label_names(classifier: Path) -> None:
    shown = [0, 1, 2] * 25
    told: list[tuple[int, int]] = []
    judge = Classifier(find_model(str(classifier), SETTING), ["Bars", "picture-frame"], "cpu")
    answers = judge.probabilities(shapes(shown, seed=9), lambda done, total: told.append((done, total)))
    assert answers.shape == (75, 2)
    bars, frames = answers[:, 0], answers[:, 1]
    truth = np.array(shown)
    assert (bars[truth == 2] > 0.5).mean() > 0.9
    assert (frames[truth == 1] > 0.5).mean() > 0.9
    # A disc is none of the two labels, and they are not made to share what it is.
    assert (answers[truth == 0].sum(axis=1) < 0.5).mean() > 0.9
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_pictures_in_colour_before_a_judge_of_grey_ones(classifier: Path) -> None:
    judge = Classifier(find_model(str(classifier), SETTING), SHAPES, "cpu")
    grey = shapes([0, 1, 2])
    colour = judge.probabilities(np.repeat(grey, 3, axis=-1), quiet)
    assert np.allclose(colour, judge.probabilities(grey, quiet), atol=1e-6)


NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "Great_White Shark", 4: "bass"}


def test_labels_are_found_by_name() -> None:
    assert columns_of(NAMES, ["great white shark", "BASS", "tinca  tinca"], "it") == [3, 4, 0]
    with pytest.raises(ModelError, match="no label named cat, dog") as caught:
        columns_of(NAMES, ["bass", "cat", "dog"], "it")
    assert "its 5 labels are tench, Tinca tinca, crane" in caught.value.hint
    with pytest.raises(ModelError, match="several labels named crane"):
        columns_of(NAMES, ["bass", "crane"], "it")
    assert columns_of({0: "a, b", 1: "b"}, ["b"], "it") == [1]


def test_an_encoder_compares_images_with_the_labels_prompts(encoder: Path) -> None:
    prompts = {"disc": ["a disc"], "frame": ["a frame"], "bars": ["many bars in a row, drawn by hand"]}
    pictures = shapes([0, 1, 2, 0])
    judge = Encoder(find_model(str(encoder), SETTING), prompts, "cpu")
    answers = judge.probabilities(pictures, quiet)
    # CLIP's own way to the same numbers.
    model = CLIPModel.from_pretrained(encoder)
    pixels = AutoImageProcessor.from_pretrained(encoder, backend="pil")(
        images=list(np.repeat(pictures, 3, axis=-1)), return_tensors="pt"
    )
    tokens = AutoTokenizer.from_pretrained(encoder)(
        [texts[0] for texts in prompts.values()], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**tokens, **pixels).logits_per_image.softmax(dim=1).numpy()
    assert np.allclose(answers, expected, atol=1e-5)
    assert np.abs(answers - 1 / 3).max() > 0.01

    twice = Encoder(find_model(str(encoder), SETTING), {**prompts, "disc": ["a disc", "a disc"]}, "cpu")
    assert np.allclose(twice.probabilities(pictures, quiet), answers, atol=1e-5)
    more = Encoder(find_model(str(encoder), SETTING), {**prompts, "disc": ["a disc", "a round disc"]}, "cpu")
    assert not np.allclose(more.probabilities(pictures, quiet), answers, atol=1e-3)


def test_folders_that_are_no_judge(
    classifier: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"synthesis\.filter\.source is .*nowhere, but no such folder"):
        find_model(str(tmp_path / "nowhere"), SETTING)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match="nobody/no-such-judge: there is no such folder, and the hub gave no such model"
    ):
        find_model("nobody/no-such-judge", SETTING)
    with pytest.raises(ModelError, match=r"without config\.json"):
        find_model(str(tmp_path), SETTING)
    with pytest.raises(ModelError, match="compares no images with texts"):
        Encoder(find_model(str(classifier), SETTING), {"disc": ["disc"]}, "cpu")

    config = json.loads((encoder / "config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"the model of .* cannot be loaded"):
        Encoder(find_model(str(tmp_path / "bare"), SETTING), {"disc": ["disc"]}, "cpu")


def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks .* tensors of a ResNetForImageClassification, the first classifier"):
        Classifier(find_model(str(tmp_path), SETTING), ["LABEL_0", "LABEL_1"], "cpu")


def test_a_model_is_known_by_what_is_read(classifier: Path) -> None:
    first = find_model(str(classifier), SETTING)
    (classifier / "notes.md").write_text("nothing that is read")
    assert find_model(str(classifier), SETTING) == first
    config = classifier / "config.json"
    text = config.read_text()
    config.write_text(text.replace("bars", "rods"))
    assert find_model(str(classifier), SETTING).digest != first.digest
    config.write_text(text)
