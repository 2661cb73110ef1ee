from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.config.federation import Prompts
from gptfl_dist.synthesis import build_prompts

labels = st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True)
pieces = st.sampled_from(["a photo of a {label}", "{label}", "{style} {label}", "{label}, {style}, again {label}"])


@given(labels, st.lists(pieces, min_size=1), st.lists(st.text(max_size=8), min_size=1))
def test_no_prompt_comes_twice_and_the_order_is_stable(
    labels: list[str], templates: list[str], styles: list[str]
) -> None:
    settings = Prompts(templates=templates, styles=styles)
    built = build_prompts(settings, labels)
    assert list(built) == labels
    for prompts in built.values():
        assert prompts
        assert len(set(prompts)) == len(prompts)
    assert built == build_prompts(settings, labels)


def test_every_template_with_every_style() -> None:
    settings = Prompts(templates=["a {style} {label}", "the {label}"], styles=["bold", "thin"])
    assert build_prompts(settings, ["one"]) == {"one": ("a bold one", "a thin one", "the one")}


def test_a_label_with_braces_stays_as_it_is() -> None:
    settings = Prompts(templates=["{style} {label}"], styles=["big"])
    assert build_prompts(settings, ["{style}", "{0}"]) == {"{style}": ("big {style}",), "{0}": ("big {0}",)}
