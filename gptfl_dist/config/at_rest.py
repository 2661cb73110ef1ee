"""The section `at_rest` of both files: the key with which a side encrypts the weights that it keeps on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from gptfl_dist.config.base import Section


class AtRest(Section):
    """Where the key is: in a file, in an environment variable, or in what a command prints."""

    key_file: Path | None = None
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="a variable's name")] | None = None
    key_command: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in AtRest.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given: give one of {', '.join(AtRest.model_fields)}")
        return self
