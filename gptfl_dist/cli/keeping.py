"""The commands that keep a coordinator from being lost: backup and restore, and the epoch in which a run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptfl_dist.cli.options import FederationPath, Format, FormatOption

if TYPE_CHECKING:
    from gptfl_dist.run.epoch import EpochBegun


def epoch(
    file: FederationPath,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="told to the silos' operators as well")] = "",
    format_: FormatOption = Format.text,
) -> None:
    """Tell the silos that the run was set back, after its folder was brought back by other means than gptfl restore.

    \b
    gptfl epoch federation.yaml --reason "disk of Monday's snapshot"

    Silos refuse to go back to rounds that they have behind them. This begins a new epoch of the run, signed by the
    authority, in which they do. No coordinator may be at work; the next start goes on in it.
    """
    from gptfl_dist.run.epoch import begin_epoch

    _show_epoch(begin_epoch(file, reason), format_)


def _show_epoch(begun: EpochBegun, format_: Format) -> None:
    if format_ is Format.json:
        typer.echo(json.dumps({**asdict(begun), "run_folder": str(begun.run_folder)}))
        return
    from_rounds = ", ".join(f"round {round_} of {arm}" for arm, round_ in begun.rounds.items()) or "its start"
    typer.echo(f"{begun.run_folder}: epoch {begun.epoch} begins with the next start, from {from_rounds}")
    if not begun.signed:
        typer.echo("-> it is not signed, for the federation file names no certificates: silos that run alone refuse it")
