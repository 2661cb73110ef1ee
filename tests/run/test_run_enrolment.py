"""From empty folders to a finished federation by invitation, and what the operator does on the way."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import secrets_on_the_wire
import yaml
from cryptography import x509
from hospital import Hospital, pem
from opened_line import OpenedLine
from secrets_on_the_wire import scalar
from support import RULES, Command, Commands, Federation, free_port, listens, wait_for

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.security.authority import Credentials, key_bytes, new_key
from gptfl_dist.security.credentials import load_credentials
from gptfl_dist.security.vault import Vault

_LIFE = int(os.environ.get("GPTFL_CERTIFICATE_LIFE", "20"))  # seconds
# For how many of them the federation goes on, and how often each certificate is renewed at least: at two thirds of one.
_LIVES, _RENEWALS = (4, 5) if "GPTFL_CERTIFICATE_LIFE" in os.environ else (2, 2)


class Invited:
    """A federation whose silos are invited, each with a folder of its own."""

    def __init__(self, federation: Federation, gptfl: Commands, folder: Path, **enrolment: Any) -> None:
        self.federation = federation
        self.gptfl = gptfl
        self.folder = folder
        self.names = federation.silos
        self.keys = folder / "keys"
        """The private keys that were made by the sides' own commands, a line of hex each."""
        self._keeping = {"program": (sys.executable, str(Path(__file__).with_name("keys_kept.py")), str(self.keys))}
        self.ports = {"exchange": free_port(), "enrolment": free_port()}
        content = yaml.safe_load(federation.path.read_text())
        content |= {
            "silos": [{"name": name} for name in self.names],
            "exchange": {"listen": f"127.0.0.1:{self.ports['exchange']}"},
            "enrolment": {"hosts": ["localhost"], "listen": f"127.0.0.1:{self.ports['enrolment']}", **enrolment},
        }
        federation.path.write_text(dump_yaml(content))

    def begin(self) -> Invited:
        """Makes the authority."""
        self.gptfl.run("authority", "init", self.federation.path)
        return self

    def tell(self, *arguments: str | Path) -> Any:
        """What a command about this federation prints as JSON."""
        return json.loads(self.gptfl.run(*arguments, self.federation.path, "--format", "json").stdout)

    def invitation(self, name: str) -> str:
        return self.gptfl.run("invite", self.federation.path, name).stdout.split()[-1]

    def home(self, name: str) -> Path:
        return self.folder / name

    def join(self, name: str, line: str) -> Command:
        data = self.federation.folder / f"{name}.npz"
        return self.gptfl.start("join", line, "--folder", self.home(name), "--data", data, **self._keeping)

    def coordinator(self) -> Command:
        command = self.gptfl.start("coordinator", self.federation.path, **self._keeping)
        wait_for(lambda: "enrolling invited silos" in command.stderr)
        return command

    def silo(self, name: str, port: int | None = None) -> Command:
        """`port` is another way to the coordinator."""
        path = self.home(name) / "silo.yaml"
        settings = yaml.safe_load(path.read_text())
        settings |= {"device": "cpu"}
        settings["data"]["validation_share"] = 0.25
        if port is not None:
            settings["coordinator"]["address"] = f"localhost:{port}"
        path.write_text(dump_yaml(settings))
        return self.gptfl.start("silo", path, **self._keeping)

    def standings(self) -> dict[str, str]:
        return {silo["silo"]: silo["standing"] for silo in self.tell("silos")}


@pytest.fixture
def invited(gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path) -> Callable[..., Invited]:
    def make(settings: dict[str, Any] | None = None, **enrolment: Any) -> Invited:
        return Invited(federation(**settings or {}), gptfl, tmp_path, **enrolment).begin()

    return make


