"""A prompt set as it is made: every label's prompts by where they come from, and the commented file of them.

Comments tell people what a program would not need: how the set was made, and which sense of a word WordNet's part of it
means.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.config.synthesis import Prompts
from gptfl_dist.synthesis.prompts import fill_templates
from gptfl_dist.synthesis.wordnet import Meaning


@dataclass(frozen=True)
class LabelPrompts:
    """The prompts of one label: from templates, from the same templates with what WordNet knows, and sentences."""

    label: str
    from_templates: tuple[str, ...]
    from_wordnet: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    meaning: Meaning | None = None

    @property
    def prompts(self) -> list[str]:
        """All of them, without duplicates."""
        return list(dict.fromkeys((*self.from_templates, *self.from_wordnet, *self.sentences)))


def wordnet_prompts(prompts: Prompts, label: str, meaning: Meaning) -> tuple[str, ...]:
    """The templates filled with each other name of a label, and with the label and its definition."""
    names = list(meaning.other_names)
    if meaning.sense.short_definition:
        names.append(f"{label}, {meaning.sense.short_definition}")
    return tuple(dict.fromkeys(prompt for name in names for prompt in fill_templates(prompts, name)))


def prompt_set_text(made: Sequence[str], labels: Iterable[LabelPrompts]) -> str:
    """The prompt set as a file that `read_prompt_set` reads; `made` are lines that tell how it was made."""
    parts = [
        "Prompts by label: what the generator is given, as it stands here. Read it, delete what does not fit, add your",
        "own; each label keeps at least one. Images that were made from other prompts are not reused.",
        "",
        *made,
    ]
    text = _comment(parts)
    for entry in labels:
        text += "\n" + _comment(_notes(entry)) + dump_yaml({entry.label: entry.prompts}, width=float("inf"))
    return text


def _notes(entry: LabelPrompts) -> list[str]:
    counts = {"from templates": len(entry.from_templates), "with WordNet": len(entry.from_wordnet)}
    counts["sentences"] = len(entry.sentences)
    notes = [f"{entry.label}: {', '.join(f'{count} {what}' for what, count in counts.items() if count)}"]
    if entry.meaning is not None:
        senses, chosen = entry.meaning.senses, entry.meaning.chosen
        another = f"; another: --sense {shlex.quote(f'{entry.label}=NUMBER')}" if len(senses) > 1 else ""
        notes.append(f"WordNet: sense {chosen + 1} of {len(senses)}{another}")
        for at, sense in enumerate(senses):
            mark = ">" if at == chosen else " "
            notes.append(f"{mark} {at + 1} {', '.join(sense.names)}: {sense.definition}")
    return notes


def _comment(lines: Iterable[str]) -> str:
    """Lines as comments; a character that would end the comment or that YAML forbids becomes a question mark."""
    printable = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "".join(f"# {line}".rstrip() + "\n" for line in printable)
