from __future__ import annotations

from pathlib import Path

import pytest
from small_wordnet import write_small_wordnet

from gptfl_dist.errors import ConfigError, DataError
from gptfl_dist.synthesis.wordnet import WordNet, find_meanings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_wordnet(tmp_path_factory.mktemp("wordnet"))


@pytest.fixture(scope="module")
def wordnet(folder: Path) -> WordNet:
    return WordNet(folder)


def test_senses_come_in_the_order_of_the_index_with_names_and_definitions(wordnet: WordNet) -> None:
    writer, machine, bird = wordnet.senses("crane")
    assert (writer.names, writer.instance) == (("Crane", "Stephen Crane"), True)
    assert (machine.definition, machine.instance) == ("lifts and moves heavy objects", False)  # its example left out
    assert bird.definition == "large (long-necked) wading bird of marshes; it flies far"
    assert bird.short_definition == "large wading bird of marshes"
    assert wordnet.senses("wolf")[0].short_definition == ""


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("guinea pig", "guinea pig"),
        ("Guinea_Pig", "guinea pig"),
        ("guinea-pigs", "guinea pig"),
        ("t-shirt", "T-shirt"),
        ("T-Shirts", "T-shirt"),
        ("wolves", "wolf"),
        ("mice", "mouse"),
        ("lens", "lens"),
    ],
)
def test_a_noun_is_found_in_any_spelling_and_in_the_plural(wordnet: WordNet, written: str, found: str) -> None:
    assert found in wordnet.senses(written)[0].names


@pytest.mark.parametrize("noun", ["unicorn", "", " ", "cran", "entity n", "größe"])
def test_what_wordnet_does_not_have(wordnet: WordNet, noun: str) -> None:
    assert wordnet.senses(noun) == ()


def test_the_most_frequent_kind_of_thing_is_meant_unless_another_is_wanted(wordnet: WordNet) -> None:
    assert find_meanings(wordnet, ["crane", "wolf", "unicorn"], {}).keys() == {"crane", "wolf"}
    assert find_meanings(wordnet, ["crane"], {})["crane"].sense.short_definition == "lifts and moves heavy objects"
    assert find_meanings(wordnet, ["crane"], {"crane": 1})["crane"].sense.instance
    assert find_meanings(wordnet, ["crane"], {"crane": 3})["crane"].sense.short_definition.endswith("of marshes")


def test_other_names_are_those_that_mean_the_label_first_and_no_other_label(wordnet: WordNet) -> None:
    # machine means another thing first; auto stands first for the car, and is claimed by none but it.
    assert find_meanings(wordnet, ["automobile", "cat"], {})["automobile"].other_names == ("car", "auto", "motorcar")
    both = find_meanings(wordnet, ["automobile", "car"], {})
    assert both["automobile"].other_names == both["car"].other_names == ()
    assert find_meanings(wordnet, ["t-shirt"], {})["t-shirt"].other_names == ("tee shirt",)


@pytest.mark.parametrize(("number", "told"), [(4, "3 (large"), (0, "1 (United States writer")])
def test_a_sense_that_is_not_there(wordnet: WordNet, number: int, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_meanings(wordnet, ["crane"], {"crane": number})
    assert f"--sense crane={number}" in str(refused.value)
    assert told in str(refused.value)
    with pytest.raises(ConfigError, match="WordNet has no noun unicorn"):
        find_meanings(wordnet, ["unicorn"], {"unicorn": 1})


def test_a_folder_without_a_database(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.noun cannot be read") as refused:
        WordNet(tmp_path)
    assert "wordnet-base" in str(refused.value)


@pytest.mark.parametrize("file", ["index.noun", "data.noun"])
def test_a_damaged_database(folder: Path, tmp_path: Path, file: str) -> None:
    for name in ("index.noun", "data.noun"):
        text = (folder / name).read_text()
        damaged = text.replace("crane n 3 2 @", "crane n 3 x @") if name == "index.noun" else f"shifted {text}"
        (tmp_path / name).write_text(damaged if name == file else text)
    with pytest.raises(DataError, match=rf"{file} is damaged"):
        WordNet(tmp_path).senses("crane")