def test_an_authority_of_ones_own_institution_renews_the_issuing_certificate_under_a_federation_at_work(
    gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path
) -> None:
    """The first is about to end, which is said everywhere; the second is installed while silos are at work."""
    training = {"batch_size": 8, "learning_rate": 0.01, "warm_up_rounds": 0, "epochs": 1}
    world = Invited(federation(training=training, federation={**RULES, "rounds": 2}), gptfl, tmp_path)
    path, root, chain = world.federation.path, tmp_path / "root.pem", tmp_path / "chain.pem"
    hospital = Hospital()
    root.write_bytes(pem(hospital.root))

    def signed_for(request: str, **days: int) -> None:
        lives = {name: timedelta(days=count) for name, count in days.items()}
        chain.write_bytes(hospital.sign(Path(request).read_bytes(), **lives))
        gptfl.run("authority", "install", path, chain, root)

    made = gptfl.run("authority", "init", path, "--external", "--format", "json").stdout
    signed_for(json.loads(made)["request"], age=90, valid=9)
    assert "issuing certificate ends in" in gptfl.run("authority", "rotate", path, "--format", "json").stdout
    shown = gptfl.run("authority", "show", path).stdout
    assert "warning      the issuing certificate ends in" in shown
    assert "issuing.csr: have it signed, then: gptfl authority install" in shown
    assert "warning: the issuing certificate ends in" in gptfl.run("silos", path).stderr

    coordinator = world.coordinator()
    wait_for(lambda: "the issuing certificate ends in" in coordinator.stderr)
    silos = []
    for name in world.names:  # the first joins below the old certificate, the second below the new one
        joined = world.join(name, world.invitation(name))
        assert joined.wait() == 0, joined.stderr
        silos.append(world.silo(name))
        if name == world.names[0]:
            wait_for(lambda: "connected to the run" in silos[0].stderr)
            assert "the issuing certificate ends in" in silos[0].stderr
            signed_for(world.tell("authority", "show")["request"], age=0, valid=90)
    for command in (coordinator, *silos):
        assert command.wait() == 0, command.stderr
    assert "the issuing certificate ends in" not in silos[1].stderr
    after = world.tell("authority", "show")
    assert (after["request"], after["warnings"]) == (None, [])
    issuers = {name: chain_of(world.home(name) / "credentials" / "certificate.pem")[1] for name in world.names}
    assert len(set(issuers.values())) == 2


def test_while_two_roots_are_trusted_the_authority_says_what_ends_that(
    invited: Callable[..., Invited], gptfl: Commands
) -> None:
    path = invited().federation.path
    finish = f"end that: gptfl authority rotate {path} --finish"
    for words in (("rotate", path), ("show", path)):
        assert finish in gptfl.run("authority", *words).stdout
    for words in (("rotate", path, "--finish"), ("show", path)):
        assert "--finish" not in (told := gptfl.run("authority", *words).stdout)
    assert re.search(r"^issues until \d{4}-\d\d-\d\d \d\d:\d\d UTC$", told, re.MULTILINE)


