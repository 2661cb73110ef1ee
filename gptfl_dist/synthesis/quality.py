"""Which sentences of a text model become prompts: one sentence of each answer, a list of faults, no duplicates.

A prompt should show one thing, the label's. So a sentence must name the label as a word, in the singular or in a plain
English plural, and no other label of the federation; it must be whole, of a sane length for a picture's text encoder,
and free of what models add around an answer. The rules are for English.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_WORDS = 4
MAX_TOKENS = 75
"""What CLIP's text encoder, that of most pipelines, reads of a prompt: 77 less those that mark its start and end."""

DUPLICATE = "like an earlier one"
UNNAMED = "does not name the label"
OTHER_LABEL = "names another label"
SHORT = f"shorter than {MIN_WORDS} words"
LONG = f"longer than about {MAX_TOKENS} tokens"
ECHO = "repeats the instruction"
LOOP = "repeats itself"
MARKUP = "markup, an address or control characters"
CUT = "not a whole sentence"
TALK = "talks to whoever asked"

_WORD = re.compile(r"[^\W_]+")
_LIST_MARK = re.compile(r"^(?:[-*•]|\(?\d{1,3}[.)])\s+")
# Not after a single capital letter, as in "U.S. Navy".
_SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?]+[\"')]*(?=\s|$)")
_SPACE_BEFORE_MARK = re.compile(r"\s+([.,;:!?])")
_MARKUP = re.compile(r"[<>{}\[\]|\\^~*#_=`@\ufffd]|https?:|www\.|&[a-z]+;|\w\.(?:com|org|net)\b", re.IGNORECASE)
_TALK = re.compile(
    r"(?:sure|certainly|of course|okay|ok|absolutely|i|i'm|sorry|as an? (?:ai|language model)"
    r"|here(?: is|'s| are)|(?:caption|answer|sentence|description|prompt|example)(?: \d+)?\s*:)(?!\w)",
    re.IGNORECASE,
)
_TYPEWRITER = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)
_HANGING = re.compile(
    r"\b(?:an?|the|and|or|but|nor|of|in|on|at|with|to|from|by|for|as|into|onto|near|over|under|between|its|his|her|their"
    r"|is|are|was|were|that|which|who|while|where|when)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Draw:
    """What a text model wrote once. `ended`: it stopped by itself, not at the limit of tokens."""

    text: str
    ended: bool


@dataclass
class Selection:
    """The sentences kept of one label, and how many were dropped for which reason, with the first of each."""

    kept: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def select(
    draws: Iterable[Draw], names: Sequence[str], others: Sequence[str], instruction: str, keep: int
) -> Selection:
    """The first `keep` good sentences of `draws` for the label of `names`, its own and others that mean the same.

    `others` are the other labels. What comes after `keep` is neither kept nor counted.
    """
    selection, seen = Selection(), set()
    for draw in draws:
        if len(selection.kept) == keep:
            break
        sentence, whole = sentence_of(draw)
        reason = fault(sentence, whole, names, others, instruction)
        if reason is None and fingerprint(sentence) in seen:
            reason = DUPLICATE
        if reason is None:
            seen.add(fingerprint(sentence))
            selection.kept.append(sentence)
        else:
            selection.dropped[reason] += 1
            selection.examples.setdefault(reason, sentence)
    return selection


def words(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def fingerprint(text: str) -> str:
    """Equal for texts that differ in case, spaces and punctuation alone."""
    return "".join(words(text))


def tokens(text: str) -> int:
    """About how many tokens a text encoder makes of a text: a word of up to six letters is one, so is each mark."""
    found = words(text)
    return sum(-(-len(word) // 6) for word in found) + sum(not (c.isalnum() or c.isspace()) for c in text)


def sentence_of(draw: Draw) -> tuple[str, bool]:
    """The first sentence of an answer, in plain typewriter marks, without list marks and quotes around it.

    And whether it came to its end. Lines such as "Here is a caption:" are passed over.
    """
    text = draw.text.translate(_TYPEWRITER)
    lines = [line for raw in text.splitlines() if (line := " ".join(raw.split()))]
    at = next((number for number, line in enumerate(lines) if not line.endswith(":")), None)
    if at is None:
        return "", False
    line, ended = _unquoted(_LIST_MARK.sub("", lines[at])), draw.ended or at + 1 < len(lines)
    end = _SENTENCE_END.search(line)
    sentence = _unquoted(line[: end.end()] if end else line)
    return _SPACE_BEFORE_MARK.sub(r"\1", sentence), end is not None or ended


def fault(sentence: str, whole: bool, names: Sequence[str], others: Sequence[str], instruction: str) -> str | None:
    """Why a sentence is no prompt for the label of `names`; None for a good one."""
    found = words(sentence)
    own = [words(name) for name in names]
    if _MARKUP.search(sentence) or any(unicodedata.category(character)[0] == "C" for character in sentence):
        return MARKUP
    if _TALK.match(sentence):
        return TALK
    if len(found) < MIN_WORDS:
        return SHORT
    if tokens(sentence) > MAX_TOKENS:
        return LONG
    if not whole or not _complete(sentence):
        return CUT
    if _loops(found):
        return LOOP
    if _echoes(found, words(instruction)):
        return ECHO
    if not any(_positions(found, name) for name in own):
        return UNNAMED
    rest = _without(found, own)
    if any(_positions(rest, words(other)) for other in others):
        return OTHER_LABEL
    return None


def _unquoted(text: str) -> str:
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text


def _complete(sentence: str) -> bool:
    if not (sentence[0].isalnum() or sentence[0] in "\"'("):
        return False
    if sentence.endswith(("...", ",", ";", ":", "-", "(")) or _HANGING.search(sentence):
        return False
    return sentence.count('"') % 2 == 0 and sentence.count("(") == sentence.count(")")


def _loops(found: Sequence[str]) -> bool:
    """Whether three words in a row come twice, or one word three times in a row."""
    threes = list(zip(found, found[1:], found[2:], strict=False))
    return len(set(threes)) < len(threes) or any(len(set(three)) == 1 for three in threes)


def _echoes(found: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether the sentence stands in the instruction, or most of an instruction of some length in the sentence."""
    if _positions(asked, found):
        return True
    run = -(-len(asked) * 4 // 5)
    return len(asked) > MIN_WORDS and any(_positions(found, asked[at : at + run]) for at in range(len(asked) - run + 1))


def _positions(found: Sequence[str], name: Sequence[str]) -> list[int]:
    """Where the words of a name stand in a text, its last word also in the plural. None for a name without words."""
    if not name:
        return []
    *before, last = name
    forms = {last, f"{last}s", f"{last}es", f"{last[:-1]}ies"}
    return [
        at
        for at in range(len(found) - len(before))
        if list(found[at : at + len(before)]) == before and found[at + len(before)] in forms
    ]


def _without(found: Sequence[str], names: Iterable[Sequence[str]]) -> list[str]:
    """The words less those that belong to one of the names; a mark in their place keeps the rest apart."""
    named = {at + step for name in names for at in _positions(found, name) for step in range(len(name))}
    return ["" if at in named else word for at, word in enumerate(found)]
