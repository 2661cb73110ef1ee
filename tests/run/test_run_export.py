"""`gptfl export`: the model of any round that is kept, checked on the way, and as a folder of `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

from gptfl_dist.cli.main import app
from gptfl_dist.errors import ConfigError, GptflError, StorageError
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.testing.federations import tiny_federation
from gptfl_dist.weights import Layout, WeightsFile, write_weights

LAYOUT = Layout.of([("w", (5,), "F32")])
ACCURACY = (0.1, 0.8, 0.3)  # on validation data, of the weights after rounds 0, 1, 2


def blocks(round_: int) -> list[bytes]:
    return [np.full(5, round_, "<f4").tobytes()]


def made(folder: Path, *, dropped: tuple[int, ...] = (), finished: bool = True) -> Path:
    """A federation file with a run of three rounds behind it, whose weights hold the number of their round."""
    path = tiny_federation(folder)
    ledger = Ledger(folder / "run", json.dumps({"name": "tiny"}))
    digests = [ledger.add_weights(LAYOUT, blocks(round_)) for round_ in range(4)]
    ledger.begin_arm("fedavg_random", 0.1, digests[0])
    for round_ in (1, 2, 3):
        base = digests[round_ - 1]
        ledger.open_round("fedavg_random", round_, "train", base, ["silo-1"], {"silo-1": f"n{round_}"})
        ledger.commit("fedavg_random", round_, "silo-1", 9, {"accuracy": ACCURACY[round_ - 1]}, "d")
        ledger.close_round("fedavg_random", round_, digests[round_], {})
    if finished:
        ledger.finish_arm("fedavg_random", 1)
    for round_ in dropped:
        ledger.weights_path(digests[round_]).unlink()
    ledger.close()
    return path


def export(*arguments: str | Path) -> Result:
    """What the command prints; an error of ours is raised."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if isinstance(result.exception, GptflError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("which", "round_"), [("best", 1), ("final", 3), ("0", 0), ("2", 2)])
def test_the_model_of_a_round_is_copied_and_says_what_it_is(
    tmp_path: Path, which: str, round_: int, finished: bool
) -> None:
    path, out = made(tmp_path, finished=finished), tmp_path / "out" / "model.safetensors"
    told = json.loads(export(path, "--round", which, "--out", out, "--format", "json").stdout)
    with safe_open(out, framework="np") as model:
        assert model.get_tensor("w").tolist() == [round_] * 5
        metadata = model.metadata()
    with WeightsFile(out) as weights:
        digest = weights.digest()
    assert (told["arm"], told["round"], told["digest"], told["out"]) == ("fedavg_random", round_, digest, str(out))
    assert metadata == {
        **{"format": "pt", "federation": "tiny", "arm": "fedavg_random", "round": str(round_), "blake3": digest}
    }


def test_a_round_that_is_not_kept_any_more_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = made(tmp_path, dropped=(2,))
    with pytest.raises(
        ConfigError, match=r"after round 2 are not kept any more; kept are those of round 0, 1, 3"
    ) as no:
        export(path, "--round", "2", "--out", tmp_path / "model.safetensors")
    assert "federation.keep: all" in no.value.hint
    with pytest.raises(ConfigError, match="has no round 4"):
        export(path, "--round", "4", "--out", tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="arm gptfl was not begun"):
        export(path, "--arm", "gptfl", "--out", tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="--round is -1"):
        export(path, "--round=-1", "--out", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_were_damaged_on_disk_are_not_exported(tmp_path: Path) -> None:
    path, out = made(tmp_path), tmp_path / "model.safetensors"
    with WeightsFile(next(p for p in (tmp_path / "run" / "weights").iterdir() if _number(p) == 1)) as weights:
        content = bytearray(weights.path.read_bytes())
    content[-1] ^= 1
    weights.path.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        export(path, "--round", "1", "--out", out)
    assert not out.exists()


def _number(path: Path) -> float:
    with WeightsFile(path) as weights:
        return float(np.frombuffer(weights.read(0, 4), "<f4")[0])


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path, out = made(tmp_path), tmp_path / "model.safetensors"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export(path, "--out", out)
    assert out.read_text() == "mine"
    export(path, "--out", out, "--force")
    assert _number(out) == 1
    with pytest.raises(ConfigError, match="nothing says where to"):
        export(path)


def test_the_pretrained_model_is_an_arm_of_its_own(tmp_path: Path) -> None:
    path, out = made(tmp_path), tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match="nothing was pre-trained"):
        export(path, "--arm", "synthetic_only", "--out", out)
    digest = write_weights(tmp_path / "run" / "pretrained.safetensors", LAYOUT, blocks(7))
    (tmp_path / "run" / "pretrained.json").write_text(json.dumps({"digest": digest}))
    told = json.loads(export(path, "--arm", "synthetic_only", "--out", out, "--format", "json").stdout)
    assert (_number(out), told["round"]) == (7, None)


def test_a_folder_of_transformers_loads_and_gives_the_same_outputs(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageClassification, ResNetConfig

    from gptfl_dist.config.load import load_federation
    from gptfl_dist.learning.models import build_model, logits
    from gptfl_dist.weights.flat import FlatModel

    ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"]
    ).save_pretrained(tmp_path / "model")
    path = tiny_federation(tmp_path, model={"name": "transformers", "source": "./model"})
    file = load_federation(path)
    torch.manual_seed(5)
    trained = build_model(file.model, file.task, 2, seed=3)
    flat = FlatModel(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    flat.save(tmp_path / "trained.safetensors")
    with WeightsFile(tmp_path / "trained.safetensors") as weights:
        ledger = Ledger(file.run_folder, "{}")
        digest = ledger.add_weights(weights.layout, [weights.read(0, weights.nbytes)])
        ledger.begin_arm("fedavg_random", 0.1, digest)
        ledger.close()
    folder, out = tmp_path / "exported", tmp_path / "model.safetensors"
    export(path, "--round", "0", "--transformers", folder, "--out", out)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(logits(loaded.eval(), images), logits(trained.eval(), images))
    assert loaded.config.id2label == {0: "left", 1: "right"}
    with pytest.raises(ConfigError, match="is not empty"):
        export(path, "--round", "0", "--transformers", folder)


def test_a_model_of_our_own_makes_no_folder_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.name is cnn"):
        export(made(tmp_path), "--transformers", tmp_path / "folder")