def chain_of(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


def test_silos_join_by_invitation_and_no_private_key_leaves_its_machine(
    invited: Callable[..., Invited], undisturbed: Federation
) -> None:
    world = invited()
    assert set(world.standings().values()) == {"not invited"}
    lines = {name: world.invitation(name) for name in world.names}
    assert set(world.standings().values()) == {"invited"}
    coordinator = world.coordinator()
    for name, line in lines.items():
        joined = world.join(name, line)
        assert joined.wait() == 0, joined.stderr
        assert f"enrolled as {name}" in joined.stdout
        assert "FAILED" not in joined.stdout.upper()
    assert set(world.standings().values()) == {"enrolled"}
    wait_for(lambda: not listens(world.ports["enrolment"]), seconds=15)  # the coordinator waits for its silos still
    assert coordinator.process.poll() is None
    silos = [world.silo(name) for name in world.names]
    for command in (coordinator, *silos):
        assert command.wait() == 0, command.stderr
    assert world.federation.result() == undisturbed.result()

    keys = {name: (world.home(name) / "credentials" / "key.pem") for name in world.names}
    secrets = {name: path.read_bytes().splitlines()[1] for name, path in keys.items()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys.values())
    for name, secret in secrets.items():
        found = subprocess.run(["grep", "-rlF", secret.decode(), str(world.folder)], capture_output=True, text=True)
        assert found.stdout.split() == [str(keys[name])]


@pytest.mark.timeout(_LIFE * _LIVES + 300)
def test_certificates_renew_themselves_no_round_is_lost_and_no_private_key_passes_inside_tls(
    invited: Callable[..., Invited],
) -> None:
    """Between the sides stands who opens TLS with certificates of both, and keeps what he reads."""
    rules = {**RULES, "rounds": 9999, "max_time": f"{_LIFE * _LIVES:g}s"}
    world = invited({"federation": rules}, certificates=f"{_LIFE}s")
    folder = world.federation.folder / "authority"
    shown = Vault(folder, "tiny").open(timedelta(days=1)).issue_coordinator(["localhost"])

    def credentials(name: str) -> Credentials:
        home = world.home(name) / "credentials"
        return load_credentials(*(home / f"{each}.pem" for each in ("authority", "certificate", "key")))[0]

    coordinator = world.coordinator()
    with (
        OpenedLine(world.ports["enrolment"], shown, None) as enrolment,
        OpenedLine(world.ports["exchange"], shown, credentials) as exchange,
    ):
        silos = []
        for name in world.names:
            line = world.invitation(name).replace(f":{world.ports['enrolment']}/", f":{enrolment.port}/")
            assert world.join(name, line).wait() == 0
            silos.append(world.silo(name, exchange.port))  # at once, for the certificate does not hold for long
        decoy = new_key()
        tell(enrolment.port, json.dumps({"key": key_bytes(decoy).decode()}))
        for command in (coordinator, *silos):
            assert command.wait(_LIFE * _LIVES + 240.0) == 0, command.stderr
    passed = [bytes(said) for said in (*enrolment.passed, *exchange.passed)]
    requests = sum(said.count(b"BEGIN CERTIFICATE REQUEST") for said in passed)
    assert requests >= len(world.names) * (1 + _RENEWALS)
    made = [bytes.fromhex(line) for line in world.keys.read_text().split()]
    assert len(made) >= requests
    told = scalar(key_bytes(decoy))
    assert secrets_on_the_wire.found([*made, told], passed) == [told]
    assert "silo-1 left" not in coordinator.stderr  # it moves to a new connection, which nobody notices
    rounds = len(world.federation.summary()["arms"]["fedavg_random"]["curve"])
    for name in world.names:
        log = (world.home(name) / f"{name}-work" / "agent.jsonl").read_text()
        assert log.count("the certificate was renewed") >= _RENEWALS
        told = world.gptfl.run("audit", "show", world.federation.path, "--silo", name).stdout
        assert told.count("  update accepted  ") == rounds
        assert told.count("  certificate renewed  ") == log.count("the certificate was renewed")
        assert "refused" not in told
        assert "failed" not in told
        assert "not connected" not in log.partition("connected to the run")[2]


def tell(port: int, body: str) -> None:
    """Sends a body to the enrolment port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    line = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
    line.request("POST", "/v1/enrol", body)
    assert line.getresponse().status == 403
    line.close()


def test_a_revoked_silo_is_out_at_once_and_the_others_go_on(invited: Callable[..., Invited]) -> None:
    world = invited({"silos": 3, "epochs": 40, "federation": {**RULES, "rounds": 4, "quorum": 2}})
    coordinator = world.coordinator()
    for name in world.names:
        assert world.join(name, world.invitation(name)).wait() == 0
    silos = {name: world.silo(name) for name in world.names}
    wait_for(lambda: "silo-3" in world.federation.owed(2))
    told = world.gptfl.run("revoke", world.federation.path, "silo-3", "--reason", "laptop stolen")
    started = time.monotonic()
    assert "certificate" in told.stdout
    assert silos["silo-3"].wait(20) == 6
    assert time.monotonic() - started < 5
    assert "was revoked" in silos["silo-3"].stderr
    log = (world.home("silo-3") / "silo-3-work" / "agent.jsonl").read_text()
    assert "was revoked" in log.partition("this silo ends: ")[2]
    assert silos["silo-3"].stderr.count("was revoked") == 1
    for command in (coordinator, silos["silo-1"], silos["silo-2"]):
        assert command.wait() == 0, command.stderr
    world.gptfl.run("audit", "verify", world.federation.path)
    shown = world.gptfl.run("audit", "show", world.federation.path, "--silo", "silo-3").stdout
    events = ("silo invited", "silo enrolled", "silo connected", "update accepted", "certificate revoked")
    places = [shown.find(event) for event in events]
    assert -1 not in places
    assert places == sorted(places)
    (listed,) = [silo for silo in world.tell("silos") if silo["silo"] == "silo-3"]
    assert (listed["standing"], listed["reason"]) == ("revoked", "laptop stolen")


def test_a_silo_that_is_revoked_between_rounds_is_invited_anew_and_the_run_comes_to_its_end(
    invited: Callable[..., Invited], undisturbed: Federation
) -> None:
    """All are needed. The coordinator waits, also once it was started again, and so enrols the silo."""
    world = invited()
    path = world.federation.path
    assert f"gptfl coordinator {path}" in world.gptfl.run("status", path).stdout
    coordinator = world.coordinator()
    for name in world.names:
        assert world.join(name, world.invitation(name)).wait() == 0
    world.gptfl.run("pause", path)
    silos = {name: world.silo(name) for name in world.names}
    wait_for(lambda: all(silo["connected"] for silo in world.tell("silos")))
    world.gptfl.run("revoke", path, "silo-2")
    assert silos["silo-2"].wait(20) == 6
    world.gptfl.run("resume", path)
    wait_for(lambda: "no quorum without silo-2" in coordinator.stderr)
    os.kill(coordinator.process.pid, signal.SIGTERM)
    assert coordinator.wait() == 130
    coordinator = world.coordinator()
    wait_for(lambda: "no quorum without silo-2" in coordinator.stderr)
    (world.home("silo-2") / "credentials").rename(world.folder / "revoked")
    assert world.join("silo-2", world.invitation("silo-2")).wait() == 0
    silos["silo-2"] = world.silo("silo-2")
    for command in (coordinator, *silos.values()):
        assert command.wait() == 0, command.stderr
    assert world.federation.result() == undisturbed.result()


def test_an_operator_approves_of_a_key_and_the_silo_waits_for_it(invited: Callable[..., Invited]) -> None:
    world = invited(approval=True)
    coordinator = world.coordinator()
    joining = world.join("silo-1", world.invitation("silo-1"))
    wait_for(lambda: "tell the coordinator's operator your key" in joining.stderr)
    (asks,) = world.tell("requests")
    assert (asks["role"], asks["name"]) == ("silo", "silo-1")
    assert asks["key"] in joining.stderr
    assert world.standings()["silo-1"] == "asks"
    os.kill(joining.process.pid, signal.SIGINT)
    assert joining.wait() == 130
    world.gptfl.run("approve", world.federation.path, "silo-1", asks["key"])
    os.kill(coordinator.process.pid, signal.SIGTERM)
    assert coordinator.wait() == 130


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("invite", "FILE", "nobody"), 2, "has no silo nobody"),
        (("revoke", "FILE", "silo-1"), 6, "there is no certificate to revoke of silo-1"),
        (("revoke", "FILE"), 2, "give a name or --serial"),
        (("approve", "FILE", "silo-1", "abcd"), 6, "nobody asks to be silo-1"),
        (("authority", "init", "FILE"), 10, "there is an authority already"),
        (("authority", "install", "FILE", "/nowhere", "/nowhere"), 6, "/nowhere"),
        (("join", "hello"), 2, "this is no invitation"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    invited: Callable[..., Invited], arguments: tuple[str, ...], code: int, said: str
) -> None:
    world = invited()
    given = [str(world.federation.path) if argument == "FILE" else argument for argument in arguments]
    command = world.gptfl.start(*given)
    assert command.wait() == code, command.stderr
    assert said in command.stderr
    assert "Traceback" not in command.stderr


def test_a_file_without_the_section_says_what_to_add(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    command = gptfl.start("invite", federation().path, "silo-1")
    assert command.wait() == 2
    assert "has no section enrolment" in command.stderr
