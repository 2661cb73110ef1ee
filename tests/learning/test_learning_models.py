"""The built-in models, transformers classifiers from a folder, and functions of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gptfl_dist.config.task import Model, Task
from gptfl_dist.errors import ModelError
from gptfl_dist.learning.models import build_model, logits

GREY = Task(size=32, channels=1)
COLOUR = Task(size=16, channels=3)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a tiny ResNet and a tiny ViT for 16x16 colour images and 5 labels."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    root = tmp_path_factory.mktemp("checkpoints")
    resnet = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    vit = ViTConfig(
        image_size=16,
        patch_size=8,
        num_channels=3,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=5,
    )
    torch.manual_seed(0)
    ResNetForImageClassification(resnet).save_pretrained(root / "resnet")
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    return root


@pytest.mark.parametrize("name", ["cnn", "convnet"])
@pytest.mark.parametrize("task", [GREY, COLOUR, Task(size=28), Task(size=9)])
def test_built_in_models(name: str, task: Task) -> None:
    settings = Model.model_validate({"name": name})
    before = torch.get_rng_state()
    model = build_model(settings, task, 7, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert logits(model, torch.zeros(3, task.channels, task.size, task.size)).shape == (3, 7)
    assert same(model, build_model(settings, task, 7, seed=1))
    assert not same(model, build_model(settings, task, 7, seed=2))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_images_too_small_for_the_network() -> None:
    with pytest.raises(ModelError, match="too small"):
        build_model(Model(name="convnet"), Task(size=4), 3, seed=0)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("task", [GREY, COLOUR])
def test_transformers_from_config(folders: Path, kind: str, task: Task) -> None:
    """The architecture of the folder, made to fit the task's labels, channels and size; weights drawn anew."""
    settings = Model(name="transformers", source=str(folders / kind))
    model = build_model(settings, task, 3, seed=1)
    model.eval()
    assert logits(model, torch.zeros(2, task.channels, task.size, task.size)).shape == (2, 3)
    assert same(model, build_model(settings, task, 3, seed=1))
    assert not same(model, build_model(settings, task, 3, seed=2))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_transformers_pretrained(folders: Path, kind: str) -> None:
    """The backbone is the checkpoint's, whatever the seed; the head fits the federation's labels."""
    from transformers import AutoModelForImageClassification

    settings = Model(name="transformers", source=str(folders / kind), pretrained=True)
    model = build_model(settings, COLOUR, 3, seed=1)
    saved = AutoModelForImageClassification.from_pretrained(folders / kind).state_dict()
    loaded = model.state_dict()
    backbone = [name for name in saved if name.startswith(kind)]
    assert len(backbone) > 5
    assert all(torch.equal(saved[name], loaded[name]) for name in backbone)
    model.eval()
    assert logits(model, torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert same(model, build_model(settings, COLOUR, 3, seed=1))
    head = [name for name in loaded if name.endswith("weight") and not name.startswith(kind)][-1]
    assert not torch.equal(build_model(settings, COLOUR, 3, seed=2).state_dict()[head], loaded[head])


def test_pretrained_half_precision_becomes_single(folders: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    ViTForImageClassification.from_pretrained(folders / "vit").half().save_pretrained(tmp_path)
    model = build_model(Model(name="transformers", source=str(tmp_path), pretrained=True), COLOUR, 3, seed=1)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_a_backbone_that_does_not_fit_is_refused(folders: Path) -> None:
    with pytest.raises(ModelError, match="given images of 1 x 32 x 32"):
        build_model(Model(name="transformers", source=str(folders / "vit"), pretrained=True), GREY, 3, seed=1)


def test_pickled_weights_are_not_read(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders / "vit" / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        build_model(Model(name="transformers", source=str(tmp_path), pretrained=True), COLOUR, 3, seed=1)


def test_folders_that_are_no_image_classifier(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        build_model(Model(name="transformers", source=str(tmp_path / "nowhere")), GREY, 3, seed=1)
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_model(Model(name="transformers", source=str(tmp_path)), GREY, 3, seed=1)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_model(Model(name="transformers", source=str(tmp_path)), GREY, 3, seed=1)


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"}}'
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        build_model(Model(name="transformers", source=str(tmp_path)), GREY, 3, seed=1)
    assert not (tmp_path / "ran").exists()


USER_MODELS = """
from torch import nn

def good(label_count, task):
    return nn.Sequential(nn.Flatten(), nn.Linear(task.channels * task.size**2, label_count))

def wrong_labels(label_count, task):
    return good(label_count + 1, task)

def wrong_size(label_count, task):
    return nn.Sequential(nn.Flatten(), nn.Linear(5, label_count))

def no_network(label_count, task):
    return "a network"

def fails(label_count, task):
    raise RuntimeError("no licence")

def takes_nothing():
    return good(3, None)
"""


def test_models_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_models.py").write_text(USER_MODELS)
    (tmp_path / "broken_models.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)

    def build(source: str) -> nn.Module:
        return build_model(Model(name="function", source=source), GREY, 3, seed=1)

    assert same(build("user_models:good"), build("user_models:good"))
    for source, words in {
        "user_models:wrong_labels": r"expected \(2, 3\)",
        "user_models:wrong_size": "cannot take images",
        "user_models:no_network": "returned str",
        "user_models:fails": "no licence",
        "user_models:takes_nothing": "keywords label_count",
        "user_models:absent": "cannot be imported",
        "absent_models:build": "cannot be imported",
        "broken_models:build": "ZeroDivisionError",
        "user_models": "expected package.module:function",
    }.items():
        with pytest.raises(ModelError, match=words):
            build(source)
