from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from whole_set import load_images

from gptfl_dist.config.synthesis import Synthesis
from gptfl_dist.config.task import Task
from gptfl_dist.errors import StorageError
from gptfl_dist.learning.group import ALONE
from gptfl_dist.synthesis import SyntheticSet, synthesize

LABELS = ["one", "two", "three"]
ROOT = Path(__file__).parents[2]


def synthesis(source: Path, **generator: Any) -> Synthesis:
    """24 images in five shards, the last one short; batches that fill no shard evenly."""
    return Synthesis.model_validate(
        {
            "generator": {"source": str(source), "steps": 2, "batch_size": 2, "device": "cpu"} | generator,
            "prompts": {"templates": ["a {style} {label}", "{label}"], "styles": ["bold", "thin"]},
            "images_per_label": 8,
            "shard_size": 5,
            "threads": 1,
        }
    )


def make(
    settings: Synthesis,
    folder: Path,
    task: Task | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 11,
) -> SyntheticSet:
    return synthesize(settings, task or Task(size=12), LABELS, seed, folder, progress, ALONE)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def column(folder: Path, name: str) -> list[Any]:
    return [value for path in sorted(folder.glob("*.parquet")) for value in pq.read_table(path)[name].to_pylist()]


@pytest.fixture(scope="module")
def whole(text_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed set with guidance drawn per image. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    make(drawn(text_pipeline_folder), folder)
    return folder


def drawn(source: Path) -> Synthesis:
    return synthesis(source, guidance=[1.0, 3.0, 6.0])


def test_what_is_made(text_pipeline_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = make(synthesis(text_pipeline_folder), tmp_path / "a", progress=lambda *now: seen.append(now))
    assert (made.count, made.folder) == (24, tmp_path / "a")
    assert seen[0] == (0, 24)
    assert seen[-1] == (24, 24)
    assert seen == sorted(set(seen))
    images, labels = load_images(made.folder)
    assert images.shape == (24, 12, 12, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2] * 8
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["request"]["labels"] == LABELS
    assert manifest["request"]["prompts"]["two"] == ["a bold two", "a thin two", "two"]
    assert manifest["environment"]["threads"] == 1
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 5, 5, 5, 4]


@pytest.mark.parametrize("fixture", ["class_pipeline_folder", "unguided_pipeline_folder"])
def test_the_same_request_gives_the_same_bytes(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import torch

    settings = synthesis(request.getfixturevalue(fixture))
    task = Task(size=12, channels=3)
    for name in ("a", "b"):
        torch.rand(1)  # what else happens in the process makes no difference
        make(settings, tmp_path / name, task)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert load_images(tmp_path / "a")[0].shape == (24, 12, 12, 3)
    make(settings, tmp_path / "c", task, seed=12)
    assert not np.array_equal(load_images(tmp_path / "a")[0], load_images(tmp_path / "c")[0])


def test_a_pipeline_without_guidance_records_none(unguided_pipeline_folder: Path, tmp_path: Path) -> None:
    made = make(synthesis(unguided_pipeline_folder), tmp_path / "a")
    assert column(made.folder, "guidance") == [None] * 24


def test_guidance_is_drawn_for_each_image(text_pipeline_folder: Path, whole: Path, tmp_path: Path) -> None:
    scales = np.array(column(whole, "guidance"))
    assert set(scales) == {1.0, 3.0, 6.0}
    constant = make(synthesis(text_pipeline_folder, guidance=3.0), tmp_path / "constant")
    assert column(constant.folder, "seed") == column(whole, "seed")
    here, there = load_images(whole)[0].astype(int), load_images(constant.folder)[0].astype(int)
    apart = np.abs(here - there).reshape(24, -1).max(axis=1)
    # Batches are cut differently, so equal scales may still differ in a last bit.
    assert (apart[scales == 3.0] <= 1).all()
    assert (apart[scales == 6.0] > 1).any()


def test_datasets_reads_images_and_label_names(whole: Path, tmp_path: Path) -> None:
    import datasets

    shards = [str(path) for path in sorted(whole.glob("*.parquet"))]
    loaded = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path))
    images, labels = load_images(whole)
    assert loaded.features["label"].names == LABELS
    assert loaded[4]["image"].size == (12, 12)
    assert loaded[4]["image"].mode == "L"
    assert np.array_equal(np.asarray(loaded[4]["image"]), images[4, :, :, 0])
    assert loaded["label"][:] == labels.tolist()
    assert loaded[4]["prompt"] in {"a bold two", "a thin two", "two"}


