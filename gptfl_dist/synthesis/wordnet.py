"""Other names and a definition of a label from a WordNet database folder, offline.

Read are `index.noun` and `data.noun`, and `noun.exc` where it is there, in the format of wndb(5WN): a line of the index
gives, by estimated frequency, the byte offsets of a word's senses in the data file; a line there holds the names of one
sense, its relations and its gloss. Our own reader, because NLTK's also demands files (`lexnames`) that Debian's
wordnet-base does not install, and nouns are all that labels need.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptfl_dist.errors import ConfigError, DataError
from gptfl_dist.synthesis.quality import fingerprint

_HINT = (
    "Name the folder that holds index.noun and data.noun; Debian's package wordnet-base has it in /usr/share/wordnet."
)
_PLURALS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
_INSTANCE = "@i"
_REMARK = re.compile(r"\s*\([^()]*\)")


@dataclass(frozen=True)
class Sense:
    """One meaning of a noun: its names as people write them, and its definition.

    `instance`: it is a single thing or person (Stephen Crane), no kind of thing.
    """

    offset: int
    names: tuple[str, ...]
    definition: str
    instance: bool

    @property
    def short_definition(self) -> str:
        """The first part of the definition without remarks in brackets, for a prompt; may be empty."""
        return " ".join(_REMARK.sub("", self.definition).partition(";")[0].split())


@dataclass(frozen=True)
class Meaning:
    """What WordNet knows of a label: its senses, the position of the one that is meant, and other names for it."""

    senses: tuple[Sense, ...]
    chosen: int
    other_names: tuple[str, ...]

    @property
    def sense(self) -> Sense:
        """The sense that is meant."""
        return self.senses[self.chosen]


class WordNet:
    """The nouns of a WordNet database."""

    def __init__(self, folder: Path) -> None:
        """Reads the files (20 MB for WordNet 3.0). Raises DataError where they are not there."""
        self._folder = folder
        self._index, self._data = (self._read(folder / name) for name in ("index.noun", "data.noun"))
        exceptions = folder / "noun.exc"
        lines = self._read(exceptions).decode("utf-8", "replace").splitlines() if exceptions.exists() else []
        self._irregular = {first: bases for first, *bases in map(str.split, filter(str.strip, lines))}

    @staticmethod
    def _read(file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}", hint=_HINT) from None

    def senses(self, noun: str) -> tuple[Sense, ...]:
        """The senses of a noun, singular or plural, the most frequent first; empty where WordNet has none.

        Raises DataError where the files are damaged.
        """
        for form in self._forms(noun):
            start = self._index.find(b"\n" + form.encode() + b" ") + 1
            if start:
                return tuple(self._sense(offset) for offset in self._offsets(start))
        return ()

    def _forms(self, noun: str) -> list[str]:
        """How the index may write a noun, likely spellings first."""
        plain = "_".join(noun.casefold().split())
        spellings = [plain, plain.replace("-", "_"), plain.replace("_", "-"), re.sub("[-_]", "", plain)]
        singular = [
            base
            for spelling in spellings
            for base in (
                *self._irregular.get(spelling, []),
                *(spelling.removesuffix(end) + new for end, new in _PLURALS if spelling.endswith(end)),
            )
        ]
        return list(dict.fromkeys(form for form in (*spellings, *singular) if form))

    def _offsets(self, start: int) -> list[int]:
        line = self._line(self._index, start)
        try:
            fields = line.split()
            return [int(offset) for offset in fields[6 + int(fields[3]) :]]
        except (ValueError, IndexError):
            raise self._damaged("index.noun", line) from None

    def _sense(self, offset: int) -> Sense:
        line = self._line(self._data, offset)
        try:
            fields, gloss = line.partition(" | ")[0].split(), line.partition(" | ")[2]
            if int(fields[0]) != offset:
                raise ValueError
            count = int(fields[3], 16)
            names = [fields[4 + 2 * at].replace("_", " ") for at in range(count)]
            pointers = fields[5 + 2 * count : 5 + 2 * count + 4 * int(fields[4 + 2 * count]) : 4]
        except (ValueError, IndexError):
            raise self._damaged("data.noun", line) from None
        definition = gloss.partition('; "')[0].strip()
        return Sense(offset, tuple(dict.fromkeys(names)), definition, _INSTANCE in pointers)

    @staticmethod
    def _line(content: bytes, start: int) -> str:
        end = content.find(b"\n", start)
        return content[start : end if end >= 0 else None].decode("utf-8", "replace")

    def _damaged(self, file: str, line: str) -> DataError:
        shown = line if len(line) <= 60 else line[:60] + "..."
        return DataError(f"{self._folder / file} is damaged, or no WordNet file: found {shown!r}", hint=_HINT)


def find_meanings(wordnet: WordNet, labels: Sequence[str], wanted: Mapping[str, int]) -> dict[str, Meaning]:
    """The meaning of every label that WordNet knows.

    Its sense is the one that `wanted` numbers, from 1; else the most frequent that is a kind of thing. Of the sense's
    names those are left out that most often mean something else (machine, for a car), and those that two labels have.
    Raises ConfigError where a number is wanted that is not there.
    """
    known = {label: senses for label in labels if (senses := wordnet.senses(label))}
    chosen = {label: _choose(label, known.get(label, ()), wanted.get(label)) for label in {*known, *wanted}}
    names = {
        label: [
            name for name in known[label][chosen[label]].names if _means(wordnet, name, known[label][chosen[label]])
        ]
        for label in known
    }
    claims = Counter(
        claim for label in labels for claim in {fingerprint(name) for name in (label, *names.get(label, []))}
    )
    meanings = {}
    for label, senses in known.items():
        others = [
            name for name in names[label] if claims[fingerprint(name)] == 1 and fingerprint(name) != fingerprint(label)
        ]
        meanings[label] = Meaning(senses, chosen[label], tuple(others))
    return meanings


def _choose(label: str, senses: Sequence[Sense], wanted: int | None) -> int:
    if wanted is None:
        return next((at for at, sense in enumerate(senses) if not sense.instance), 0)
    if not 1 <= wanted <= len(senses):
        told = [f"{number} ({sense.definition})" for number, sense in enumerate(senses, start=1)]
        raise ConfigError(
            f"--sense {label}={wanted}: WordNet has "
            + (f"the senses {', '.join(told)}" if told else f"no noun {label}"),
            hint="leave it out to take the most frequent sense",
        )
    return wanted - 1


def _means(wordnet: WordNet, name: str, sense: Sense) -> bool:
    """Whether a name most often means this sense."""
    senses = wordnet.senses(name)
    return bool(senses) and senses[_choose(name, senses, None)].offset == sense.offset
