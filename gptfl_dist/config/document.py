"""A YAML file as plain values, with the line and column of each.

PyYAML reads YAML 1.1, where the labels yes, no, on and off are booleans and 1e-3 is text. Here its node tree is read
with the scalars of the YAML 1.2 core schema, so that only true and false are booleans. The tree is converted by hand:
no tag builds an object, a key given twice is an error, and a problem knows its place. What could make reading slow is
refused before it is expanded: files above 1 MiB, aliases, deep nesting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gptfl_dist.errors import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 20
HINT = "`gptfl init` prints a commented file with every setting, its default and its unit."
SILO_HINT = "`gptfl init silo` prints a commented silo file with every setting, its default and its unit."
EXPERIMENT_HINT = "`gptfl init experiment` prints a commented experiment file with every setting and its default."
OPERATOR_HINT = "`gptfl join` writes such a file, and `gptfl init operator` prints a commented one."

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
Keys = tuple[str | int, ...]
"""Where a value stands: the keys and list positions that lead to it from the root."""

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_TRUE = re.compile(r"(?:true|True|TRUE)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_CORE = (
    ("null", _NULL, ["n", "N", "~", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)
_LINE_BREAK = re.compile("[\x85\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Refused(yaml.MarkedYAMLError):
    """The file uses something of YAML that configuration files do not need."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, refusing aliases (which can expand without bound) and deep nesting."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # PyYAML's stubs
        if self.check_event(yaml.AliasEvent):
            raise _Refused(problem="found an alias (*name), expected the value written out", problem_mark=mark)
        if self._depth > MAX_DEPTH:
            raise _Refused(problem=f"found more than {MAX_DEPTH} levels of nesting", problem_mark=mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A text; in quotes where it holds the line breaks of Unicode, which would else be folded into spaces."""
        return self.represent_scalar(_TAG + "str", text, style='"' if _LINE_BREAK.search(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


for _name, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong in a file. `line` and `column` count from 1; `keys` lead to the setting."""

    line: int
    column: int
    keys: Keys
    text: str


@dataclass
class Document:
    """What a file says: its node tree, its values, and the problems that are clear without knowing its settings."""

    file: Path
    root: yaml.Node
    hint: str
    value: Value = None
    problems: list[Problem] = field(default_factory=list)

    def report(self, node: yaml.Node, keys: Keys, text: str) -> None:
        """Add a problem at a node."""
        self.problems.append(Problem(node.start_mark.line + 1, node.start_mark.column + 1, keys, text))

    def error(self) -> ConfigError:
        """All problems in one exception, in the order of the file."""
        return config_error(self.file, self.problems, self.hint)


def read_document(file: Path, *, max_bytes: int = MAX_BYTES, hint: str = HINT) -> Document:
    """Read a YAML file. Raises ConfigError, with `hint`, where it cannot be read or is not YAML."""
    root = _compose(file, _read_text(file, max_bytes, hint), hint)
    document = Document(file, root, hint)
    document.value = _convert(document, root, ())
    return document


def dump_yaml(value: object, *, width: float = 110) -> str:
    """Plain values as a YAML text that `read_document` reads back equal, in lines of about `width` characters."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def describe(node: yaml.Node) -> str:
    """What stands at a node, in a few words for a message."""
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    if isinstance(node, yaml.MappingNode):
        return f"a section of {len(node.value)} keys" if node.value else "an empty section"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    match node.tag.removeprefix(_TAG):
        case "null":
            return f"{text} (nothing)" if text else "nothing"
        case "bool":
            return f"{text} (a truth value)"
        case "int" | "float":
            return f"{text} (a number)"
        case _:
            return f'"{text}" (text)'


def config_error(file: Path, problems: list[Problem], hint: str) -> ConfigError:
    """One exception for all problems of a file, each with its place and setting."""
    lines = []
    for problem in sorted(set(problems), key=lambda p: (p.line, p.column, p.text)):
        setting = dotted(problem.keys)
        lines.append(f"{file}:{problem.line}:{problem.column}: {setting + ': ' if setting else ''}{problem.text}")
    if len(lines) == 1:
        return ConfigError(lines[0], hint=hint)
    return ConfigError("\n  ".join([f"{file} has {len(lines)} errors:", *lines]), hint=hint)


def dotted(keys: Keys) -> str:
    """Keys as people write them: `silos[1].name`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def mapping_items(node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a section in the file's order, without keys that are themselves lists or sections."""
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            yield key, value


def child_of(node: yaml.Node, part: str | int) -> yaml.Node | None:
    """What stands under a key of a section or at a position of a list; None where nothing does."""
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in mapping_items(node) if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item: yaml.Node = node.value[part]
        return item
    return None


def laid_over(document: Document, parts: Iterable[Keys]) -> Document:
    """The sections at these keys laid over each other setting by setting, each setting at its place in the file.

    Those that the file does not have are passed over. Values and problems are not those of the document.
    """
    root = yaml.MappingNode(_TAG + "map", [], document.root.start_mark, document.root.end_mark)
    for keys in parts:
        node: yaml.Node | None = document.root
        for key in keys:
            node = child_of(node, key) if node is not None else None
        if isinstance(node, yaml.MappingNode):
            root = _laid_over(root, node)
    return Document(document.file, root, document.hint)


def _laid_over(under: yaml.MappingNode, over: yaml.MappingNode) -> yaml.MappingNode:
    merged = {key.value: (key, value) for key, value in mapping_items(under)}
    for key, value in mapping_items(over):
        _, old = merged.get(key.value, (None, None))
        if isinstance(old, yaml.MappingNode) and isinstance(value, yaml.MappingNode):
            value = _laid_over(old, value)
        merged[key.value] = key, value
    return yaml.MappingNode(over.tag, list(merged.values()), over.start_mark, over.end_mark)


def _read_text(file: Path, max_bytes: int, hint: str) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file", hint=f"Check the path. {hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: found a folder, expected a YAML file", hint="Name the file in it.") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}", hint="Check the path and its rights.") from None
    except ValueError as error:  # a path with a NUL character
        raise ConfigError(f"{str(file)!r}: no file can have this name: {error}") from None
    if len(raw) > max_bytes:
        raise ConfigError(
            f"{file}: found more than {max_bytes} bytes, expected at most {max_bytes >> 20} MiB", hint=hint
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        text = f"found the byte 0x{raw[error.start]:02x}, expected text in UTF-8"
        raise config_error(file, [Problem(line, column, (), text)], hint) from None


def _compose(file: Path, text: str, hint: str) -> yaml.Node:
    loader: Any = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        found = f"found the character U+{ord(text[error.position]):04X}, which YAML does not allow"
        raise config_error(file, [Problem(line, column, (), found)], hint) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        why = error.problem or "not valid YAML"
        if not isinstance(error, _Refused):
            why = f"not valid YAML: {error.context + ', ' if error.context else ''}{why}"
        raise config_error(file, [Problem(line, column, (), why)], hint) from None
    except (ValueError, OverflowError):  # PyYAML's own, for an escape beyond Unicode such as "\UFFFFFFFF"
        mark = loader.get_mark()
        why = "found an escape that is no character"
        raise config_error(file, [Problem(mark.line + 1, mark.column + 1, (), why)], hint) from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _TAG + "null"):
        raise ConfigError(f"{file}: the file is empty, expected settings", hint=hint)
    if not isinstance(root, yaml.MappingNode):
        why = f"found {describe(root)}, expected settings as `key: value` lines"
        raise config_error(file, [Problem(root.start_mark.line + 1, root.start_mark.column + 1, (), why)], hint)
    return root


def _convert(document: Document, node: yaml.Node, keys: Keys) -> Value:
    if isinstance(node, yaml.MappingNode):
        if node.tag != _TAG + "map":
            document.report(node, keys, f"found the tag {node.tag}, expected a plain section")
        return _convert_mapping(document, node, keys)
    if isinstance(node, yaml.SequenceNode):
        if node.tag != _TAG + "seq":
            document.report(node, keys, f"found the tag {node.tag}, expected a plain list")
        return [_convert(document, item, (*keys, index)) for index, item in enumerate(node.value)]
    try:
        return _convert_scalar(node.tag, node.value)
    except ValueError as error:
        document.report(node, keys, f"found {describe(node)}, {error}")
        return None


def _convert_mapping(document: Document, node: yaml.MappingNode, keys: Keys) -> dict[str, Value]:
    found: dict[str, Value] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            document.report(key, keys, f"found {describe(key)} as a key, expected text")
            continue
        name = key.value
        if key.tag != _TAG + "str":
            text = f"found the key {describe(key)}, expected text"
            document.report(key, (*keys, name), f'{text}: quote it as "{name}"' if name else text)
        elif _unusable(name):
            document.report(key, keys, "found a key with a character that no text may hold")
            continue
        if name in found:
            document.report(key, (*keys, name), f"the key stands here twice, first in line {lines[name]}")
            continue
        lines[name] = key.start_mark.line + 1
        found[name] = _convert(document, value, (*keys, name))
    return found


def _convert_scalar(tag: str, text: str) -> Value:
    """The value of a scalar. Raises ValueError with what was expected."""
    match tag.removeprefix(_TAG):
        case "str":
            if _unusable(text):
                raise ValueError("expected text without NUL and surrogate characters")
            return text
        case "null" if _NULL.match(text):
            return None
        case "bool" if _BOOL.match(text):
            return _TRUE.match(text) is not None
        case "int" if _INT.match(text):
            # Twenty digits hold every 64-bit number; more would only cost time.
            number = int(text, 0 if text[:2] in ("0o", "0x") else 10) if len(text) <= 24 else 2**63
            if not -(2**63) <= number < 2**63:
                raise ValueError("expected a number of at most 64 bits")
            return number
        case "float" if _FLOAT.match(text):
            real = float(text.replace(".", "", 1) if text.lower().endswith(("inf", "nan")) else text)
            if not math.isfinite(real):
                raise ValueError("expected a finite number")
            return real
        case "null" | "bool" | "int" | "float":
            raise ValueError(f"expected what its tag {tag.removeprefix(_TAG)} promises")
        case _:
            raise ValueError(f"expected a plain value without the tag {tag}")


def _unusable(text: str) -> bool:
    return "\0" in text or _SURROGATE.search(text) is not None