class TestResuming:
    def test_a_finished_set_is_reused_without_its_generator_being_run(
        self, text_pipeline_folder: Path, whole: Path
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"}
        seen: list[tuple[int, int]] = []
        settings = drawn(text_pipeline_folder).model_copy(update={"threads": 2})
        make(settings, whole, progress=lambda *now: seen.append(now))
        assert seen == [(24, 24)]
        assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"}

    def test_killed_and_restarted(self, text_pipeline_folder: Path, tmp_path: Path) -> None:
        folder, undisturbed = tmp_path / "set", tmp_path / "undisturbed"
        larger = drawn(text_pipeline_folder).model_copy(update={"images_per_label": 40})
        make(larger, undisturbed)
        settings = tmp_path / "settings.json"
        settings.write_text(larger.model_dump_json())
        code = (
            "import sys; from pathlib import Path\n"
            "from gptfl_dist.config.task import Task\n"
            "from gptfl_dist.config.synthesis import Synthesis\n"
            "from gptfl_dist.learning.group import ALONE\n"
            "from gptfl_dist.synthesis import synthesize\n"
            "settings = Synthesis.model_validate_json(Path(sys.argv[1]).read_text())\n"
            f"synthesize(settings, Task(size=12), {LABELS}, 11, Path(sys.argv[2]),"
            " lambda done, total: print(done, flush=True), ALONE)\n"
        )
        instants = random.Random(2)
        count, moment = instants.randint(20, 60), instants.uniform(0, 0.05)
        with subprocess.Popen(
            [sys.executable, "-c", code, str(settings), str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) >= count:
                    time.sleep(moment)
                    child.send_signal(signal.SIGKILL)
                    break
        assert child.returncode == -signal.SIGKILL
        entered = json.loads((folder / "manifest.json").read_text())["shards"]
        assert 0 < len(entered) < 24
        kept = {name: data for name, data in files(folder).items() if name in {shard["file"] for shard in entered}}

        again = subprocess.run(
            [sys.executable, "-c", code, str(settings), str(folder)],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert again.stderr == "", "the libraries' warnings and progress bars reach the user"
        assert {name: files(folder)[name] for name in kept} == kept
        assert files(folder) == files(undisturbed)
        for mine, expected in zip(load_images(folder), load_images(undisturbed), strict=True):
            assert np.array_equal(mine, expected)

    @pytest.mark.parametrize("instant", [0, 3, 5, 13, 24])
    def test_interrupted(self, text_pipeline_folder: Path, whole: Path, tmp_path: Path, instant: int) -> None:
        def interrupt(done: int, total: int) -> None:
            if done >= instant:
                raise KeyboardInterrupt

        settings = drawn(text_pipeline_folder)
        with pytest.raises(KeyboardInterrupt):
            make(settings, tmp_path / "set", progress=interrupt)
        assert not list((tmp_path / "set").glob("*.tmp"))
        make(settings, tmp_path / "set")
        assert files(tmp_path / "set") == files(whole)

    @pytest.mark.parametrize("damage", ["flipped", "cut", "deleted"])
    def test_a_damaged_shard_is_made_anew(
        self, text_pipeline_folder: Path, whole: Path, tmp_path: Path, damage: str
    ) -> None:
        folder = tmp_path / "set"
        shutil.copytree(whole, folder)
        shard = folder / "shard-00001.parquet"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "deleted":
            shard.unlink()
        else:
            shard.write_bytes(data if damage == "flipped" else data[:-10])
        with pytest.raises(StorageError, match="shard-00001"):
            load_images(folder)
        seen: list[int] = []
        make(drawn(text_pipeline_folder), folder, progress=lambda done, total: seen.append(done))
        assert seen[0] == 19
        assert files(folder) == files(whole)

    def test_an_unfinished_set_keeps_its_thread_count(
        self, text_pipeline_folder: Path, whole: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "set"
        shutil.copytree(whole, folder)
        (folder / "shard-00002.parquet").unlink()
        settings = drawn(text_pipeline_folder)
        with pytest.raises(StorageError, match="threads: found 1, expected 2") as caught:
            make(settings.model_copy(update={"threads": 2}), folder)
        assert "Restore" in caught.value.hint
        make(settings.model_copy(update={"threads": 0}), folder)
        assert files(folder) == files(whole)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"steps": 3}, "generator.steps: found 2, expected 3"),
            ({"guidance": 1.5}, r"generator.guidance: found \[1.0, 3.0, 6.0\], expected \[1.5\]"),
            ({"scheduler": "DDIMScheduler"}, "generator.scheduler: found nothing, expected DDIMScheduler"),
        ],
    )
    def test_another_request(self, text_pipeline_folder: Path, whole: Path, changes: dict[str, Any], said: str) -> None:
        before = files(whole)
        with pytest.raises(StorageError, match=said) as caught:
            make(synthesis(text_pipeline_folder, **({"guidance": [1.0, 3.0, 6.0]} | changes)), whole)
        assert "synthesis.folder" in caught.value.hint
        assert files(whole) == before

    def test_another_generator(self, class_pipeline_folder: Path, whole: Path) -> None:
        with pytest.raises(StorageError, match=r"generator\.digest: found"):
            make(drawn(class_pipeline_folder), whole)

    def test_another_seed_and_task(self, text_pipeline_folder: Path, whole: Path) -> None:
        with pytest.raises(StorageError, match=r"seed: found 11, expected 12; task\.size: found 12, expected 16"):
            make(drawn(text_pipeline_folder), whole, Task(size=16), seed=12)

    def test_a_folder_that_is_a_file(self, text_pipeline_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "set").write_text("")
        with pytest.raises(StorageError, match="File exists"):
            make(synthesis(text_pipeline_folder), tmp_path / "set")
