"""What every section of a configuration file shares: unknown keys are errors, and a loaded section cannot change."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"),
    Field(description="letters, digits, '.', '_' and '-', at most 63, starting with a letter or digit"),
]
"""A name that is safe in a file name, a certificate and a message."""


class Section(BaseModel):
    """A section of a file. Frozen, so that what was validated stays what runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())
