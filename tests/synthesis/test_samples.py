from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.synthesis.samples import plan_samples

seeds = st.integers(min_value=0, max_value=2**64)
label_lists = st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True)


@given(seeds, label_lists, st.integers(1, 30))
def test_every_sample_has_a_seed_of_its_own(seed: int, labels: list[str], images: int) -> None:
    prompts = {label: (f"a {label}", f"the {label}") for label in labels}
    samples = plan_samples(labels, prompts, [1.0, 2.0], seed, images)
    assert len({sample.seed for sample in samples}) == len(samples) == images * len(labels)
    assert all(0 <= sample.seed < 2**63 for sample in samples)
    assert all(sample.prompt in prompts[labels[sample.label]] for sample in samples)
    assert samples == plan_samples(labels, prompts, [1.0, 2.0], seed, images)


@given(seeds, label_lists, st.integers(1, 10), st.integers(1, 10))
def test_a_sample_does_not_depend_on_the_others(seed: int, labels: list[str], images: int, more: int) -> None:
    """A larger set begins with the smaller one, and the order of the labels changes no label's samples."""
    prompts = {label: (f"a {label}", f"the {label}", label) for label in labels}
    small = plan_samples(labels, prompts, [1.0, 2.0, 3.0], seed, images)
    large = plan_samples(labels, prompts, [1.0, 2.0, 3.0], seed, images + more)
    assert large[: len(small)] == small
    turned = plan_samples(labels[::-1], prompts, [1.0, 2.0, 3.0], seed, images)
    assert {(s.seed, s.prompt, s.guidance) for s in small} == {(s.seed, s.prompt, s.guidance) for s in turned}


def test_seeds_stay_what_they_were_in_earlier_releases() -> None:
    (sample,) = plan_samples(["three"], {"three": ["a"]}, [1.0], 0, 1)
    assert sample.seed == 6546532934810618444


def test_prompts_and_scales_are_all_drawn() -> None:
    samples = plan_samples(["a", "b"], {"a": ("x", "y"), "b": ("z",)}, [1.0, 2.0, 3.0], 7, 60)
    assert {sample.prompt for sample in samples} == {"x", "y", "z"}
    for scale in (1.0, 2.0, 3.0):
        assert 20 <= sum(sample.guidance == scale for sample in samples) <= 60
