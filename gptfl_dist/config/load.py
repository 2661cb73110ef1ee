"""From a YAML file to a validated model, with every error at its line, column and setting.

A file is read into plain values (`document`), validated strictly by the models, and its relative paths are resolved
against its own folder. All that is wrong with a file is said at once, in the order of the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from gptfl_dist.config.base import Section
from gptfl_dist.config.document import (
    EXPERIMENT_HINT,
    HINT,
    OPERATOR_HINT,
    SILO_HINT,
    Document,
    Keys,
    child_of,
    describe,
    dump_yaml,
    mapping_items,
    read_document,
)
from gptfl_dist.config.experiment import ExperimentFile, Settings
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import ConfigError

_S = TypeVar("_S", bound=Section)

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section of keys",
    "float_type": "a number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a section of keys",
    "string_type": "text",
    "too_short": "a list of at least {min_length}",
}


File = FederationFile | SiloFile | OperatorFile | ExperimentFile

_KINDS: dict[type[File], str] = {
    FederationFile: "federation",
    SiloFile: "silo",
    OperatorFile: "operator",
    ExperimentFile: "experiment",
}
_HINTS: dict[type[Section], str] = {
    SiloFile: SILO_HINT,
    OperatorFile: OPERATOR_HINT,
    ExperimentFile: EXPERIMENT_HINT,
}
_TAKEN_BY = {
    "federation": "`gptfl run`, `gptfl coordinator`, `gptfl generate`, `gptfl pretrain`, `gptfl credentials` and "
    "`gptfl check`",
    "silo": "`gptfl silo` and `gptfl check`, and for `file` of an entry under silos in the federation file",
    "experiment": "`gptfl experiment`",
    "operator": "`gptfl status`, `gptfl silos`, `gptfl pause` and the like, which ask the coordinator over the network",
}


def load_federation(path: Path) -> FederationFile:
    """The federation file at `path`, its paths resolved against its folder. Raises ConfigError."""
    return _load(path, FederationFile)


def load_silo(path: Path) -> SiloFile:
    """The silo file at `path`, its paths resolved against its folder. Raises ConfigError."""
    return _load(path, SiloFile)


def load_operator(path: Path) -> OperatorFile:
    """The operator file at `path`, its paths resolved against its folder. Raises ConfigError."""
    return _load(path, OperatorFile)


def load_experiment(path: Path) -> ExperimentFile:
    """The experiment file at `path`, its paths resolved against its folder. Raises ConfigError."""
    return _load(path, ExperimentFile)


def federation_of(settings: Settings, where: str, document: Document) -> FederationFile:
    """A federation file of these settings; `where` is what messages call them.

    `document` has those of them that a user gave, where they stand; paths are resolved against its file's folder.
    Raises ConfigError.
    """
    try:
        file = FederationFile.model_validate_json(json.dumps(settings, allow_nan=False), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        elsewhere = [_in_words(one) for one in errors if not _stands_in(document.root, one)]
        if elsewhere:
            raise ConfigError(f"{where}: {'; '.join(elsewhere)}", hint=HINT) from None
        _report(document, FederationFile, error)
        raise ConfigError(document.error().message, hint=f"It is so in {where}. {HINT}") from None
    return _resolved(file, document.file.absolute().parent)


def kind_of(value: object) -> type[File] | None:
    """The kind of file that has most of the keys of these settings, among several the one that lacks least.

    None where only keys are known that every kind has, or nothing tells two kinds apart.
    """
    keys = set(value) if isinstance(value, dict) else set()
    scores = {}
    for kind in _KINDS:
        lacking = sum(field.is_required() and name not in keys for name, field in kind.model_fields.items())
        scores[kind] = len(keys & set(kind.model_fields)), -lacking
    best = max(scores.values())
    found = [kind for kind, score in scores.items() if score == best]
    common = set.intersection(*(set(kind.model_fields) for kind in _KINDS))
    return found[0] if len(found) == 1 and keys & set(found[0].model_fields) > common & keys else None


def to_yaml(file: File) -> str:
    """The text of a file that loads back equal (relative paths: when it is written into the same folder)."""
    return dump_yaml(file.model_dump(mode="json"))


def _load(path: Path, kind: type[_S]) -> _S:
    document = read_document(path, hint=_HINTS.get(kind, HINT))
    try:
        # Through JSON, because strict validation takes a path written as text only from there; strict, because a
        # quoted "3" is no number and the text yes is no truth value.
        file = kind.model_validate_json(json.dumps(document.value, allow_nan=False), strict=True)
    except ValidationError as error:
        found = kind_of(document.value)
        if found is not None and found is not kind:
            right = next(name for each, name in _KINDS.items() if each is kind)
            raise ConfigError(
                f"{path} looks like {_with_article(_KINDS[found])} file, expected {_with_article(right)} file",
                hint=f"{_KINDS[found]} files are for {_TAKEN_BY[_KINDS[found]]}",
            ) from None
        _report(document, kind, error)
        raise document.error() from None
    if document.problems:
        raise document.error()
    return _resolved(file, path.absolute().parent)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _resolved(section: _S, folder: Path) -> _S:
    changes = {}
    for name, value in section:
        resolved = _resolve(name, value, folder)
        if resolved != value:
            changes[name] = resolved
    return section.model_copy(update=changes) if changes else section


def _resolve(name: str, value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, Section):
        return _resolved(value, folder)
    if isinstance(value, list):
        return [_resolve(name, item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(name, item, folder) for key, item in value.items()}
    if name.endswith("source") and isinstance(value, str) and value.startswith(("./", "../")):
        return str(folder / value)
    return value


@dataclass(frozen=True)
class _Place:
    """Where an error of pydantic stands: the deepest node on its way, the keys to it, and what the file lacks."""

    node: yaml.Node
    keys: Keys
    absent: Keys
    union: Keys | None
    """The keys of the setting whose alternatives this error is one of, if it is."""


def _stands_in(root: yaml.Node, detail: Any) -> bool:
    """Whether what one of pydantic's errors is about is set there."""
    if detail["loc"]:
        return bool(_find(root, detail["loc"]).keys)
    return _named_setting(root, (), _in_words(detail)) is not None


