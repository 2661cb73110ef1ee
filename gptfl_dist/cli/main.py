"""The `gptfl` command: parses, calls one function of `run`, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gptfl_dist import __version__
from gptfl_dist.cli import admission, audit, experiment, keeping, operate
from gptfl_dist.cli.options import FederationPath, Format, FormatOption
from gptfl_dist.errors import ConfigError, GptflError, Interrupted
from gptfl_dist.run.launcher import Wire, choose

if TYPE_CHECKING:
    from gptfl_dist.learning.group import Group
    from gptfl_dist.observe.summary import Summary

app = typer.Typer(
    name="gptfl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Federated learning that starts from a model pre-trained on synthetic data.

    \b
    gptfl demo                        see it work, in runs/demo
    gptfl init > federation.yaml      a commented federation file to edit
    gptfl check federation.yaml       what would fail, before it does
    gptfl run federation.yaml         everything on this machine
    mpiexec -n 5 gptfl run federation.yaml
    gptfl coordinator federation.yaml / gptfl silo silo.yaml   one side each, over the network
    gptfl status federation.yaml      how a run stands, which silo is missing, what to do
    gptfl audit verify federation.yaml   whether its audit log is whole

    Results and progress: summary.json, report.html and logs in the run folder. Exit codes: docs/reference.md.
    """,
)


QuietOption = Annotated[bool, typer.Option(hidden=True, help="for a process of ours that waits for the result")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="delete what the run folder holds and start anew")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
    silos: Annotated[int, typer.Option(min=2, max=20, help="how many silos share the data")] = 4,
    rounds: Annotated[
        int, typer.Option(min=1, help="rounds of each federated arm; a rate is tried for 8 at most")
    ] = 30,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    fresh: FreshOption = False,
    format_: FormatOption = Format.text,
) -> None:
    """The whole method on real digits: synthetic data, pre-training, a federation of silo processes, a report.

    Three arms on MNIST, split unevenly over the silos: synthetic only, FedAvg from random weights, GPT-FL. What it
    writes first, federation.yaml and a file a silo, is what a user would write; docs/clusters.md runs it under MPI.
    """
    from gptfl_dist.run.demo import prepare

    choose(Wire.grpc)
    path = prepare(folder, silos=silos, rounds=rounds, seed=seed, fresh=fresh)
    _run(path, Wire.grpc, fresh, format_)


@app.command()
def run(
    file: FederationPath,
    exchange: Annotated[Wire, typer.Option(help="auto: as the launcher says, else grpc")] = Wire.auto,
    fresh: FreshOption = False,
    format_: FormatOption = Format.text,
) -> None:
    """Generate, pre-train, federate and report, with every silo started here.

    \b
    gptfl run federation.yaml                 silos as processes on this machine, gRPC with mutual TLS
    mpiexec -n 5 gptfl run federation.yaml    rank 0 coordinates four silos
    torchrun --nproc-per-node 5 -m gptfl_dist run federation.yaml
    gptfl run federation.yaml --exchange memory    all in this process, silos in turn: for experiments
    """
    _run(file, exchange, fresh, format_)


