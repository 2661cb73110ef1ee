from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.synthesis import quality
from gptfl_dist.synthesis.quality import Draw, fault, fingerprint, select, sentence_of, tokens, words

ASKED = "Write a caption of one sentence for a photo of a crane."
NAMES = ["crane"]

word = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
answers = st.lists(
    st.builds(
        Draw,
        st.text(max_size=80)
        | st.lists(word | st.just("crane") | st.sampled_from([". ", ", ", "\n", " - "]), max_size=20).map(" ".join),
        st.booleans(),
    ),
    max_size=20,
)


def why(text: str, ended: bool = True, names: list[str] = NAMES, others: list[str] | None = None) -> str | None:
    sentence, whole = sentence_of(Draw(text, ended))
    return fault(sentence, whole, names, others or [], ASKED)


@pytest.mark.parametrize(
    "text",
    [
        "A crane stands in the shallow water of a marsh.",
        "Two cranes fly over a frozen lake at sunrise",
        "The crane's long legs reflect in still water.",
        "A CRANE, seen from below, against grey clouds!",
        'A sign says "crane" beside the muddy road.',
    ],
)
def test_good_sentences(text: str) -> None:
    assert why(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A heron stands in the shallow water.", quality.UNNAMED),
        ("A cranefly sits on the kitchen window.", quality.UNNAMED),
        ("A crane.", quality.SHORT),
        ("", quality.SHORT),
        ("A crane " + "and another tall bird beside an extraordinarily overgrown riverbank " * 6 + ".", quality.LONG),
        ("A photo of a crane.", quality.ECHO),
        ("Write a caption of one sentence for a photo of a crane in a marsh.", quality.ECHO),
        ("A crane in a marsh in a marsh in a marsh.", quality.LOOP),
        ("A crane crane crane in the marsh.", quality.LOOP),
        ("A <b>crane</b> stands in the water.", quality.MARKUP),
        ("A crane at https://birds stands in water.", quality.MARKUP),
        ("A crane stands in water, see cranes.com for it.", quality.MARKUP),
        ("A {label} crane stands in the water.", quality.MARKUP),
        ("A crane stands\x1b in the water.", quality.MARKUP),
        ("**A crane stands in the water.**", quality.MARKUP),
        ("A crane stands in the shallow water of", quality.CUT),
        ("A crane stands in the shallow water,", quality.CUT),
        ("A crane stands in the water...", quality.CUT),
        ('A crane stands beside a "sign in the water.', quality.CUT),
        (", and a crane stands in the water.", quality.CUT),
        ("Sure, a crane stands in the water.", quality.TALK),
        ("Sorry, but a crane is no person.", quality.TALK),
        ("I'm not able to describe a crane.", quality.TALK),
        ("Caption: a crane stands in the water.", quality.TALK),
    ],
)
def test_faults(text: str, reason: str) -> None:
    assert why(text) == reason


def test_what_was_cut_at_the_limit_of_tokens_is_kept_up_to_its_last_sentence() -> None:
    cut = Draw("A crane stands in the water. Behind it a heron", ended=False)
    assert sentence_of(cut) == ("A crane stands in the water.", True)
    assert why("A crane stands in the shallow green water", ended=False) == quality.CUT
    assert why("A crane of the U.S. Navy lifts a boat", ended=False) == quality.CUT


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ('Here is a caption:\n\n"A crane stands in water."\n\nShall I write more?', "A crane stands in water."),
        ("1. A crane stands .\n2. A crane flies .", "A crane stands."),
        ("- \u201cA crane\u2019s nest\u201d", "A crane's nest"),
        ("  A   crane\tstands  ", "A crane stands"),
        ("Captions:", ""),
    ],
)
def test_the_sentence_is_taken_out_of_the_answer(answer: str, sentence: str) -> None:
    assert sentence_of(Draw(answer, ended=True)) == (sentence, bool(sentence))


def test_the_label_may_have_several_words_and_other_names() -> None:
    assert why("A guinea-pig sleeps in the straw.", names=["guinea pig"]) is None
    assert why("Three Guinea Pigs sleep in the straw.", names=["guinea_pig"]) is None
    assert why("A pig sleeps in the straw.", names=["guinea pig"]) == quality.UNNAMED
    assert why("A motorcar stands in the rain.", names=["car", "motorcar"]) is None


def test_a_sentence_that_names_another_label_too() -> None:
    assert why("A crane watches a heron in the reeds.", others=["heron"]) == quality.OTHER_LABEL
    assert why("A guinea pig sleeps in the straw.", names=["guinea pig"], others=["pig"]) is None
    assert (
        why("A guinea pig and a pig sleep in the straw.", names=["guinea pig"], others=["pig"]) == quality.OTHER_LABEL
    )


def test_duplicates_differ_in_case_spaces_and_punctuation_alone() -> None:
    texts = [
        "A crane flies over water.",
        "a crane flies over water",
        "A crane  flies, over water!",
        "A crane swims there.",
    ]
    chosen = select([Draw(text, True) for text in texts], NAMES, [], ASKED, keep=10)
    assert chosen.kept == [texts[0], texts[3]]
    assert chosen.dropped == {quality.DUPLICATE: 2}
    assert chosen.examples == {quality.DUPLICATE: texts[1]}


@given(answers, st.integers(1, 5))
def test_what_is_kept_is_good_and_every_draw_is_accounted_for(draws: list[Draw], keep: int) -> None:
    chosen = select(draws, NAMES, ["heron"], ASKED, keep)
    assert len(chosen.kept) <= keep
    if len(chosen.kept) < keep:
        assert len(chosen.kept) + chosen.dropped.total() == len(draws)
    assert set(chosen.examples) == set(chosen.dropped)
    for sentence in chosen.kept:
        assert {"crane", "cranes", "cranees", "cranies"} & set(words(sentence))
        assert len(words(sentence)) >= quality.MIN_WORDS
        assert tokens(sentence) <= quality.MAX_TOKENS
        assert sentence == " ".join(sentence.split())
        assert sentence.isprintable()
        assert fault(sentence, True, NAMES, ["heron"], ASKED) is None
    prints = [fingerprint(sentence) for sentence in chosen.kept]
    assert len(set(prints)) == len(prints)
    assert select(draws, NAMES, ["heron"], ASKED, keep) == chosen


@given(st.text(max_size=40))
def test_a_fingerprint_knows_no_case_no_space_and_no_punctuation(text: str) -> None:
    assert fingerprint(text.replace(" ", " - ")) == fingerprint(text)
    assert fingerprint(f"  {text}!") == fingerprint(text)


@given(st.lists(word, max_size=30), st.lists(word, max_size=30))
def test_a_longer_text_has_no_fewer_tokens(some: list[str], more: list[str]) -> None:
    assert len(some) <= tokens(" ".join(some)) <= tokens(" ".join(some + more))