def _in_words(detail: Any) -> str:
    """An error without a place in a file."""
    setting = ".".join(map(str, detail["loc"]))
    said = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
    return f"{setting}: {said}" if setting else str(said)


def _report(document: Document, kind: type[Section], error: ValidationError) -> None:
    """Turn pydantic's errors into problems of the document, the alternatives of one setting into one."""
    known = {(problem.line, problem.column) for problem in document.problems}
    alternatives: dict[Keys, list[tuple[_Place, Any]]] = {}
    for detail in error.errors(include_url=False, include_input=False):
        place = _find(document.root, detail["loc"])
        mark = (_key_node(document.root, place.keys) if detail["type"] == "extra_forbidden" else place.node).start_mark
        if (mark.line + 1, mark.column + 1) in known and not place.absent:
            continue  # a value that is no value at all was reported when it was read
        if place.union is not None:
            alternatives.setdefault(place.union, []).append((place, detail))
        else:
            _report_one(document, kind, place, [detail])
    for tried in alternatives.values():
        # The alternative that got furthest into the setting is the one that was meant.
        depth = max(len(place.keys) for place, _ in tried)
        furthest: dict[Keys, list[tuple[_Place, Any]]] = {}
        for place, detail in tried:
            if len(place.keys) == depth:
                furthest.setdefault(place.keys, []).append((place, detail))
        for group in furthest.values():
            _report_one(document, kind, group[0][0], [detail for _, detail in group])


def _report_one(document: Document, kind: type[Section], place: _Place, details: Sequence[Any]) -> None:
    node, keys, detail = place.node, place.keys, details[0]
    if detail["type"] == "missing":
        document.report(node, (*keys, *place.absent), f"missing, expected {_kind_of(kind, (*keys, *place.absent))}")
    elif detail["type"] == "extra_forbidden":
        text = _unknown_key(str(keys[-1]), _section_at(kind, keys[:-1]))
        document.report(_key_node(document.root, keys), keys, text)
    else:
        text = _explain(kind, place, details)
        named = None if text.startswith("found ") else _named_setting(document.root, keys, text)
        document.report(named.node if named else node, named.keys if named else keys, text)


