"""A federation whose sides encrypt what they keep: the same weights, nothing of them on the disk, and no wrong key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import Commands, Federation
from test_run_sides import Sides

from gptfl_dist.config.at_rest import AtRest
from gptfl_dist.config.document import dump_yaml
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.errors import ConfigError, GptflError, LaunchError
from gptfl_dist.run.archive import manifest_of, unpack
from gptfl_dist.run.at_rest import KEY_CHECK, key_of, use_at_rest
from gptfl_dist.run.backup import back_up
from gptfl_dist.run.collective import _checked_ranks
from gptfl_dist.run.restore import restore
from gptfl_dist.testing.federations import tiny_federation
from gptfl_dist.weights import WeightsFile
from gptfl_dist.weights.sealed import use_key

_MAGIC = b"gptfl sealed 1\n\0"


@pytest.fixture(autouse=True)
def no_key_is_left() -> Iterator[None]:
    yield
    use_key(None)


def change(path: Path, **settings: Any) -> None:
    content = {**yaml.safe_load(path.read_text()), **settings}
    path.write_text(dump_yaml({name: value for name, value in content.items() if value is not None}))


def key_file(path: Path, key: str = "a5" * 32, mode: int = 0o600) -> Path:
    path.write_text(f"{key}\n")
    path.chmod(mode)
    return path


def test_an_encrypted_run_comes_to_the_same_weights_of_which_no_window_is_on_the_disk(
    federation: Callable[..., Federation], gptfl: Commands, tmp_path: Path, undisturbed: Federation
) -> None:
    sides = Sides(federation(), gptfl)
    folder, path = sides.federation.folder, sides.federation.path
    key, of_silos = key_file(folder / "coordinator.key"), key_file(folder / "silos.key", "b6" * 32)
    change(path, at_rest={"key_file": key.name})
    for name in sides.federation.silos:
        change(folder / f"{name}.yaml", at_rest={"key_command": ["cat", str(of_silos)]})
    commands = [sides.coordinator(), *(sides.silo(name) for name in sides.federation.silos)]
    for command in commands:
        assert command.wait() == 0, command.stderr
    assert sides.federation.result() == undisturbed.result()

    out = tmp_path / "out.safetensors"
    gptfl.run("export", path, "--round", "final", "--out", out)
    with WeightsFile(out) as weights:
        assert weights.digest() == sides.federation.result()[0]
        flat = np.frombuffer(weights.read(0, weights.nbytes), np.uint8)
    windows = [flat[start : start + 12].tobytes() for start in range(0, len(flat) - 12, 256)]
    windows = [window for window in windows if len(set(window)) > 4]
    assert len(windows) > 50
    kept = [p for where in (sides.federation.run_folder, *folder.glob("*-work")) for p in where.rglob("*")]
    for file in (p for p in kept if p.is_file()):
        content = file.read_bytes()
        assert not any(window in content for window in windows), file
        if file.suffix in (".safetensors", ".spool"):
            assert content.startswith(_MAGIC), file
    assert {p.name for p in kept} >= {"silo-1.spool", "update.safetensors", "weights.safetensors", KEY_CHECK}

    archive = tmp_path / "a.tar"
    gptfl.run("backup", path, "--to", archive)
    stored = archive.read_bytes()
    assert not any(window in stored for window in windows)
    assert f"run/{KEY_CHECK}" in {one.name for one in manifest_of(archive).files}
    unpack(archive, tmp_path / "restored", lambda done, total: None)

    # A wrong or missing key is said before anything starts.
    other = key_file(folder / "other.key", "c7" * 32)
    for at_rest, said in (({"key_file": str(other)}, "is another one"), (None, "no at_rest names its key")):
        change(path, at_rest=at_rest)
        change(folder / "silo-1.yaml", at_rest=at_rest)
        for command in (sides.coordinator(), sides.silo("silo-1"), gptfl.start("export", path, "--out", folder / "x")):
            assert command.wait() == 2
            assert said in command.stderr
            assert "Traceback" not in command.stderr


def test_a_fresh_run_deletes_nothing_before_it_has_its_keys(
    federation: Callable[..., Federation], gptfl: Commands
) -> None:
    training = {"batch_size": 8, "learning_rate": 0.01, "warm_up_rounds": 0, "epochs": 1, "momentum": 0.0}
    run = federation(training=training, strategy={"rule": "scaffold"})
    key, silo = key_file(run.folder / "at-rest.key"), run.folder / "silo-1.yaml"
    for path in (run.path, silo):
        change(path, at_rest={"key_file": key.name})
    gptfl.run("run", run.path, "--exchange", "grpc")
    for kept in (run.run_folder / "silos" / "silo-1" / "kept", run.run_folder / "strategy"):
        assert {path.read_bytes()[: len(_MAGIC)] for path in kept.glob("*.safetensors")} == {_MAGIC}
    before = {path: path.read_bytes() for path in run.run_folder.rglob("*.s*") if path.is_file()}
    assert {path.name for path in before} >= {"ledger.sqlite", "fedavg_random.safetensors"}

    def refused(said: str, *commands: str) -> None:
        for command in commands:
            failed = gptfl.start(command, run.path, "--fresh")
            assert failed.wait() == 2, failed.stderr
            assert said in failed.stderr
            assert {path: path.read_bytes() for path in before} == before

    key.chmod(0o644)
    refused("others may read", "coordinator", "run")
    key_file(key, "a5")
    refused("expected 64 hexadecimal digits", "coordinator", "run")
    key.unlink()
    refused("No such file", "coordinator", "run")
    change(silo, at_rest={"key_env": "GPTFL_NO_SUCH_VARIABLE"})
    key_file(key, "b6" * 32)  # another key than that of the run, all of which is deleted
    refused("at_rest.key_env GPTFL_NO_SUCH_VARIABLE", "run")
    change(silo, at_rest=None)
    gptfl.run("run", run.path, "--exchange", "grpc", "--fresh")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key_file": "missing"}, "No such file"),
        ({"key_env": "GPTFL_NO_SUCH_VARIABLE"}, "there is no such variable"),
        ({"key_command": ["no-such-program"]}, "No such file"),
        ({"key_command": ["sh", "-c", "echo sealed >&2; exit 3"]}, "ended with exit code 3: sealed"),
        ({"key_command": ["echo", "00ff"]}, "expected 64 hexadecimal digits"),
        ({"key_command": ["echo", "not hex"]}, "expected 64 hexadecimal digits"),
    ],
)
def test_a_key_that_cannot_be_had_is_said_and_never_shown(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        key_of(AtRest.model_validate(settings))


def test_a_key_is_had_from_a_file_a_variable_or_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = key_file(tmp_path / "key"), bytes.fromhex("a5" * 32)
    monkeypatch.setenv("GPTFL_KEY", "a5" * 32)
    assert key_of(AtRest(key_file=path)) == key
    assert key_of(AtRest(key_env="GPTFL_KEY")) == key
    assert key_of(AtRest(key_command=["cat", str(path)])) == key
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"at_rest\.key_file .*others may read"):
        key_of(AtRest(key_file=path))


@pytest.mark.parametrize("settings", [{}, {"key_env": "A", "key_file": "b"}])
def test_the_section_names_one_key(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give one of key_file, key_env, key_command"):
        AtRest.model_validate(settings)


def test_a_folder_keeps_to_its_key(tmp_path: Path) -> None:
    first, second = (AtRest(key_file=key_file(tmp_path / name, name * 64)) for name in "12")
    use_at_rest(None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for _ in range(2):
        use_at_rest(first, tmp_path / "run")
    for settings in (second, None):
        with pytest.raises(ConfigError, match="what lies there is encrypted"):
            use_at_rest(settings, tmp_path / "run")


def test_a_key_that_was_lost_is_to_be_brought_back_and_not_made_anew(tmp_path: Path) -> None:
    key, folder = tmp_path / "key", tmp_path / "run"
    settings = AtRest(key_file=key)
    with pytest.raises(ConfigError, match="No such file") as first:
        use_at_rest(settings, folder)
    assert "openssl rand" in first.value.hint
    key_file(key)
    use_at_rest(settings, folder)
    for lose in (key.unlink, lambda: key_file(key, "a5")):
        lose()
        with pytest.raises(ConfigError) as lost:
            use_at_rest(settings, folder)
        assert lost.value.hint.startswith(f"bring back the key that {folder} was begun with")


def test_a_restore_says_that_the_key_is_to_be_brought(tmp_path: Path) -> None:
    key = key_file(tmp_path / "at-rest.key")
    path = tiny_federation(tmp_path, at_rest={"key_file": key.name})
    back_up(path, tmp_path / "a.tar")
    said = restore(tmp_path / "a.tar", tmp_path / "new", "").next
    assert not (tmp_path / "new" / key.name).exists()
    (told,) = (line for line in said if "at_rest" in line)
    assert told.startswith(f"bring the key of at_rest.key_file {tmp_path / 'new' / key.name}: it is not in the archive")
    assert said.index(told) < len(said) - 1  # the start comes last


def test_ranks_that_share_a_process_cannot_encrypt(tmp_path: Path) -> None:
    silo = tmp_path / "silo.yaml"
    silo.write_text(json.dumps({"name": "s", "data": {"path": "d"}, "at_rest": {"key_env": "A"}}))
    content: dict[str, Any] = {"name": "f", "labels": ["a", "b"], "silos": [{"name": "s", "file": str(silo)}]}
    with pytest.raises(LaunchError, match="at_rest is set in s, and here all sides share processes"):
        _checked_ranks(FederationFile.model_validate(content), 2, "mpi")
    with pytest.raises(GptflError, match="at_rest is set in the federation file, s"):
        _checked_ranks(FederationFile.model_validate({**content, "at_rest": {"key_env": "A"}}), 2, "mpi")
