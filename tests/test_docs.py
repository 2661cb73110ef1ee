"""The documentation is true: what README.md and docs/ name exists, and nothing that must be named is left out.

A YAML block says in its first line what it is: ```yaml federation, silo or experiment for a whole file, with `part`
after it for some of its settings.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from gptfl_dist import errors
from gptfl_dist.cli.main import app
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_experiment, load_federation, load_silo
from gptfl_dist.config.silo import Policy, SiloFile
from gptfl_dist.observe.summary import FederatedArm, Summary, SyntheticArm
from gptfl_dist.run.audit import EVENTS
from gptfl_dist.run.experiment.plan import Cell, groups_of, settings_of
from gptfl_dist.run.settings import MAY_CHANGE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = ROOT / "docs" / "reference.md"


def leaves(group: Any, above: str = "") -> dict[str, Any]:
    """All commands by name, those of a group with the group's name before theirs."""
    found = {}
    for name, command in group.commands.items():
        inner = hasattr(command, "commands")
        found |= leaves(command, f"{above}{name} ") if inner else {f"{above}{name}": command}
    return found


COMMANDS = leaves(typer.main.get_command(app))
LEAST: dict[str, dict[str, Any]] = {
    "federation": {"name": "n", "labels": ["a", "b"], "silos": [{"name": "s"}]},
    "silo": {"name": "s"},
    "experiment": {
        "name": "n",
        "labels": ["a", "b"],
        "data": {"path": "train.npz"},
        "test_data": "test.npz",
        "splits": {"uneven": {"silos": 2, "alpha": 0.1}},
    },
}
SUFFIXES = {"html", "jsonl", "json", "log", "md", "npz", "pem", "png", "py", "safetensors", "sqlite", "yaml"}
FOREIGN = (
    r"/(home|root|tmp|work|Users)/",
    r"\b[\w-]+\.local\b",
    r"pypi\.org|pythonhosted\.org|npmjs|anaconda\.org|huggingface\.co|ghcr\.io|docker\.io|quay\.io|pytorch\.org",
)


@dataclass(frozen=True)
class Block:
    """A fenced code block: the words after the fence, the text, and where it stands."""

    kind: tuple[str, ...]
    text: str
    where: str


def blocks(page: Path) -> Iterator[Block]:
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        line = page.read_text()[: match.start()].count("\n") + 1
        yield Block(tuple(match[1].split()), match[2], f"{page.name}:{line}")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The pieces of inline code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def section(heading: str) -> str:
    """A part of the reference, from its heading to the next of the same depth or above."""
    depth = heading.index(" ")
    match = re.search(
        rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{depth}}} |\Z)", REFERENCE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert match is not None, f"{REFERENCE.name} has no {heading!r}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row of a text, without heads and rules."""
    lines = re.findall(r"^\|(.+)\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    rules = [number for number, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for number, row in enumerate(cells) if number not in rules and number + 1 not in rules]


def named(text: str) -> set[str]:
    """All inline code in the first cells of a text's tables."""
    return {name for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])}


def arguments(words: list[str]) -> Iterator[list[str]]:
    """What follows `gptfl` in each call of it, up to the end of a shell command."""
    for start, word in enumerate(words):
        if word == "gptfl":
            rest = words[start + 1 :]
            stop = next((at for at, other in enumerate(rest) if other in {"|", "&&", ";", ">", ">>", "&"}), len(rest))
            yield rest[:stop]


