"""The commands of whoever operates a coordinator: how the run stands, pause, resume, abort, models out of it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gptfl_dist.cli.options import FederationPath, Format, FormatOption, RunPath, StandingPath
from gptfl_dist.errors import ConfigError

_WATCH_EVERY = 2.0  # seconds
_OVER = ("not started", "aborted", "finished", "stopped", "failed", "killed")
_CLEAR = "\x1b[H\x1b[2J"


def status(
    path: StandingPath,
    watch: Annotated[bool, typer.Option("--watch", help="show it anew every two seconds, until the run ends")] = False,
    format_: FormatOption = Format.text,
) -> None:
    """How a run stands: state, round, every silo, what it has taken, what to do next.

    \b
    gptfl status federation.yaml
    gptfl status federation.yaml --watch
    gptfl status runs/demo --format json
    gptfl status operator.yaml        from afar, of a coordinator at work

    Beside a coordinator at work, which is not disturbed, or on its machine after its end. The exit code is 0 whatever
    the state.
    """
    from gptfl_dist.observe.status import status_lines
    from gptfl_dist.run.afar import do

    while True:
        found = do(path, "status")
        if format_ is Format.json:
            typer.echo(json.dumps(asdict(found)))
        else:
            text = "\n".join(status_lines(found))
            typer.echo(_CLEAR + text if watch and sys.stdout.isatty() else text)
        if not watch or found.state in _OVER:
            return
        try:
            time.sleep(_WATCH_EVERY)
        except KeyboardInterrupt:
            return


def metrics(
    path: RunPath,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="where Prometheus scrapes them")] = "127.0.0.1:9464",
    once: Annotated[bool, typer.Option("--once", help="print them and end")] = False,
) -> None:
    """Serve a run's metrics for Prometheus, beside the coordinator and after it.

    \b
    gptfl metrics federation.yaml                         http://127.0.0.1:9464/metrics
    gptfl metrics federation.yaml --once > gptfl.prom     for a textfile collector

    Run it on the coordinator's machine, as its user. deploy/prometheus has alerts and a dashboard.
    """
    from gptfl_dist.run.metrics import metrics_text, serve_metrics

    if once:
        typer.echo(metrics_text(path), nl=False)
    else:
        serve_metrics(path, listen, lambda told: typer.echo(told, err=True))


def pause(path: StandingPath, format_: FormatOption = Format.text) -> None:
    """Let a run finish the round in progress and begin no other. Silos stay connected, and nobody times out.

    \b
    gptfl pause federation.yaml      or operator.yaml, from afar
    gptfl resume federation.yaml     ends it

    It holds over restarts of the coordinator. Where none is at work, it holds from the next start on.
    """
    _ask(path, "pause", "", format_)


def resume(path: StandingPath, format_: FormatOption = Format.text) -> None:
    """Let a paused run go on.

    \b
    gptfl resume federation.yaml

    It starts no coordinator: one that was stopped goes on with the command that started it.
    """
    _ask(path, "resume", "", format_)


def abort(
    path: StandingPath,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="told to the silos' operators as well")] = "",
    format_: FormatOption = Format.text,
) -> None:
    """End a run for good: orders are recalled, the silos told goodbye. What it came to stays and can be exported.

    \b
    gptfl abort federation.yaml --reason "wrong labels at silo-2"
    gptfl export federation.yaml --out model.safetensors
    gptfl run federation.yaml --fresh     makes the run anew

    The coordinator ends with exit code 12, the silos that are connected with 0. To stop a run that shall go on later,
    use Ctrl-C or gptfl pause.
    """
    _ask(path, "abort", reason, format_)


def _ask(path: Path, what: Literal["pause", "resume", "abort"], reason: str, format_: Format) -> None:
    from gptfl_dist.exchange.base import Wish
    from gptfl_dist.run.afar import do

    asked = do(path, what, Wish(reason=reason))
    if format_ is Format.json:
        told = {"asked": what, "run_folder": str(asked.run_folder), "at_work": asked.at_work, "told": asked.told}
        typer.echo(json.dumps(told))
    else:
        typer.echo(asked.told)


def health(
    context: typer.Context,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FEDERATION_FILE|SILO_FILE|OPERATOR_FILE", show_default="whichever coordinator or silo runs here"
        ),
    ] = None,
    alive: Annotated[
        bool, typer.Option("--alive", help="a coordinator that still prepares the model is well too")
    ] = False,
    format_: FormatOption = Format.text,
) -> None:
    """Whether a coordinator takes silos now, or a silo is connected: exit code 0, else 1. For probes.

    \b
    gptfl health federation.yaml             on the coordinator's machine; needs no certificate
    gptfl health federation.yaml --alive     at work, whatever the stage
    gptfl health silo.yaml                   on the silo's machine
    gptfl health operator.yaml               from afar, by the health service of gRPC
    gptfl health                             in a container: of what runs there
    """
    from gptfl_dist.run.health import health_of

    assert context.parent is not None
    commands: dict[str, Any] = context.parent.command.commands  # type: ignore[attr-defined]  # a group has them

    def parse(name: str, words: list[str]) -> dict[str, Any]:
        parameters: dict[str, Any] = commands[name].make_context(name, words).params
        return parameters

    found = health_of(path, parse, alive=alive)
    typer.echo(json.dumps(asdict(found)) if format_ is Format.json else found.why)
    if not found.well:
        raise typer.Exit(1)


def export(
    file: FederationPath,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the .safetensors file to write")] = None,
    transformers: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write a folder that from_pretrained of transformers loads")
    ] = None,
    arm: Annotated[
        Literal["synthetic_only", "fedavg_random", "gptfl"] | None,
        typer.Option(show_default="the last federated one", help="synthetic_only is the pre-trained model"),
    ] = None,
    round_: Annotated[
        str,
        typer.Option("--round", metavar="best|final|N", help="best on validation data, the newest, or after round N"),
    ] = "best",
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
    format_: FormatOption = Format.text,
) -> None:
    """Take a model out of a run, at work or ended: the best, the newest, or that of any round which is kept.

    \b
    gptfl export federation.yaml --out model.safetensors
    gptfl export federation.yaml --round 12 --out round-12.safetensors
    gptfl export federation.yaml --arm synthetic_only --out pretrained.safetensors
    gptfl export federation.yaml --transformers model-folder

    Round 0 is what the arm started with. With federation.keep: best only the start, the best and the newest are kept.
    """
    from gptfl_dist.run.export import export as export_model

    if round_ not in ("best", "final") and not round_.isdecimal():
        raise ConfigError(f"--round is {round_}", hint="give best, final or a number")
    done = export_model(file, arm=arm, which=round_, out=out, transformers=transformers, force=force)
    if format_ is Format.json:
        places = {"out": out and str(out), "transformers": transformers and str(transformers)}
        typer.echo(json.dumps({**asdict(done), **places}))
        return
    which_one = done.arm if done.round is None else f"{done.arm} after round {done.round}"
    for place in filter(None, (out, transformers)):
        typer.echo(f"{place}: {which_one}, weights {done.digest[:12]}")
