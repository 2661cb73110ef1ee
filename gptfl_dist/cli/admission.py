"""The commands about who takes part: the authority, invitations and what becomes of them; and a silo's `gptfl join`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime, timedelta
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptfl_dist.cli.options import FederationPath, Format, FormatOption, InvitedRole, OperatorPath, RoleOption
from gptfl_dist.security.identity import called

if TYPE_CHECKING:
    from gptfl_dist.run.admission import AuthorityShown, OperatorListed, SiloListed
    from gptfl_dist.run.check import Finding

authority = typer.Typer(
    no_args_is_help=True, help="The federation's own authority, which makes the certificates of all sides."
)


@authority.command("init")
def init_authority(
    file: FederationPath,
    external: Annotated[
        bool, typer.Option("--external", help="leave a request that an authority of yours signs, and make no root")
    ] = False,
    format_: FormatOption = Format.text,
) -> None:
    """Make the authority, in the folder that enrolment.authority names.

    \b
    gptfl authority init federation.yaml
    gptfl authority init federation.yaml --external     then: gptfl authority install

    Whoever has the folder can let anybody in. root.key is needed for gptfl authority rotate alone: better keep it
    elsewhere.
    """
    from gptfl_dist.run import admission

    made = admission.init_authority(file, external=external)
    if external:
        _print(format_, {"request": str(made)}, _to_be_signed(made, file))
    else:
        shown = admission.show_authority(file)
        _print(format_, asdict(shown), f"{made}: made; its fingerprint is\n{shown.fingerprints[0]}")


@authority.command()
def install(
    file: FederationPath,
    chain: Annotated[Path, typer.Argument(metavar="CHAIN", help="the signed certificate, and what is above it")],
    roots: Annotated[Path, typer.Argument(metavar="ROOTS", help="the root certificate that all sides shall trust")],
    format_: FormatOption = Format.text,
) -> None:
    """Take the issuing certificate that an authority of yours signed, the first and each that follows it.

    \b
    gptfl authority install federation.yaml issuing-chain.pem root.pem
    """
    from gptfl_dist.run import admission

    shown = admission.install_issuing(file, chain, roots)
    _print(
        format_,
        asdict(shown),
        f"{shown.folder}: ready; the fingerprint is\n{shown.fingerprints[0]}{_next(shown, file)}",
    )


@authority.command()
def show(file: FederationPath, format_: FormatOption = Format.text) -> None:
    """Print the fingerprint that invitations carry, and when the authority's certificates end."""
    from gptfl_dist.run import admission

    shown = admission.show_authority(file)
    old = "".join(f"\nand still the one before it  {each}" for each in shown.fingerprints[1:]) + _next(shown, file)
    where = "its key is here" if shown.root_key_here else "its key is elsewhere"
    text = (
        f"folder       {shown.folder}\nfingerprint  {shown.fingerprints[0]}{old}\n"
        f"root until   {_minute(shown.root_expires)} ({where})\nissues until {_minute(shown.issuing_expires)}"
        + ("" if shown.request is None else f"\n{_to_be_signed(shown.request, file)}")
        + "".join(f"\nwarning      {each}" for each in shown.warnings)
    )
    _print(format_, asdict(shown), text)


@authority.command()
def rotate(
    file: FederationPath,
    finish: Annotated[bool, typer.Option("--finish", help="trust the old root no more")] = False,
    format_: FormatOption = Format.text,
) -> None:
    """Replace root and issuing certificate; nobody is cut off, and a coordinator at work goes on with the new ones.

    \b
    gptfl authority rotate federation.yaml              silos hear of the new root as they renew their certificates
    gptfl authority rotate federation.yaml --finish     once they all have

    Below an authority of yours it leaves a request for the next issuing certificate: have it signed, then gptfl
    authority install. The present one is used until then.
    """
    from gptfl_dist.run import admission

    shown = admission.rotate_authority(file, finish=finish)
    changed = f"{shown.folder}: the fingerprint is now\n{shown.fingerprints[0]}{_next(shown, file)}"
    waits = not finish and shown.request is not None
    _print(format_, asdict(shown), _to_be_signed(shown.request, file) if waits else changed)


