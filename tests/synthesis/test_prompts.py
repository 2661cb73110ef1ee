from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.config.synthesis import Prompts
from gptfl_dist.errors import ConfigError
from gptfl_dist.synthesis import build_prompts
from gptfl_dist.synthesis.prompt_set import LabelPrompts, prompt_set_text

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


# A prompt set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


def from_file(text: str, folder: Path, labels: list[str]) -> dict[str, tuple[str, ...]]:
    file = folder / "p.yaml"
    file.write_text(text, encoding="utf-8")
    return build_prompts(Prompts(file=file), labels)


def test_a_prompt_set_counts_as_it_stands(folder: Path) -> None:
    text = """\
# read and edited
yes: ["a photo of {label}", "3", "a photo of {label}"]
"3":
- off
no: [x]
"""
    built = from_file(text, folder, ["no", "yes", "3"])
    assert built == {"no": ("x",), "yes": ("a photo of {label}", "3"), "3": ("off",)}
    assert list(built) == ["no", "yes", "3"]


def test_all_that_is_wrong_with_a_prompt_set_is_said_by_line(folder: Path) -> None:
    text = """\
crane: []
herron: [a heron]
wolf: [a wolf, 3, "", [a]]
mouse: a mouse
5: [five]
"""
    with pytest.raises(ConfigError) as refused:
        from_file(text, folder, ["crane", "heron", "wolf", "mouse", "5", "lens"])
    assert str(refused.value).splitlines()[1:-1] == [
        f"  {folder / 'p.yaml'}:{problem}"
        for problem in (
            "1:1: no prompts for heron, lens, expected a list of at least one prompt for each label",
            "1:8: crane: found a list of 0, expected a list of at least one prompt",
            "2:1: herron: the federation has no such label; did you mean heron?",
            '3:16: wolf[1]: found 3 (a number), expected text: quote it as "3"',
            '3:19: wolf[2]: found "" (text), expected text',
            "3:23: wolf[3]: found a list of 1, expected text",
            '4:8: mouse: found "a mouse" (text), expected a list of at least one prompt',
            '5:1: 5: found the key 5 (a number), expected text: quote it as "5"',
        )
    ]
    assert "gptfl prompts FEDERATION_FILE" in refused.value.hint


@pytest.mark.parametrize("text", ["", "- a\n", "crane: [", "crane: [a]\ncrane: [b]\n", "crane: !!python/tuple [a]\n"])
def test_a_file_that_is_no_prompt_set(text: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"p\.yaml"):
        from_file(text, folder, ["crane"])


def test_a_prompt_set_may_be_larger_than_a_federation_file(folder: Path) -> None:
    prompts = [f"a photo of a crane in front of house number {number}" for number in range(25_000)]
    text = "crane:\n" + "".join(f"- {prompt}\n" for prompt in prompts)
    assert len(text) > 2**20
    assert from_file(text, folder, ["crane"]) == {"crane": tuple(prompts)}


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
said = st.lists(
    texts.filter(str.strip) | st.sampled_from(["yes", "3", "~", "# a", "- b", "a: b"]), min_size=1, max_size=4
)


@given(st.dictionaries(texts, said, min_size=1, max_size=4), st.lists(st.text(max_size=30), max_size=3))
def test_a_prompt_set_that_was_written_reads_back_equal(
    folder: Path, prompts: dict[str, list[str]], made: list[str]
) -> None:
    made = [line.encode("utf-8", "replace").decode() for line in made]
    text = prompt_set_text(made, [LabelPrompts(label, tuple(given)) for label, given in prompts.items()])
    assert from_file(text, folder, list(prompts)) == {
        label: tuple(dict.fromkeys(given)) for label, given in prompts.items()
    }
