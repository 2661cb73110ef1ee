"""The commented default files hold every setting with the default of the models, and the schemas agree with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined

import gptfl_dist.config
from gptfl_dist.config import (
    Data,
    ExperimentFile,
    FederationFile,
    OperatorFile,
    Section,
    SiloFile,
    experiment_schema,
    federation_schema,
    load_experiment,
    load_federation,
    load_operator,
    load_silo,
    operator_schema,
    silo_schema,
)
from gptfl_dist.config.document import read_document
from gptfl_dist.config.experiment import Block, Method, Split, Start, Trials
from gptfl_dist.synthesis.generator import EMBEDDED_LABELS

FILES = {
    "federation.yaml": FederationFile,
    "silo.yaml": SiloFile,
    "operator.yaml": OperatorFile,
}
# A setting that is commented out: "# key: value" in the place where it would stand.
COMMENTED = re.compile(r"^( *)# ( *[a-z_]+:(?: .*)?)$", re.MULTILINE)


def default_file(name: str) -> Path:
    return Path(str(resources.files("gptfl_dist.config") / "defaults" / name))


def sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def settings_of(section: type[Section], *keys: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every setting below a section with the keys that lead to it; a list of sections is entered at its first item."""
    for name, field in section.model_fields.items():
        below = None if get_origin(field.annotation) is dict else next(sections(field.annotation), None)
        if below is None or field.is_required() or field.default is None:
            yield (*keys, name), field
        if below is not None:
            yield from settings_of(below, *keys, name)


def at(value: Any, keys: tuple[str, ...]) -> Any:
    """The value below `keys`; raises KeyError where it does not stand."""
    for key in keys:
        value = value[0] if isinstance(value, list) else value
        value = value[key]
    return value


def test_the_default_files_load_as_they_stand() -> None:
    assert tuple(load_federation(default_file("federation.yaml")).labels) == EMBEDDED_LABELS
    assert load_silo(default_file("silo.yaml")).name == "silo-1"
    assert load_operator(default_file("operator.yaml")).role == "operator"


@pytest.mark.parametrize("name", FILES)
def test_every_setting_stands_in_the_file_with_its_default(name: str, tmp_path: Path) -> None:
    plain = read_document(default_file(name)).value
    whole = tmp_path / name
    whole.write_text(COMMENTED.sub(r"\1\2", default_file(name).read_text()))
    uncommented = read_document(whole)
    assert uncommented.problems == []
    for keys, field in settings_of(FILES[name]):
        assert at(uncommented.value, keys) is not None, keys
        if keys == ("silos", "file"):
            continue  # part of the example that the file gives of a silo
        if field.default is None and next(sections(field.annotation), None) is None:
            with pytest.raises(KeyError):  # a setting that may be left out is commented out
                at(plain, keys)
        elif field.default not in (None, PydanticUndefined):
            value = TypeAdapter(field.rebuild_annotation()).validate_python(at(uncommented.value, keys))
            assert value == field.default, keys


@pytest.mark.parametrize("name", FILES)
def test_the_file_holds_nothing_else(name: str, tmp_path: Path) -> None:
    whole = tmp_path / name
    whole.write_text(COMMENTED.sub(r"\1\2", default_file(name).read_text()))

    def leaves(value: Any, *keys: str) -> Iterator[tuple[str, ...]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from leaves(below, *keys, key)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from leaves(value[0], *keys)
        else:
            yield keys

    known = {keys for keys, _ in settings_of(FILES[name])}
    free = {
        ("data", "labels"),
        ("synthesis", "candidates"),
        ("federation", "federation"),
    }  # mappings with the user's own keys
    assert {keys for keys in leaves(read_document(whole).value) if keys[:2] not in free} <= known


@pytest.mark.parametrize("name", FILES)
def test_the_file_fits_a_screen(name: str) -> None:
    for number, line in enumerate(default_file(name).read_text().splitlines(), start=1):
        assert len(line) <= 120, number
        assert "\t" not in line, number


def test_the_experiment_file_is_an_example_that_names_every_setting() -> None:
    text = default_file("experiment.yaml").read_text()
    file = load_experiment(default_file("experiment.yaml"))
    assert (file.seeds, file.folder.name) == (ExperimentFile.model_fields["seeds"].default, "results")
    for section in (ExperimentFile, Data, Split, Start, Method, Trials, Block):
        for name in section.model_fields:
            assert re.search(rf"\b{name}\b", text), name
    assert max(map(len, text.splitlines())) <= 120


def test_schemas_are_of_the_files_and_their_defaults_are_what_a_file_takes() -> None:
    assert set(federation_schema()["properties"]) == set(FederationFile.model_fields)
    assert set(silo_schema()["properties"]) == set(SiloFile.model_fields)
    assert set(operator_schema()["properties"]) == set(OperatorFile.model_fields)
    assert set(experiment_schema()["properties"]) == set(ExperimentFile.model_fields)
    limits = federation_schema()["$defs"]["Limits"]["properties"]
    assert re.fullmatch(limits["rate"]["pattern"], limits["rate"]["default"])
    exchange = federation_schema()["$defs"]["Exchange"]["properties"]
    assert exchange["chunk"]["type"] == "string"
    assert re.fullmatch(exchange["chunk"]["pattern"], exchange["chunk"]["default"])
    assert re.fullmatch(exchange["keepalive"]["pattern"], exchange["keepalive"]["default"])
    assert federation_schema()["properties"]["run_folder"]["default"] == "run"
    assert federation_schema()["additionalProperties"] is False


def test_all_is_sorted_and_whole() -> None:
    exported = gptfl_dist.config.__all__
    assert exported == sorted(exported)
    assert all(hasattr(gptfl_dist.config, name) for name in exported)
