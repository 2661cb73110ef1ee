"""Seeds, and the promise that the same seed and thread count give the same weights bit by bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gptfl_dist
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.task import Model, Task
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.local import train
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.seeding import derive_seed, deterministic

parts = st.lists(st.integers(0, 2**63 - 1) | st.text(max_size=10), max_size=5)


@given(parts, parts)
def test_seeds_are_63_bits_and_differ_where_the_parts_do(one: list[int | str], two: list[int | str]) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*two)) == (one == two)


def test_seeds_stay_the_same_from_release_to_release() -> None:
    assert derive_seed(0, "train", 3, "hospital-a") == 2362573726734537190
    assert derive_seed(1) != derive_seed("1")


def test_deterministic_seeds_all_generators_and_sets_threads() -> None:
    def draw() -> tuple[float, float]:
        return float(torch.rand(1)), float(np.random.rand())

    deterministic(2**62, 1)
    first = draw()
    assert torch.get_num_threads() == 1
    deterministic(2**62, 0)
    assert draw() == first
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    deterministic(5, 1)
    assert draw() != first


def trained(threads: int) -> str:
    """The digest of weights trained on drawn data; self-contained, so that another process can run it too."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 1, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (150,), generator=generator)
    task = Task(size=16)
    settings = LocalTraining(
        epochs=2, batch_size=32, learning_rate=0.05, momentum=0.9, weight_decay=1e-4, augmentation=True, threads=threads
    )
    model = build_model(Model(), task, 3, seed=4)
    train(
        model, ImageSet(images, labels, ("a", "b", "c")), settings, task, seed=9, device="cpu", progress=lambda *_: None
    )
    weights = b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("threads", [1, 2])
def test_same_weights_in_a_thread_and_in_another_process(threads: int) -> None:
    here = trained(threads)
    torch.set_num_threads(3 - threads)  # what the main thread has set must not reach the others
    in_thread: list[str] = []
    worker = threading.Thread(target=lambda: in_thread.append(trained(threads)))
    worker.start()
    worker.join()
    assert in_thread == [here]
    code = f"from test_seeding import trained; print(trained({threads}))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(gptfl_dist.__file__).parents[1])])
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    assert child.stdout.strip() == here
