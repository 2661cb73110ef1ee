"""`gptfl audit`: the audit log of a run verified, shown and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptfl_dist.cli.options import Format, FormatOption, RunPath
from gptfl_dist.errors import AuditError

if TYPE_CHECKING:
    from gptfl_dist.run.audit import Audit

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""The audit log of a run: who connected, what was accepted and refused, what each round came to.

    \b
    gptfl audit verify federation.yaml
    gptfl audit show federation.yaml --silo silo-2 --last 20
    gptfl audit export federation.yaml --out audit.csv
    """,
)


@app.command()
def verify(
    path: RunPath,
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE|FINGERPRINT", help="the key that must have signed it: its PEM file or fingerprint"),
    ] = None,
    format_: FormatOption = Format.text,
) -> None:
    """Find any change of the audit log: of a byte, a line that is missing or moved, a signature by another key.

    \b
    gptfl audit verify federation.yaml
    gptfl audit verify runs/demo --key 3f0c...e1

    The log is compared with the ledger too, where there is one beside it. The exit code is 13 where something is
    wrong. Without --key a log that was written anew with another key is not found out.
    """
    from gptfl_dist.run.audit import audit_of

    audit = audit_of(path, key)
    if format_ is Format.json:
        typer.echo(json.dumps(audit.told()))
    else:
        for fault in audit.faults:
            typer.echo(f"line {fault.line}: found {fault.found}, expected {fault.expected}")
        _tell(audit)
    _end(audit)


@app.command()
def show(
    path: RunPath,
    silo: Annotated[str | None, typer.Option(metavar="NAME", help="events of this silo alone")] = None,
    round_: Annotated[int | None, typer.Option("--round", metavar="N", help="events of this round alone")] = None,
    event: Annotated[str | None, typer.Option(metavar="NAME", help="events of this kind alone")] = None,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="the last so many of them")] = None,
    format_: FormatOption = Format.text,
) -> None:
    """Print the audit log, an entry a line. With --format json the entries are printed as they are.

    \b
    gptfl audit show federation.yaml --last 20
    gptfl audit show federation.yaml --silo silo-2 --round 3
    gptfl audit show federation.yaml --event "update refused" --format json

    In the text digests and signatures are cut short, and signed statements and certificates left out. The exit code is
    13 where the log does not verify.
    """
    from gptfl_dist.run.audit import audit_of, entries_of, entry_text, require_whole

    audit = audit_of(path)
    found = entries_of(audit, silo=silo, round_=round_, event=event, last=last)
    for entry in found:
        typer.echo(json.dumps(entry) if format_ is Format.json else entry_text(entry))
    if not found:
        typer.echo(f"none of the {len(audit.verification.entries)} entries of {audit.file} fits", err=True)
    require_whole(audit)


@app.command()
def export(
    path: RunPath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="the file to write: .csv or .jsonl", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
    format_: FormatOption = Format.text,
) -> None:
    """Write the audit log with a verdict for each entry: signed, chained (not signed yet), or what is wrong.

    \b
    gptfl audit export federation.yaml --out audit.csv
    gptfl audit export federation.yaml --out audit.jsonl

    The exit code is 13 where the log does not verify; the file is written all the same.
    """
    from gptfl_dist.run.audit import audit_of, export_log

    audit = audit_of(path)
    export_log(audit, out, force=force)
    if format_ is Format.json:
        typer.echo(json.dumps({**audit.told(), "out": str(out)}))
    else:
        typer.echo(f"{out}: {len(audit.verification.entries)} entries")
        _tell(audit)
    _end(audit)


def _tell(audit: Audit) -> None:
    found, wrong = audit.verification, len(audit.faults)
    result = f"{wrong} fault{'s' if wrong > 1 else ''}" if wrong else "nothing was changed, moved or left out"
    typer.echo(f"{audit.file}: {len(found.entries)} entries, signed up to entry {found.signed}: {result}")
    typer.echo(f"key {found.fingerprint or 'unknown'}")
    for note in audit.notes:
        typer.echo(f"-> {note}")


def _end(audit: Audit) -> None:
    if audit.faults:
        raise typer.Exit(AuditError.exit_code)
