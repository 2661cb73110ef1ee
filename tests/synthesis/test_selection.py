"""What a filter keeps: the decision by its properties, and the file in which it stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from shapes import SHAPES, SIZE, shape_set

from gptfl_dist.config.synthesis import Filter
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError, GeneratorError, ModelError, StorageError
from gptfl_dist.synthesis.selection import SELECTION, Judge, Selection, known_selection, select, select_images
from gptfl_dist.synthesis.store import complete_manifest

PROBABILITIES = st.integers(0, 40).flatmap(
    lambda count: st.tuples(
        arrays.arrays(np.int64, count, elements=st.integers(0, 3)),
        arrays.arrays(np.float64, count, elements=st.floats(0, 1)),
    )
)
THRESHOLDS = st.floats(0, 1, exclude_max=True)
QUOTAS = st.none() | st.integers(1, 12)


class Asking:
    """A judge that gives the label asked for what `probabilities` say, image by image, and the next label the rest."""

    def __init__(self, probabilities: list[float], kind: str = "cross") -> None:
        self.probabilities = probabilities
        self.judge = Judge({"kind": kind}, Task(size=SIZE), self.answer)
        self.times = 0

    def answer(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        self.times += 1
        assert images.shape == (len(labels), SIZE, SIZE, 1)
        assert images.dtype == np.uint8
        answer = np.zeros((len(labels), len(SHAPES)))
        every = np.arange(len(labels))
        answer[every, labels] = self.probabilities
        answer[every, (labels + 1) % len(SHAPES)] = 1 - answer[every, labels]
        return answer


@given(PROBABILITIES, THRESHOLDS, QUOTAS)
def test_what_is_kept_passes_and_fills_the_quota(
    images: tuple[np.ndarray, np.ndarray], threshold: float, quota: int | None
) -> None:
    labels, probability = images
    keeps = select(labels, probability, threshold, quota)
    assert (probability[keeps] >= threshold).all()
    for label in range(4):
        passing = np.flatnonzero((labels == label) & (probability >= threshold))
        kept = np.flatnonzero((labels == label) & keeps)
        assert len(kept) == (len(passing) if quota is None else min(quota, len(passing)))
        assert kept.tolist() == passing[: len(kept)].tolist()


@given(PROBABILITIES, THRESHOLDS, st.integers(1, 12), st.integers(0, 12))
def test_a_larger_quota_keeps_what_a_smaller_one_kept(
    images: tuple[np.ndarray, np.ndarray], threshold: float, quota: int, more: int
) -> None:
    labels, probability = images
    larger = select(labels, probability, threshold, quota + more)
    assert larger[select(labels, probability, threshold, quota)].all()


@given(PROBABILITIES, THRESHOLDS, THRESHOLDS)
def test_a_lower_threshold_keeps_what_a_higher_one_kept(
    images: tuple[np.ndarray, np.ndarray], one: float, other: float
) -> None:
    labels, probability = images
    low, high = min(one, other), max(one, other)
    assert select(labels, probability, low, None)[select(labels, probability, high, None)].all()


def test_the_file_says_what_became_of_every_image(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=4)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    asking = Asking([0.9, 0.8, 0.4, 0.9, 0.5, 0.7, 0.9, 0.1, 0.9, 0.1, 0.9, 0.9])
    selection = select_images(tmp_path, Filter(keep_per_label=2), asking.judge)
    assert selection == Selection.model_validate_json((tmp_path / SELECTION).read_bytes())
    assert (selection.made, selection.passed, selection.kept) == ([4, 4, 4], [3, 3, 3], [2, 2, 2])
    assert [at for at, kept in enumerate(selection.keeps) if kept] == [0, 1, 3, 4, 5, 8]
    assert [selection.rejected(label) for label in range(3)] == [[9], [7], [2]]
    assert (selection.answers.judged[7], selection.answers.certainty[7]) == (2, 0.9)
    told = "6 of 12 images kept (cross, threshold 0.5, at most 2 a label); least: disc 2; the judge reads 75 % as asked"
    assert selection.in_words() == told
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == before


def test_a_judge_is_asked_once_about_a_set(tmp_path: Path) -> None:
    shape_set(tmp_path / "set", per_label=4)
    asking = Asking([number / 12 for number in range(12)])
    first = select_images(tmp_path / "set", Filter(threshold=0.2), asking.judge)
    written = (tmp_path / "set" / SELECTION).stat().st_mtime_ns
    assert select_images(tmp_path / "set", Filter(threshold=0.2), asking.judge) == first
    assert (tmp_path / "set" / SELECTION).stat().st_mtime_ns == written
    second = select_images(tmp_path / "set", Filter(threshold=0.6), asking.judge)
    assert second.digest != first.digest
    assert asking.times == 1

    (tmp_path / "set" / SELECTION).write_text("{")
    assert select_images(tmp_path / "set", Filter(threshold=0.6), asking.judge) == second
    other = Asking([1.0] * 12, "encoder")
    assert select_images(tmp_path / "set", Filter(threshold=0.6), other.judge).count == 12
    shape_set(tmp_path / "set", per_label=4, wrong=[0])
    select_images(tmp_path / "set", Filter(threshold=0.6), other.judge)
    assert (asking.times, other.times) == (2, 2)


def test_a_judge_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=4)

    def stopped(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_images(tmp_path, Filter(), Judge({"kind": "cross"}, Task(size=SIZE), stopped))
    assert not (tmp_path / SELECTION).exists()
    assert select_images(tmp_path, Filter(), Asking([0.5] * 12).judge).count == 12


def test_what_is_no_label_at_all_is_said_so(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=1)
    answer = np.array([[0.2, 0.1, 0.1], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]])
    selection = select_images(
        tmp_path, Filter(), Judge({"kind": "classifier"}, Task(size=SIZE), lambda images, labels: answer)
    )
    assert selection.answers.probability == [0.2, 0.3, 0.4]
    assert selection.answers.judged == [None, 0, 2]
    assert selection.answers.certainty == [0.6, 0.5, 0.4]


def test_a_label_that_hardly_passes_is_refused(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=30)
    passing = {0: 30, 1: 2, 2: 3}  # of the bars a tenth
    judge = Asking([0.9 if at // 3 < passing[at % 3] else 0.2 for at in range(90)]).judge
    selection = select_images(tmp_path, Filter(), judge)
    with pytest.raises(GeneratorError) as caught:
        selection.require_every_label(tmp_path / "dropped.png")
    assert caught.value.message == (
        "too few synthetic images pass the filter (cross, threshold 0.5): 2 of 30 of frame (at least 3)"
    )
    assert f"{tmp_path / 'dropped.png'} shows what the judge took them for" in caught.value.hint
    select_images(tmp_path, Filter(threshold=0.1), judge).require_every_label(tmp_path / "dropped.png")


def test_answers_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=2)
    with pytest.raises(ModelError, match="no numbers"):
        select_images(tmp_path, Filter(), Asking([float("nan")] * 6).judge)
    assert not (tmp_path / SELECTION).exists()


def test_a_selection_is_found_again_only_by_its_set_and_settings(tmp_path: Path) -> None:
    shape_set(tmp_path, per_label=4)
    manifest, judge = complete_manifest(tmp_path), Asking([0.5] * 12).judge
    with pytest.raises(DataError, match="there is none"):
        known_selection(tmp_path, manifest, Filter(), judge.request)
    made = select_images(tmp_path, Filter(), judge)
    assert known_selection(tmp_path, manifest, Filter(), judge.request) == made
    for settings, request in ((Filter(threshold=0.4), judge.request), (Filter(), {"kind": "encoder"})):
        with pytest.raises(DataError, match="another judge or other settings"):
            known_selection(tmp_path, manifest, settings, request)
    shape_set(tmp_path, per_label=4, wrong=[1])
    with pytest.raises(DataError, match="another set"):
        known_selection(tmp_path, complete_manifest(tmp_path), Filter(), judge.request)


def test_an_unfinished_set_is_not_judged(tmp_path: Path) -> None:
    asking = Asking([])
    with pytest.raises(StorageError, match="holds no synthetic set"):
        select_images(tmp_path, Filter(), asking.judge)
    assert asking.times == 0