def invite(
    file: OperatorPath,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="a silo's name in the federation file, or any", show_default=False)
    ],
    role: RoleOption = InvitedRole.silo,
    days: Annotated[float, typer.Option(min=0.001, max=30, help="how long the invitation holds")] = 3,
    format_: FormatOption = Format.text,
) -> None:
    """Invite a silo, an operator or an observer: prints the one line that they need. It lets one side in, once.

    \b
    gptfl invite federation.yaml hospital-a
    gptfl invite federation.yaml anna --role operator     may pause, abort, revoke, invite silos ... from afar
    gptfl invite federation.yaml ben --role observer      may look
    gptfl invite operator.yaml hospital-a                 from afar; operators are invited here alone

    Send it by a way that nobody else reads. A new invitation makes the last one of that name void. It is answered by a
    coordinator at work: gptfl coordinator.
    """
    from gptfl_dist.exchange.base import Wish
    from gptfl_dist.run.afar import do

    made = do(file, "invite", Wish(role=role.value, name=name, seconds=timedelta(days=days).total_seconds()))
    typer.echo(json.dumps(asdict(made)) if format_ is Format.json else f"gptfl join {made.line}")


def join(
    line: Annotated[str, typer.Argument(metavar="LINE|-", help="the invitation; - reads it from stdin")],
    folder: Annotated[Path, typer.Option(help="where certificate, key and silo file go")] = Path(),
    data: Annotated[
        Path | None, typer.Option(help="this silo's data, for the silo file", show_default="data in that folder")
    ] = None,
    format_: FormatOption = Format.text,
) -> None:
    """Join a federation by an invitation: makes a key, which stays here, a certificate and the silo or operator file.

    \b
    gptfl join gptfl://coordinator.example.org:8444/mnist/hospital-a/... --data /srv/scans
    gptfl silo silo.yaml

    Interrupted, the same command goes on. Where the pre-flight finds a fault, the silo is enrolled all the same, and
    the exit code is that of gptfl check. An operator's or observer's line leaves operator.yaml in place of silo.yaml.
    """
    from gptfl_dist.run.joining import join as join_by

    text = line
    if line == "-":  # hidden, for who has the line can enrol
        text = getpass("invitation: ") if sys.stdin.isatty() else sys.stdin.readline()
    joined = join_by(text, folder, data, lambda told: typer.echo(told, err=True))
    if format_ is Format.json:
        findings = [finding.as_dict() for finding in joined.findings]
        told = {"role": joined.role, "name": joined.name, "file": str(joined.file), "findings": findings}
        typer.echo(json.dumps(told))
        _end_as(joined.findings)
        return
    who = called(joined.role, joined.name)
    typer.echo(f"enrolled as {who}; {joined.file} {'was written' if joined.written else 'was left as it is'}")
    for finding in joined.findings:
        typer.echo(finding.line())
    _end_as(joined.findings)
    typer.echo(f"next: gptfl {'silo' if joined.role == 'silo' else 'status'} {joined.file}")


def _end_as(findings: list[Finding]) -> None:
    """Ends as `gptfl check` does, where something is not in order yet."""
    failed = next((finding for finding in findings if finding.exit_code), None)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def requests(file: OperatorPath, format_: FormatOption = Format.text) -> None:
    """Who asks to enrol and waits for gptfl approve, where enrolment.approval is true."""
    from gptfl_dist.run.afar import do

    found = do(file, "requests")
    if format_ is Format.json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    for each in found:
        typer.echo(f"{called(each.role, each.name)}  key {each.key}  asked at {each.asked}")
    typer.echo("compare each key with the one that gptfl join shows, then: gptfl approve" if found else "nobody asks")


def approve(
    file: OperatorPath,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    key: Annotated[str, typer.Argument(metavar="KEY", help="the key that the other side told you", show_default=False)],
    role: RoleOption = InvitedRole.silo,
    format_: FormatOption = Format.text,
) -> None:
    """Let in who asks to enrol.

    \b
    gptfl approve federation.yaml hospital-a "1b5c 94a0 ..."
    """
    from gptfl_dist.exchange.base import Wish
    from gptfl_dist.run.afar import do

    do(file, "approve", Wish(role=role.value, name=name, key=key))
    told = {"role": role.value, "name": name, "approved": True}
    _print(format_, told, f"{called(role.value, name)} may enrol: its gptfl join goes on by itself")


