"""`gptfl experiment`: a matrix of federations from one file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gptfl_dist.cli.options import Format, FormatOption


def experiment(
    file: Annotated[Path, typer.Argument(metavar="EXPERIMENT_FILE", show_default=False)],
    workers: Annotated[int | None, typer.Option(min=1, show_default="one a core", help="federations at a time")] = None,
    format_: FormatOption = Format.text,
) -> None:
    """Run every cell of an experiment file as a federation in memory, and compare them: tables, curves, CSV, LaTeX.

    \b
    gptfl init experiment > experiment.yaml
    gptfl experiment experiment.yaml
    gptfl experiment experiment.yaml --workers 2

    Stopped, it goes on with what is not finished. Every strategy is tuned alike, on validation data.
    """
    from gptfl_dist.run.experiment.report import report
    from gptfl_dist.run.experiment.run import run_experiment
    from gptfl_dist.run.signals import run_until_done

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    done = run_until_done(run_experiment(file, workers or os.cpu_count() or 1, say))
    made = report(done, file.read_text(encoding="utf-8"))
    if format_ is Format.json:
        typer.echo((made / "results.json").read_text(encoding="utf-8"))
    else:
        typer.echo(str(made / "report.html"))
    missing = [cell for cell in done.failures if cell.trial is None]
    if missing:
        also = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        say(f"missing: {missing[0]}{also}; {made / 'report.html'} says why, and the same command tries again")
        raise typer.Exit(1)
