"""The commands that keep a coordinator from being lost: backup and restore, and the epoch in which a run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptfl_dist.cli.options import FederationPath, Format, FormatOption

if TYPE_CHECKING:
    from gptfl_dist.run.epoch import EpochBegun


def backup(
    file: FederationPath,
    to: Annotated[
        Path, typer.Option(metavar="ARCHIVE|FOLDER", help="the tar to write, or a folder for it", show_default=False)
    ],
    format_: FormatOption = Format.text,
) -> None:
    """Back up all that the coordinator needs into one file, beside a coordinator at work.

    \b
    gptfl backup federation.yaml --to /srv/backups                  each gets a name of its own, by the time
    gptfl backup federation.yaml --to coordinator.tar

    The archive holds the authority's keys and every model: whoever has it can let anybody in. It is made for its owner
    alone (0600) and is not encrypted.
    """
    from gptfl_dist.observe.wording import size
    from gptfl_dist.run.backup import back_up

    done = back_up(file, to)
    if format_ is Format.json:
        typer.echo(json.dumps({**asdict(done), "archive": str(done.archive)}))
        return
    typer.echo(f"{done.archive}: {done.files} files, {size(done.bytes)}")
    if done.left_out:
        typer.echo(f"-> not in it, though the federation file names them: {', '.join(done.left_out)}")


def restore(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", show_default=False)],
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="a folder that is new or empty", show_default=False)],
    reason: Annotated[
        str,
        typer.Option(metavar="TEXT", help="told to the silos' operators", show_default="from which backup"),
    ] = "",
    format_: FormatOption = Format.text,
) -> None:
    """Put a coordinator in place out of a backup, in a new epoch of its run.

    \b
    gptfl restore coordinator.tar --into /srv/federation
    gptfl coordinator /srv/federation/federation.yaml

    Every byte is checked before anything is in place. Silos go back to the round of the backup, because the new epoch
    is signed by the authority.
    """
    from gptfl_dist.run.restore import restore as put_in_place

    done = put_in_place(archive, into, reason)
    if format_ is Format.json:
        typer.echo(json.dumps(asdict(done), default=str))
        return
    typer.echo(f"{into}: {done.files} files, each as it was")
    if done.epoch is not None:
        _show_epoch(done.epoch)
    for told in done.next:
        typer.echo(f"-> {told}")


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

    begun = begin_epoch(file, reason)
    if format_ is Format.json:
        typer.echo(json.dumps(asdict(begun), default=str))
    else:
        _show_epoch(begun)


def _show_epoch(begun: EpochBegun) -> None:
    from_rounds = ", ".join(f"round {round_} of {arm}" for arm, round_ in begun.rounds.items()) or "its start"
    typer.echo(f"epoch {begun.epoch} begins with the next start, from {from_rounds}")
    if not begun.signed:
        typer.echo("-> it is not signed, for the federation file names no certificates: silos that run alone refuse it")