@app.command()
def prompts(
    file: FederationPath,
    out: Annotated[
        Path | None,
        typer.Option(
            show_default="synthesis.prompts.file, else prompts.yaml beside FEDERATION_FILE", help="the file to write"
        ),
    ] = None,
    wordnet: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="add other names and definitions from this WordNet database")
    ] = None,
    sense: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=NUMBER", help="the sense of a label; the file lists them; repeatable"),
    ] = None,
    text_model: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="add sentences of this language model of transformers: folder or hub id"),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(show_default="a caption of one sentence", help="what it is asked, with {label}")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="sentences drawn a label")] = 250,
    keep: Annotated[int, typer.Option(min=1, help="sentences kept a label, at most")] = 200,
    temperature: Annotated[float, typer.Option(min=0.01, help="of the draws; higher is more varied")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
    format_: FormatOption = Format.text,
) -> None:
    """Write a prompt set: the prompts of every label in a file to read and edit before images are made from them.

    \b
    gptfl prompts federation.yaml                                        what templates and styles give
    gptfl prompts federation.yaml --wordnet /usr/share/wordnet           other names and definitions as well
    gptfl prompts federation.yaml --wordnet /usr/share/wordnet --sense crane=5 --force
    gptfl prompts federation.yaml --text-model ./model                   sentences as well
    gptfl prompts federation.yaml --text-model owner/name --instruction "Describe an X-ray image of a {label}."

    Sentences that repeat one another, do not name the label, are cut off or too long are dropped, and counted.
    Then name the file in the federation file: synthesis: {prompts: {file: prompts.yaml}}
    """
    from gptfl_dist.run.prompts import DEFAULT_INSTRUCTION, Writing, make_prompt_set

    writing = None
    if text_model is not None:
        asked = DEFAULT_INSTRUCTION if instruction is None else instruction
        writing = Writing(text_model, asked, draws, keep, temperature)
    elif instruction is not None:
        raise ConfigError("--instruction is given without --text-model", hint="name the model that is to follow it")
    made = make_prompt_set(
        file,
        out,
        writing=writing,
        wordnet=wordnet,
        senses=sense or [],
        force=force,
        command=shlex.join(["gptfl", *sys.argv[1:]]),
        say=_say,
    )
    if format_ is Format.json:
        typer.echo(json.dumps({**asdict(made), "file": str(made.file)}))
        return
    typer.echo(f"{made.file}: {sum(made.prompts.values())} prompts for {len(made.prompts)} labels")
    for reason, count in made.dropped.items():
        typer.echo(f"  {count} sentences dropped: {reason}")
    typer.echo(made.next)


@app.command()
def generate(file: FederationPath, quiet: QuietOption = False, format_: FormatOption = Format.text) -> None:
    """Make the synthetic data set of a federation file, and filter it. Stopped and started again, it goes on.

    \b
    gptfl generate federation.yaml
    torchrun --nproc-per-node 4 -m gptfl_dist generate federation.yaml    on four GPUs; the same set
    """
    from gptfl_dist.config.load import load_federation
    from gptfl_dist.run import stages
    from gptfl_dist.run.candidates import CANDIDATES, CONTACT_SHEET

    federation = load_federation(file)
    with _group() as group:
        made = stages.generate(federation, file.parent, group)
    if made is None:
        return
    sheet = federation.run_folder / (CANDIDATES if federation.synthesis.candidates else CONTACT_SHEET)
    if made.filter is not None:
        _say(f"filter: {made.filter}")
    if format_ is Format.json:
        told = {**asdict(made), "folder": str(federation.synthesis.folder), "contact_sheet": str(sheet)}
        typer.echo(json.dumps(told))
    elif not quiet:
        typer.echo(f"{made.images} {federation.task.samples} in {federation.synthesis.folder}; {sheet}")


@app.command()
def pretrain(file: FederationPath, quiet: QuietOption = False, format_: FormatOption = Format.text) -> None:
    """Train the model of a federation file on its synthetic data set. Stopped and started again, it goes on.

    \b
    gptfl pretrain federation.yaml
    torchrun --nproc-per-node 4 -m gptfl_dist pretrain federation.yaml    data-parallel on four GPUs
    """
    from gptfl_dist.config.load import load_federation
    from gptfl_dist.run import stages
    from gptfl_dist.run.candidates import CANDIDATES, PRETRAINED_WEIGHTS

    federation = load_federation(file)
    with _group() as group:
        facts = stages.pretrain(federation, file.parent, group)
    if facts is None:
        return
    each = facts.get("candidates", {"": facts})
    weights = federation.run_folder / (CANDIDATES if "candidates" in facts else PRETRAINED_WEIGHTS)
    if format_ is Format.json:
        typer.echo(json.dumps({**facts, "weights": str(weights)}))
    elif not quiet:
        for name, known in each.items():
            typer.echo(
                f"{name}{': ' if name else ''}{100 * known['validation_accuracy']:.1f} % on held-out synthetic data "
                f"after epoch {known['best_epoch']}"
            )
        if facts.get("choice"):
            typer.echo(facts["choice"])
        typer.echo(str(weights))


