"""What several commands take alike."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    text = "text"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="how the result is printed on stdout")]
FederationPath = Annotated[Path, typer.Argument(metavar="FEDERATION_FILE", show_default=False)]
RunPath = Annotated[Path, typer.Argument(metavar="FEDERATION_FILE|RUN_FOLDER", show_default=False)]
