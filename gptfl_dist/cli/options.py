"""What several commands take alike."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class InvitedRole(StrEnum):
    silo = "silo"
    operator = "operator"
    observer = "observer"


class Format(StrEnum):
    text = "text"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="how the result is printed on stdout")]
RoleOption = Annotated[InvitedRole, typer.Option("--role", help="whose name it is")]
FederationPath = Annotated[Path, typer.Argument(metavar="FEDERATION_FILE", show_default=False)]
OperatorPath = Annotated[Path, typer.Argument(metavar="FEDERATION_FILE|OPERATOR_FILE", show_default=False)]
StandingPath = Annotated[Path, typer.Argument(metavar="FEDERATION_FILE|RUN_FOLDER|OPERATOR_FILE", show_default=False)]
RunPath = Annotated[Path, typer.Argument(metavar="FEDERATION_FILE|RUN_FOLDER", show_default=False)]
