"""A silo's training: what it refuses to hand over, and what it refuses to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.mixing import HandedOut
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.silo import Code, SiloFile
from gptfl_dist.config.task import Model, Task
from gptfl_dist.errors import ModelError, PolicyError, TrainerError
from gptfl_dist.run.requirements import require_built_in
from gptfl_dist.run.trainer import Trainer
from gptfl_dist.testing.federations import tiny_federation

SETTINGS = LocalTraining(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, augmentation=False, threads=1
)
REBINDS = """
def local_training(model, data, settings, task, *, seed, device, progress):
    for parameter in model.parameters():
        parameter.data = parameter.data + 1.0
    return {"train_loss": 0.0}
"""


def trainer(folder: Path, code: str = "", **model: Any) -> Trainer:
    path = tiny_federation(folder)
    silo = folder / "silo-1.yaml"
    if code:
        (folder / "rebinding_code.py").write_text(code)
        silo.write_text(silo.read_text() + "code: {function: rebinding_code:local_training}\n")
    plan = Plan.of(load_federation(path))
    return Trainer(
        plan.model_copy(update={"model": Model.model_validate(model)}) if model else plan, load_silo(silo), folder
    )


def test_a_training_function_that_replaces_the_tensors_sends_no_zero_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = trainer(tmp_path, REBINDS)
    weights, update = tmp_path / "weights.safetensors", tmp_path / "update.safetensors"
    mine.flat.save(weights)
    for _ in range(2):  # nor is it evaluated with other weights in the next round
        with pytest.raises(TrainerError, match="replaced the model's tensors"):
            mine.train(round_=1, settings=SETTINGS, weights=weights, update=update, progress=lambda done, total: None)
    assert not update.exists()


@pytest.mark.parametrize(
    ("settings", "argument"),
    [({"strategy": {"rule": "scaffold"}}, "control"), ({"training": {"contrastive": 1.0}}, "previous")],
)
def test_a_training_function_that_leaves_the_strategys_term_out_is_refused(
    settings: dict[str, Any], argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tiny_federation(tmp_path, **settings)
    (tmp_path / "plain_code.py").write_text(REBINDS)
    silo = tmp_path / "silo-1.yaml"
    silo.write_text(silo.read_text() + "code: {function: plain_code:local_training}\n")
    with pytest.raises(PolicyError, match=f"takes no argument `{argument}`"):
        Trainer(Plan.of(load_federation(path)), load_silo(silo), tmp_path)


def test_a_script_of_ones_own_is_refused_where_the_strategy_keeps_something() -> None:
    silo = SiloFile(name="s", code=Code(script=Path("train.py")))
    plan = Plan(federation="f", seed=0, labels=["a", "b"], task=Task(), model=Model(), kept=["control"])
    with pytest.raises(PolicyError, match=r"keeps control from round to round, and code\.script does not"):
        require_built_in(silo, plan)
    require_built_in(silo, plan.model_copy(update={"kept": []}))
    samples = HandedOut(digest="0" * 64, count=1, use="all", per_label=1)
    with pytest.raises(PolicyError, match=r"hands out synthetic samples .* code\.script loads its own data"):
        require_built_in(silo, plan.model_copy(update={"kept": [], "samples": samples}))


@pytest.mark.parametrize("source", ["/nowhere/resnet", "~/resnet", "./resnet"])
def test_a_folder_of_the_coordinators_machine_is_not_loaded(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="on this machine no model lies there") as refused:
        trainer(tmp_path, name="transformers", source=source)
    assert "model_source" in refused.value.hint


def test_a_folder_that_holds_no_model_here_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ModelError, match="on this machine no model lies there"):
        trainer(tmp_path, name="transformers", source=str(tmp_path / "pictures"))


def test_a_folder_that_holds_the_model_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "resnet"
    folder.mkdir()
    config = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1]}
    (folder / "config.json").write_text(json.dumps({**config, "layer_type": "basic"}))
    # Also where the federation starts from a checkpoint: its weights come from the coordinator.
    built = [trainer(tmp_path, name="transformers", source=str(folder), pretrained=given) for given in (False, True)]
    assert built[0].layout == built[1].layout