def _explain(kind: type[Section], place: _Place, details: Sequence[Any]) -> str:
    """What was found and what was expected; or, for settings that do not go together, what the model says of them."""
    expected = []
    for detail in details:
        if detail["type"] == "value_error":
            said = str(detail["ctx"]["error"])
            if not said.startswith("expected "):
                return said
            expected.append(said.removeprefix("expected "))
        else:
            expected.append(_expected(kind, place.keys, detail))
    text = f"found {describe(place.node)}, expected {' or '.join(dict.fromkeys(expected))}"
    if details[0]["type"] == "string_type" and isinstance(place.node, yaml.ScalarNode) and place.node.value:
        text += f': quote it as "{place.node.value}"'
    return text


def _expected(kind: type[Section], keys: Keys, detail: Any) -> str:
    if detail["type"] == "string_pattern_mismatch":
        section, name = _section_at(kind, keys[:-1]), keys[-1]
        field = section.model_fields.get(str(name)) if section else None
        return (field.description if field else None) or f"text that matches {detail['ctx']['pattern']}"
    template = _EXPECTED.get(detail["type"])
    if template is None:
        message: str = detail["msg"]
        return message.removeprefix("Input should be ")
    return template.format(**detail.get("ctx", {}))


def _unknown_key(key: str, section: type[Section] | None) -> str:
    valid = list(section.model_fields) if section else []
    nearest = difflib.get_close_matches(key, valid, n=3, cutoff=0.5)
    if nearest:
        return f"unknown key, the nearest valid {'keys are' if len(nearest) > 1 else 'key is'} {', '.join(nearest)}"
    return f"unknown key, valid keys are {', '.join(valid)}"


def _find(root: yaml.Node, location: Iterable[str | int]) -> _Place:
    """Follow the location of one of pydantic's errors. Parts that name an alternative of a type are passed over."""
    node = root
    keys: Keys = ()
    absent: Keys = ()
    union: Keys | None = None
    for part in location:
        child = child_of(node, part)
        if child is not None:
            node, keys = child, (*keys, part)
        elif isinstance(node, yaml.MappingNode):
            absent = (*absent, part)
        elif union is None:
            union = keys
    return _Place(node, keys, absent, union)


def _key_node(root: yaml.Node, keys: Keys) -> yaml.Node:
    """The node of a key that stands in the file."""
    parent = _find(root, keys[:-1]).node
    assert isinstance(parent, yaml.MappingNode)
    return next(key for key, _ in mapping_items(parent) if key.value == keys[-1])


def _named_setting(root: yaml.Node, keys: Keys, text: str) -> _Place | None:
    """The setting that a model's message begins with (such as federation.cohort), in the section or from the root."""
    named = tuple(text.split(maxsplit=1)[0].split("."))
    for start in (keys, ()):
        place = _find(root, (*start, *named))
        if place.keys == (*start, *named):
            return place
    return None


def _section_at(kind: type[Section], keys: Keys) -> type[Section] | None:
    section: type[Section] | None = kind
    named_by_user = False  # the next key, where it is one of a mapping's own
    for key in keys:
        if isinstance(key, int):
            continue
        if named_by_user:
            named_by_user = False
            continue
        field = section.model_fields.get(key) if section else None
        section = _section_in(field.annotation) if field else None
        named_by_user = field is not None and get_origin(field.annotation) is dict
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section_in(part))), None)


def _kind_of(kind: type[Section], keys: Keys) -> str:
    """What a missing setting should be, in words."""
    section = _section_at(kind, keys[:-1])
    field = section.model_fields.get(str(keys[-1])) if section else None
    if field is None:
        return "a value"
    if field.description:
        return field.description
    if field.annotation is str:
        return "text"
    if field.annotation is Path:
        return "a path"
    return "a list" if get_origin(field.annotation) is list else "a value"
