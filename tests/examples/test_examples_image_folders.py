"""Data in three forms, labels under other names, no code: from nothing to a federation that improves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support import Commands

NETWORK = """
from torch import nn

def build(label_count, task):
    return nn.Sequential(nn.Flatten(), nn.Linear(task.channels * task.size**2, label_count))
"""


def test_it_improves_on_the_synthetic_data_and_pretrains_a_model_beside_the_file(
    example: Callable[..., Path], gptfl: Commands
) -> None:
    folder = example(
        "image_folders",
        ("federation.yaml", "steps: 8}", "steps: 2, batch_size: 20}"),
        ("federation.yaml", "images_per_label: 10", "threads: 1\n  images_per_label: 2"),
        ("federation.yaml", "shard_size: 10", "shard_size: 20"),
        ("federation.yaml", "{epochs: 30}", "{epochs: 5, threads: 1}"),
        ("federation.yaml", "rounds: 8", "rounds: 4"),
        ("federation.yaml", "learning_rate: 0.2}", "learning_rate: 0.2, warm_up_rounds: 1, epochs: 2}"),
    )
    arms = json.loads(gptfl.run("run", folder / "federation.yaml", "--format", "json").stdout)["arms"]
    assert arms["gptfl"]["start_accuracy"] == arms["synthetic_only"]["accuracy"]
    assert arms["gptfl"]["final_accuracy"] > arms["synthetic_only"]["accuracy"] + 0.1

    # The synthetic set is there already: a model that is code lying beside the file is trained on it.
    (folder / "own_network.py").write_text(NETWORK)
    text = (folder / "federation.yaml").read_text()
    own = text.replace("{name: cnn}", '{name: function, source: "own_network:build"}') + "run_folder: own\n"
    (folder / "own.yaml").write_text(own)
    gptfl.run("pretrain", folder / "own.yaml")
    assert (folder / "own" / "pretrained.safetensors").exists()
