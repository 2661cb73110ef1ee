"""Making a prompt set: templates, WordNet and a text model put together into one file that people read and edit.

Every refusal that can be known beforehand comes before the text model is loaded; the file is written at the very end.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptfl_dist import __version__
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, GeneratorError, Interrupted
from gptfl_dist.files import write_file
from gptfl_dist.observe.progress import progress
from gptfl_dist.run.check.common import writable
from gptfl_dist.synthesis.generator import unknown_words
from gptfl_dist.synthesis.prompt_set import LabelPrompts, prompt_set_text, wordnet_prompts
from gptfl_dist.synthesis.prompts import fill_templates
from gptfl_dist.synthesis.quality import Selection, select
from gptfl_dist.synthesis.wordnet import Meaning, WordNet, find_meanings

DEFAULT_INSTRUCTION = "Write a caption of one sentence for a photo of a {label}."
_FILE_NAME = "prompts.yaml"
_FEW = 5


@dataclass(frozen=True)
class Writing:
    """How a text model is asked: by an instruction with {label}, so often for each label, at a temperature."""

    model: str
    instruction: str
    draws: int
    keep: int
    temperature: float


@dataclass(frozen=True)
class PromptSet:
    """What was made: the file, how many prompts a label has, how many sentences were dropped for which reason."""

    file: Path
    prompts: dict[str, int]
    dropped: dict[str, int]
    next: str


def make_prompt_set(
    path: Path,
    out: Path | None,
    *,
    writing: Writing | None,
    wordnet: Path | None,
    senses: Sequence[str],
    force: bool,
    command: str,
    say: Callable[[str], None],
) -> PromptSet:
    """Writes the prompt set of the federation file at `path`, to `out` or where the file names it.

    `senses` are texts such as "crane=2"; `command` is told in the file; `say` is told what the user should look at.
    Raises ConfigError, DataError (WordNet), GeneratorError (the text model), StorageError, Interrupted; then nothing is
    written.
    """
    file = load_federation(path)
    target = out or file.synthesis.prompts.file or path.parent / _FILE_NAME
    _require_free(target, force)
    writable(target.absolute().parent)
    if writing is not None and "{label}" not in writing.instruction:
        raise ConfigError(
            f"--instruction is {writing.instruction!r}, which has no {{label}}", hint="write {label} in it"
        )
    if file.synthesis.prompts.file is not None:
        say(f"{path} names no templates, so the default is taken: {file.synthesis.prompts.templates[0]}")
    meanings = _meanings(file, wordnet, senses, say)
    try:
        written, told = ({}, []) if writing is None else _write(file, writing, meanings)
    except Interrupted:
        raise Interrupted("stopped; nothing was written") from None
    if writing is not None:
        _judge(written, writing, say)
    labels = [
        LabelPrompts(
            label,
            fill_templates(file.synthesis.prompts, label),
            wordnet_prompts(file.synthesis.prompts, label, meanings[label]) if label in meanings else (),
            tuple(written[label].kept) if label in written else (),
            meanings.get(label),
        )
        for label in file.labels
    ]
    unknown = unknown_words(file.synthesis.generator, (text for entry in labels for text in entry.prompts))
    if unknown:
        say(
            f"the embedded generator has never read {', '.join(unknown[:8])}{' ...' if unknown[8:] else ''}: with it "
            "these prompts give wrong images; name another under synthesis.generator.source"
        )
    made = [f"Made by gptfl {__version__}: {command}", *_sources(file, wordnet), *told]
    _require_free(target, force)  # once more: a text model may have written for hours
    write_file(target, prompt_set_text(made, labels))
    counts = {entry.label: len(entry.prompts) for entry in labels}
    return PromptSet(target, counts, _dropped(written), _next(path, file, target))


def _next(path: Path, file: FederationFile, target: Path) -> str:
    """What the user does with the prompt set."""
    named = file.synthesis.prompts.file
    if named is not None and named.resolve() == target.resolve():
        return "Read and edit it."
    relative = os.path.relpath(target.absolute(), path.absolute().parent)
    return (
        f"Read and edit it, then name it in {path}, in place of templates and styles: "
        f"synthesis: {{prompts: {{file: {relative}}}}}"
    )


def _require_free(target: Path, force: bool) -> None:
    if target.is_dir():
        raise ConfigError(f"{target} is a folder, expected a file to write", hint="name another with --out")
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already", hint="name another with --out, or overwrite it with --force")


def _meanings(
    file: FederationFile, wordnet: Path | None, senses: Sequence[str], say: Callable[[str], None]
) -> dict[str, Meaning]:
    wanted = _wanted(senses, file.labels)
    if wordnet is None:
        if wanted:
            raise ConfigError("--sense is given without --wordnet", hint="name the folder of a WordNet database")
        return {}
    meanings = find_meanings(WordNet(wordnet), file.labels, wanted)
    unknown = [label for label in file.labels if label not in meanings]
    if unknown:
        say(f"WordNet has no noun {', '.join(unknown)}: nothing is added from it there")
    return meanings


def _wanted(senses: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    wanted: dict[str, int] = {}
    for text in senses:
        label, equals, number = text.rpartition("=")
        if not equals or not number.isdecimal():
            raise ConfigError(f"--sense is {text}, expected LABEL=NUMBER", hint="such as --sense crane=2")
        if label not in labels:
            raise ConfigError(f"--sense {text}: there is no label {label}", hint=f"the labels are {', '.join(labels)}")
        wanted[label] = int(number)
    return wanted


def _write(
    file: FederationFile, writing: Writing, meanings: Mapping[str, Meaning]
) -> tuple[dict[str, Selection], list[str]]:
    """Has the text model write for every label, and selects; also lines that say by which model and how."""
    from gptfl_dist.learning.seeding import derive_seed
    from gptfl_dist.synthesis.generator import place
    from gptfl_dist.synthesis.sentences import TextModel

    model = TextModel(writing.model, place(file.synthesis.generator).device)
    written = {}
    with progress("prompts", writing.draws * len(file.labels), "sentences") as bar:
        for number, label in enumerate(file.labels):
            meaning = meanings.get(label)
            definition = meaning.sense.short_definition if meaning else ""
            name = label.replace("_", " ")  # a model that copies an underscore writes what the filter drops
            asked = writing.instruction.replace("{label}", f"{name} ({definition})" if definition else name)

            def report(done: int, before: int = number * writing.draws) -> None:
                bar.update(before + done)

            drawn = model.draw(
                asked,
                writing.draws,
                writing.temperature,
                derive_seed(file.seed, "sentences", label),
                report,
            )
            names = (label, *(meaning.other_names if meaning else ()))
            others = [other for other in file.labels if other != label]
            written[label] = select(drawn, names, others, asked, writing.keep)
    told = [
        f"text model: {model.description}",
        f"instruction: {writing.instruction}",
        f"{writing.draws} draws a label at temperature {writing.temperature:g}, at most {writing.keep} kept",
    ]
    return written, told


def _judge(written: Mapping[str, Selection], writing: Writing, say: Callable[[str], None]) -> None:
    """Tells of labels with few sentences. Raises GeneratorError where no label has one."""
    hint = (
        "look at what it writes, and try another --instruction, a larger model, another --temperature or more --draws"
    )
    enough = min(_FEW, writing.keep, writing.draws)
    told = [
        f"{label}: {len(chosen.kept)} of {writing.draws} sentences kept{_why(chosen)}"
        for label, chosen in written.items()
        if len(chosen.kept) < enough
    ]
    lines = "\n  ".join(told)
    if not any(chosen.kept for chosen in written.values()):
        raise GeneratorError(f"the text model {writing.model} wrote no sentence that can be used\n  {lines}", hint=hint)
    if told:
        say(f"few sentences for some labels:\n  {lines}\n  {hint}")


def _why(chosen: Selection) -> str:
    """The most frequent fault, with the first sentence that had it."""
    reason, count = chosen.dropped.most_common(1)[0]
    example = chosen.examples[reason]
    shown = example if len(example) <= 100 else example[:100] + "..."
    return f"; {count} dropped: {reason}" + (f", such as {shown!r}" if shown else "")


def _dropped(written: Mapping[str, Selection]) -> dict[str, int]:
    """How many sentences of all labels were dropped for which reason, the most frequent first."""
    total: Counter[str] = Counter()
    for chosen in written.values():
        total += chosen.dropped
    return dict(total.most_common())


def _sources(file: FederationFile, wordnet: Path | None) -> list[str]:
    prompts = file.synthesis.prompts
    return [
        f"seed: {file.seed}",
        f"templates: {'; '.join(prompts.templates)}",
        *([f"styles: {'; '.join(prompts.styles)}"] if prompts.styles else []),
        *([f"WordNet: {wordnet}"] if wordnet is not None else []),
    ]