def revoke(
    file: OperatorPath,
    name: Annotated[str, typer.Argument(metavar="[NAME]", show_default=False)] = "",
    role: RoleOption = InvitedRole.silo,
    serial: Annotated[
        str, typer.Option(show_default=False, help="one certificate alone; gptfl silos shows them, and gptfl operators")
    ] = "",
    reason: Annotated[str, typer.Option(metavar="TEXT", help="kept, and shown by gptfl silos")] = "",
    format_: FormatOption = Format.text,
) -> None:
    """Revoke somebody's certificates: they are cut off within a second, and what a silo was sending is refused.

    \b
    gptfl revoke federation.yaml hospital-a --reason "laptop stolen"
    gptfl revoke federation.yaml anna --role operator
    gptfl revoke federation.yaml --serial 3f2a...
    gptfl invite federation.yaml hospital-a      lets it in again, with a new key
    """
    from gptfl_dist.exchange.base import Wish
    from gptfl_dist.run.afar import do

    met = do(file, "revoke", Wish(role=role.value, name=name, serial=serial, reason=reason))
    revoked = [f"revoked: certificate {each.serial} of {called(each.role, each.name)}" for each in met]
    lines = revoked or ["the invitation is void"]
    _print(format_, [asdict(each) for each in met], "\n".join(lines))


def operators(file: OperatorPath, format_: FormatOption = Format.text) -> None:
    """Every operator and observer: whether they are invited, enrolled, revoked, or about to expire.

    \b
    gptfl operators federation.yaml
    """
    from gptfl_dist.run.afar import do

    found = do(file, "operators")
    if format_ is Format.json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    for each in found:
        typer.echo(f"{called(each.role, each.name)}  {', '.join(_standing(each))}")
    if not found:
        typer.echo("nobody is invited: gptfl invite --role operator, or --role observer")


def silos(file: OperatorPath, format_: FormatOption = Format.text) -> None:
    """Every silo: whether it is invited, enrolled, connected, behind, revoked, or about to expire.

    \b
    gptfl silos federation.yaml
    """
    from gptfl_dist.run import admission
    from gptfl_dist.run.afar import do, operator_file

    found = do(file, "silos")
    if operator_file(file) is None:  # the authority's folder is here
        for warning in admission.authority_warnings(file):
            typer.echo(f"warning: {warning}", err=True)
    if format_ is Format.json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    wide = max(len(each.silo) for each in found)
    for each in found:
        parts = _standing(each)
        parts += [] if each.connected is None else ["connected" if each.connected else "not connected"]
        parts += [f"{each.behind} rounds behind"] if each.behind else []
        typer.echo(f"{each.silo:{wide}}  {', '.join(parts)}")


def _standing(each: OperatorListed | SiloListed) -> list[str]:
    """How somebody stands with the authority, in words."""
    since = "at" if each.standing == "revoked" else "until"
    parts = [f"{each.standing} {since} {each.until}" if each.until else each.standing]
    parts += [f"({each.reason})"] if each.reason else []
    return parts + ([f"certificate {each.serial}"] if each.serial else [])


def _next(shown: AuthorityShown, file: Path) -> str:
    """What is left to do while two roots are trusted."""
    if len(shown.fingerprints) == 1:
        return ""
    finish = f"gptfl authority rotate {file} --finish"
    return f"\nthe root before it is trusted too; once all certificates were renewed, end that: {finish}"


def _minute(moment: str) -> str:
    """A moment for people; certificates may hold for hours alone."""
    return f"{datetime.fromisoformat(moment):%F %R} UTC"


def _to_be_signed(request: Path | str | None, file: Path) -> str:
    return f"{request}: have it signed, then: gptfl authority install {file} ..."


def _print(format_: Format, told: object, text: str) -> None:
    typer.echo(json.dumps(told) if format_ is Format.json else text)