@app.command()
def coordinator(file: FederationPath, fresh: FreshOption = False, format_: FormatOption = Format.text) -> None:
    """The coordinator's side: generate, pre-train, then wait for the silos at exchange.listen."""
    from gptfl_dist.run.folder import open_run_folder
    from gptfl_dist.run.institution import run_coordinator
    from gptfl_dist.run.signals import run_until_done

    open_run_folder(file, fresh, certified=True)
    _show(run_until_done(run_coordinator(file, _say)), file, format_)


@app.command()
def silo(
    file: Annotated[Path, typer.Argument(metavar="SILO_FILE", show_default=False)],
    coordinator: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="instead of the file's")] = None,
    credentials: Annotated[Path | None, typer.Option(help="folder of the .pem files, instead of the file's")] = None,
    work_folder: Annotated[Path | None, typer.Option(help="instead of the file's")] = None,
    format_: FormatOption = Format.text,
) -> None:
    """A silo's side: connect to the coordinator, train on private data when asked, until the federation is over."""
    from gptfl_dist.run.institution import run_silo
    from gptfl_dist.run.signals import run_until_done

    goodbye = run_until_done(run_silo(file, coordinator, credentials, work_folder))
    if format_ is Format.json:
        typer.echo(json.dumps({"finished": goodbye.finished, "reason": goodbye.reason}))
    else:
        _say(goodbye.reason)


@app.command()
def credentials(
    file: FederationPath,
    host: Annotated[list[str], typer.Option(help="name or address of the coordinator for silos; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for the sets")] = Path("credentials"),
    days: Annotated[int, typer.Option(min=1, max=825, help="how long the certificates hold")] = 90,
    format_: FormatOption = Format.text,
) -> None:
    """Make certificates for the coordinator and every silo of a federation file.

    \b
    gptfl credentials federation.yaml --host coordinator.example.org

    The authority's key is forgotten: to admit another silo, or before they expire, make all sets anew. Bring each silo
    its folder by a trusted way, and nobody else's.
    """
    from gptfl_dist.run.institution import make_credentials

    lines = make_credentials(file, host, out, days)
    if format_ is Format.json:
        typer.echo(json.dumps({"folder": str(out), "next": lines}))
        return
    for line in lines:
        typer.echo(line)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)], format_: FormatOption = Format.text
) -> None:
    """The pre-flight of a federation, silo, operator or experiment file: what would fail, said before it does."""
    from gptfl_dist.run.check import check_file

    findings = check_file(file)
    if format_ is Format.json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.echo(finding.line())
    failed = next((finding for finding in findings if finding.exit_code), None)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


class Kind(StrEnum):
    federation = "federation"
    silo = "silo"
    operator = "operator"
    experiment = "experiment"


@app.command()
def init(kind: Annotated[Kind, typer.Argument()] = Kind.federation, format_: FormatOption = Format.text) -> None:
    """Print the commented file that holds every setting with its default.

    \b
    gptfl init > federation.yaml
    gptfl init silo > silo-1.yaml
    """
    from importlib import resources

    defaults = resources.files("gptfl_dist.config") / "defaults" / f"{kind.value}.yaml"
    text = defaults.read_text(encoding="utf-8")
    if format_ is Format.json:
        typer.echo(json.dumps({"kind": kind.value, "text": text}))
    else:
        typer.echo(text, nl=False)


