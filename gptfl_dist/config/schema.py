"""JSON schemas of the files, for editors that complete and check YAML as it is typed."""

from __future__ import annotations

from typing import Any, get_args

from gptfl_dist.config.base import Section
from gptfl_dist.config.experiment import ExperimentFile
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.config.silo import SiloFile


def federation_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the federation file."""
    return _schema(FederationFile)


def silo_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the silo file."""
    return _schema(SiloFile)


def experiment_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the experiment file."""
    return _schema(ExperimentFile)


def operator_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the operator file."""
    return _schema(OperatorFile)


def _schema(file: type[Section]) -> dict[str, Any]:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **file.model_json_schema()}
    for section in _sections(file):
        part = schema if section is file else schema["$defs"][section.__name__]
        # pydantic writes the default of a duration or size as a number, where the file takes a text with a unit.
        defaults = section.model_construct().model_dump(mode="json", warnings=False)
        for name, setting in part["properties"].items():
            if "default" in setting:
                setting["default"] = defaults[name]
    return schema


def _sections(annotation: Any) -> set[type[Section]]:
    """A section with all sections below it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}.union(*(_sections(field.annotation) for field in annotation.model_fields.values()))
    return set().union(*(_sections(part) for part in get_args(annotation)))