def command_in(words: list[str]) -> tuple[str, list[str]]:
    """The command that words begin with, and what follows it."""
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:length]), words[length:]


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_block_parses(page: Path) -> None:
    for block in blocks(page):
        if block.kind != ("sh",):
            continue
        text = re.sub(r"<<'END'.*?^END$", "", block.text, flags=re.MULTILINE | re.DOTALL)
        for line in text.splitlines():
            for words in arguments(shlex.split(line, comments=True)):
                if words == ["--version"]:
                    continue
                name, rest = command_in(words)
                assert name in COMMANDS, f"{block.where}: {line}"
                COMMANDS[name].make_context(f"gptfl {name}", rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_in_the_text_exists(page: Path) -> None:
    known = {name for command in COMMANDS.values() for name in options_of(command)} | {"--version", "-h", "--help"}
    foreign = {"--oversubscribe", "--cpus-per-task", "--no-requeue"}
    for span in spans(page):
        for words in arguments(span.split()):
            if words and words[0] not in {"COMMAND", "--version"}:
                name, rest = command_in(words)
                assert name in COMMANDS, span
                assert {word for word in rest if word.startswith("--")} <= options_of(COMMANDS[name]), span
        if span.startswith("--") and span.split()[0] not in foreign:
            assert span.split()[0] in known, span


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        code = "\n".join([*spans(page), *(block.text for block in blocks(page))])
        assert set(re.findall(r"^make ([a-z]+)", code, re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_names_every_option(name: str) -> None:
    visible = {
        option
        for parameter in COMMANDS[name].params
        if not getattr(parameter, "hidden", False)
        for option in parameter.opts
        if option.startswith("--")
    }
    assert named(section(f"### gptfl {name}")) == visible - {"--help"}


def test_the_reference_names_every_command() -> None:
    found = re.findall(r"^### gptfl (\S+(?: \S+)?)$", REFERENCE.read_text(), re.MULTILINE)
    assert sorted(found) == sorted(COMMANDS)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT) or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_map_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"}


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {row[1].strip("`"): int(row[0]) for row in rows(section("## Exit codes")) if row[1]}
    assert told == {name: getattr(errors, name).exit_code for name in errors.__all__}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_yaml_block_is_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.kind[:1] != ("yaml",):
            continue
        assert block.kind[1:] in {(kind, *part) for kind in LEAST for part in ((), ("part",))}, block.where
        text = block.text
        if block.kind[2:]:
            least = {**LEAST["silo"], "data": {"path": "data"}} if block.kind[1] == "silo" else LEAST[block.kind[1]]
            text = yaml.safe_dump({**least, **yaml.safe_load(text)})
        path = tmp_path / "file.yaml"
        path.write_text(text)
        if block.kind[1] == "experiment":
            file = load_experiment(path)
            for group in groups_of(file):
                FederationFile.model_validate(settings_of(file, Cell(group, 0), 0, LEAST["federation"]["silos"]))
        else:
            (load_silo if block.kind[1] == "silo" else load_federation)(path)


def has_setting(kind: type[BaseModel], keys: list[str]) -> bool:
    """Whether a dotted name leads to a setting."""
    field = kind.model_fields.get(keys[0])
    if field is None or len(keys) == 1:
        return field is not None
    inner = [part for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(part, type)]
    return any(issubclass(part, BaseModel) and has_setting(part, keys[1:]) for part in inner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_in_the_text_exists(page: Path) -> None:
    sections = {*FederationFile.model_fields, *SiloFile.model_fields}
    for span in spans(page):
        match = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:: .*)?", span)
        if match is None or (keys := match[1].split("."))[0] not in sections or keys[-1] in SUFFIXES:
            continue
        assert any(has_setting(kind, keys) for kind in (FederationFile, SiloFile, Summary)), span


def test_the_reference_names_every_section_of_the_files() -> None:
    assert named(section("## The federation file")) == set(FederationFile.model_fields)
    of_silo = named(section("## The silo file").partition("\n### ")[0])
    assert of_silo == set(SiloFile.model_fields)


def test_the_reference_gives_the_policy_with_its_defaults() -> None:
    told = {row[0].strip("`"): row[1] for row in rows(section("### Policy"))}
    told["metrics"] = f"[{told['metrics']}]"
    shown = "\n".join(f"{name}: {value}" for name, value in told.items())
    assert set(told) == set(Policy.model_fields)
    assert Policy.model_validate(yaml.safe_load(shown)) == Policy()


def test_the_reference_gives_every_field_of_a_summary() -> None:
    whole, arm = section("## summary.json").split("Each of `arms.fedavg_random`")
    synthetic = {f"arms.synthetic_only.{name}" for name in SyntheticArm.model_fields}
    assert named(whole) == (set(Summary.model_fields) - {"arms"}) | synthetic
    assert named(arm) == set(FederatedArm.model_fields)


def test_the_reference_gives_every_kind_of_entry_of_the_audit_log() -> None:
    text = section("## The audit log")
    assert {name for name in named(text) if " " in name} | {"log begun", "checkpoint", "refused"} == EVENTS
    assert all(f"`{kind}`" in text for kind in EVENTS)


def test_the_reference_gives_every_setting_that_may_change_in_mid_run() -> None:
    assert named(section("### What may change in mid-run")) == MAY_CHANGE


def test_every_test_in_the_text_exists() -> None:
    named_tests = {span for page in PAGES for span in spans(page) if ".py::" in span}
    assert len(named_tests) > 20
    for test in named_tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_every_module_in_the_text_exists() -> None:
    for page in PAGES:
        for span in spans(page):
            if re.fullmatch(r"[a-z_]+/[a-z_/]+\.py", span):
                assert (ROOT / "gptfl_dist" / span).exists(), f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_names_a_machine_or_a_registry(page: Path) -> None:
    text = page.read_text()
    assert [match[0] for pattern in FOREIGN for match in re.finditer(pattern, text)] == []