@app.command()
def schema(kind: Annotated[Kind, typer.Argument()] = Kind.federation, format_: FormatOption = Format.text) -> None:
    """Print the JSON schema of a file, for editors that complete and check YAML. It is JSON in either format."""
    from gptfl_dist.config.schema import experiment_schema, federation_schema, operator_schema, silo_schema

    schemas = {
        Kind.federation: federation_schema,
        Kind.silo: silo_schema,
        Kind.operator: operator_schema,
        Kind.experiment: experiment_schema,
    }
    typer.echo(json.dumps(schemas[kind](), indent=None if format_ is Format.json else 2))


app.add_typer(admission.authority, name="authority")
for _command in (
    *(admission.invite, admission.join, admission.requests, admission.approve, admission.revoke, admission.silos),
    *(admission.operators, operate.health),
    *(operate.status, operate.metrics, operate.pause, operate.resume, operate.abort, operate.export),
    *(keeping.backup, keeping.restore, keeping.epoch, experiment.experiment),
):
    app.command()(_command)
app.add_typer(audit.app, name="audit")


def main() -> NoReturn:
    """Runs the command; a user's mistake ends with a message and its exit code, never with a traceback."""
    # Threads of torch that wait for one another shall sleep, not spin: on cores that others use too, as silos and
    # their trainers on one machine do, spinning made generation seven times slower. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gptfl_dist.launch.lifeline import hold_on
    from gptfl_dist.run.signals import ignore_stops, raise_interrupted

    try:
        # What a run started is ended by that run, which says so itself.
        if not hold_on():
            raise_interrupted()
        app(standalone_mode=True)
    except GptflError as error:
        _complain(error)
    except Interrupted as stop:
        _say(str(stop))
        sys.exit(stop.exit_code)
    finally:
        ignore_stops()
    sys.exit(0)


def _complain(error: GptflError) -> NoReturn:
    if "--format=json" in sys.argv or ("--format" in sys.argv and "json" in sys.argv):
        told: dict[str, Any] = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        typer.echo(json.dumps({**told, "exit_code": error.exit_code}))
    if "--quiet" not in sys.argv:
        typer.echo(f"gptfl: {error}", err=True)
    sys.exit(error.exit_code)


def _say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _group() -> Iterator[Group]:
    """The processes that carry a stage out together, of which rank 0 alone prints the result."""
    from gptfl_dist.learning.group import open_group

    group = open_group(patience=timedelta(days=1))  # in generation, ranks wait while others make a last shard
    try:
        yield group
    except GptflError as error:
        if group.size > 1:
            error.message = f"rank {group.rank}: {error.message}"
        raise
    group.close()


def _run(file: Path, wire: Wire, fresh: bool, format_: Format) -> None:
    choice = choose(wire)
    summary: Summary | None
    if choice.wire in (Wire.grpc, Wire.memory):
        from gptfl_dist.run.folder import open_run_folder
        from gptfl_dist.run.in_memory import run_in_memory
        from gptfl_dist.run.local import run_locally
        from gptfl_dist.run.signals import run_until_done

        open_run_folder(file, fresh, with_silos=True)
        if choice.wire is Wire.memory:
            _say(f"exchange: none, all in this process ({choice.why})")
            summary = run_until_done(run_in_memory(file, _say))
        else:
            _say(f"exchange: gRPC with mutual TLS ({choice.why})")
            summary = run_until_done(run_locally(file, _say))
    else:
        from gptfl_dist.run.collective import run_world

        summary = run_world(file, choice, fresh, _say)
    if summary is not None:  # which rank 0 alone has
        _show(summary, file, format_)


def _show(summary: Summary, file: Path, format_: Format) -> None:
    from gptfl_dist.config.load import load_federation
    from gptfl_dist.observe.summary import FILE_NAME
    from gptfl_dist.observe.table import print_table

    folder = load_federation(file).run_folder
    if format_ is Format.json:
        typer.echo((folder / FILE_NAME).read_text(encoding="utf-8"))
        return
    print_table(summary)
    typer.echo(f"\n{where(folder / 'report.html')}")


def where(path: Path) -> str:
    """A path as people find it: relative below the current folder, absolute outside of it."""
    path = Path(os.path.normpath(path.absolute()))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
