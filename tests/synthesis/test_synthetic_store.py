from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from whole_set import load_images

from gptfl_dist.errors import StorageError
from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.samples import plan_samples
from gptfl_dist.synthesis.store import Environment, GeneratorRequest, Manifest, Request, TaskRequest

ROOT = Path(__file__).parents[2]
LABELS = ["a", "b"]
SHARD = 4


def manifest(images_per_label: int) -> Manifest:
    return Manifest(
        generator="none",
        request=Request(
            labels=LABELS,
            prompts={label: [label] for label in LABELS},
            seed=0,
            images_per_label=images_per_label,
            shard_size=SHARD,
            task=TaskRequest(size=6, channels=1),
            generator=GeneratorRequest(
                digest="", guidance=[1.0], steps=1, scheduler=None, dtype="auto", batch_size=1, size=None
            ),
        ),
        environment=Environment(device="cpu", dtype="float32", threads=1, libraries={}),
    )


def write_set(folder: Path, images_per_label: int) -> Manifest:
    """A set of noise, written in the order in which generation writes."""
    current = manifest(images_per_label)
    store.write_manifest(folder, current)
    samples = plan_samples(LABELS, {label: [label] for label in LABELS}, [1.0], 0, images_per_label)
    for number in range(current.request.shard_count):
        part = samples[number * SHARD : (number + 1) * SHARD]
        noise = [np.random.default_rng(s.seed).integers(0, 256, (6, 6, 1), np.uint8) for s in part]
        data = store.encode_shard(current.request, part, [store.encode_png(n, 6, 1) for n in noise], True)
        shard = store.write_shard(folder, number, len(part), data)
        current = current.model_copy(update={"shards": (*current.shards, shard)})
        store.write_manifest(folder, current)
    return current


def test_pixels_come_back_as_they_were(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    assert np.array_equal(store.decode_png(store.encode_png(noise, 6, 3), 3), noise)
    assert store.decode_png(store.encode_png(noise, 9, 1), 1).shape == (9, 9, 1)


def test_a_kill_at_any_moment_leaves_only_whole_shards_entered(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_synthetic_store as test\n"
        "print('ready', flush=True); test.write_set(Path(sys.argv[2]), 1000)"
    )
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            while not (folder / store.shard_name(3)).exists():
                time.sleep(0.001)
            time.sleep(random.Random(attempt).uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
        found = store.read_manifest(folder)
        assert found is not None
        assert not found.complete
        assert len(found.shards) >= 3
        assert all(store.intact(folder, shard) for shard in found.shards)
        with pytest.raises(StorageError, match=f"has {len(found.shards)} of 500 shards"):
            load_images(folder)


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / f".manifest.json.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full") as caught:
        store.write_manifest(tmp_path, manifest(2))
    assert "the same command goes on" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".shard-00000.parquet.1.part").write_bytes(b"half")
    with store.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    with (
        store.locked(tmp_path),
        pytest.raises(StorageError, match="another process is generating"),
        store.locked(tmp_path),
    ):
        pass
    with store.locked(tmp_path):
        pass


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 1}'])
def test_a_damaged_manifest_is_not_overwritten(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(StorageError, match="no manifest of a synthetic set"):
        store.read_manifest(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    write_set(tmp_path, 2)
    tree = json.loads((tmp_path / "manifest.json").read_text())
    tree["shards"][0]["file"] = "../shard-00000.parquet"
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(StorageError, match=r"shards\.0\.file"):
        load_images(tmp_path)


def test_shards_without_a_manifest_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(StorageError, match=r"shards but no manifest\.json"):
        store.read_manifest(tmp_path)


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no synthetic set"):
        load_images(tmp_path)


def test_importing_the_room_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, gptfl_dist.synthesis\n"
        "print({'torch', 'diffusers', 'transformers', 'datasets', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("edited", [0, 30, 59])
def test_of_long_prompt_sets_what_differs_is_said(tmp_path: Path, edited: int) -> None:
    before = manifest(4).request
    prompts = [f"a picture of something, number {number}" for number in range(60)]
    changed = [*prompts[:edited], "a new one", *prompts[edited + 1 :]]
    here, wanted = (before.model_copy(update={"prompts": {"a": ["a"], "b": list_}}) for list_ in (prompts, changed))
    with pytest.raises(StorageError) as refused:
        store.require_same(here, wanted, tmp_path, "another synthetic set")
    assert f"prompts.b: found ['{prompts[edited]}'] where ['a new one'] was expected" in refused.value.message
