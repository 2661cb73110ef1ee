"""Whoever operates or observes a coordinator from another machine, by the commands that its own machine has."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support import RULES, Command, Commands, Federation, wait_for
from test_run_enrolment import Invited, invited  # noqa: F401  (a fixture)

from gptfl_dist.config.load import load_operator
from gptfl_dist.run import afar as afar_module
from gptfl_dist.run.afar import do


class Afar:
    """A federation with a coordinator at work, and people who are invited to it."""

    def __init__(self, world: Invited) -> None:
        self.world = world
        self.gptfl = world.gptfl
        self.coordinator = world.coordinator()

    def invited(self, name: str, role: str) -> Path:
        """The operator file of somebody who was invited and has joined."""
        line = self.gptfl.run("invite", self.world.federation.path, name, "--role", role).stdout.split()[-1]
        joined = self.gptfl.run("join", line, "--folder", self.world.home(name))
        assert f"enrolled as {role} {name}" in joined.stdout
        return self.world.home(name) / "operator.yaml"

    def told(self, command: str, file: Path, *arguments: str) -> Any:
        return json.loads(self.gptfl.run(command, file, *arguments, "--format", "json").stdout)

    def failing(self, *arguments: str | Path) -> tuple[int, str]:
        command = self.gptfl.start(*arguments)
        code = command.wait()
        assert "Traceback" not in command.stderr
        return code, command.stderr

    def taking_silos(self) -> None:
        wait_for(lambda: "taking silos" in self.coordinator.stderr)


@pytest.fixture
def afar(invited: Callable[..., Invited]) -> Callable[..., Afar]:  # noqa: F811  (that fixture)
    return lambda settings=None, **enrolment: Afar(invited(settings, **enrolment))


def killed(command: Command) -> None:
    os.kill(command.process.pid, signal.SIGTERM)
    command.wait()


def test_an_operator_does_from_afar_what_the_file_does_and_an_observer_only_looks(afar: Callable[..., Afar]) -> None:
    here = afar({"silos": 3, "epochs": 40, "federation": {**RULES, "rounds": 9999, "quorum": 2}})
    world, local = here.world, here.world.federation.path
    anna, ben = here.invited("anna", "operator"), here.invited("ben", "observer")
    assert (load_operator(anna).role, load_operator(ben).role) == ("operator", "observer")
    assert (anna.parent / "credentials" / "key.pem").stat().st_mode & 0o077 == 0
    for name in world.names:  # invited from afar
        line = here.gptfl.run("invite", anna, name).stdout.split()[-1]
        joined = world.join(name, line)
        assert joined.wait() == 0, joined.stdout + joined.stderr
    silos = {name: world.silo(name) for name in world.names}
    wait_for(lambda: "silo-3" in world.federation.owed(1), 120)

    wait_for(lambda: all(silo["connected"] for silo in here.told("silos", local)))
    for command in ("silos", "operators", "requests"):
        assert here.told(command, ben) == here.told(command, anna) == here.told(command, local)
    seen = here.told("status", ben)
    assert (seen["state"], seen["pid"]) == ("running", here.coordinator.process.pid)
    assert [silo["connected"] for silo in seen["silos"]] == [True] * 3
    listed = [(each["role"], each["name"], each["standing"]) for each in here.told("operators", local)]
    assert listed == [("observer", "ben", "enrolled"), ("operator", "anna", "enrolled")]
    assert "silo-1" in here.gptfl.run("silos", local).stdout
    assert "anna" not in here.gptfl.run("silos", local).stdout

    for forbidden in (("pause",), ("revoke", "silo-1")):
        code, said = here.failing(forbidden[0], ben, *forbidden[1:])
        assert code == 6
        assert f"the observer ben may not {forbidden[0]} at this coordinator: that takes a certificate of" in said
    code, said = here.failing("invite", anna, "eve", "--role", "operator")
    assert code == 6
    assert "the operator anna may not invite an operator at this coordinator: that is done on its machine alone" in said
    code, said = here.failing("invite", anna, "nobody")
    assert code == 2
    assert "has no silo nobody" in said

    paused = here.gptfl.run("pause", anna)
    assert f"gptfl resume {anna} lets it go on" in paused.stdout
    wait_for(lambda: here.told("status", ben)["state"] == "paused", 120)
    here.gptfl.run("resume", anna)
    here.gptfl.run("revoke", anna, "silo-3", "--reason", "laptop stolen")
    assert silos["silo-3"].wait(30) == 6
    (gone,) = wait_for(lambda: [s for s in here.told("status", ben)["silos"] if s["revoked"]])
    assert gone["name"] == "silo-3"
    text = here.gptfl.run("status", local).stdout
    assert any(line.split()[:2] == ["silo-3", "revoked"] for line in text.splitlines())
    assert "silo-3 is missing" not in text
    here.gptfl.run("abort", anna, "--reason", "wrong labels")
    assert here.coordinator.wait() == 12
    for name in ("silo-1", "silo-2"):
        assert silos[name].wait() == 0

    here.gptfl.run("audit", "verify", local)
    entries = [json.loads(line) for line in (world.federation.run_folder / "audit.jsonl").read_text().splitlines()]
    asked = [entry for entry in entries if entry["event"] == "asked from afar"]
    done = [entry["action"] for entry in asked if entry["by"] == "gptfl://tiny/operator/anna"]
    assert [action for action in done if action not in ("silos", "operators", "requests")] == [
        *(["invite"] * 4), "pause", "resume", "revoke", "abort",
    ]  # fmt: skip
    refused = {entry["action"] for entry in entries if entry["event"] == "refused"}
    assert refused == {"pause", "revoke", "invite an operator"}
    assert {entry["action"] for entry in asked if entry["by"] == "gptfl://tiny/observer/ben"} == {
        "silos", "operators", "requests", "status",
    }  # fmt: skip


def test_health_says_whether_silos_are_taken_here_and_from_afar(afar: Callable[..., Afar]) -> None:
    here = afar()
    local, anna = here.world.federation.path, here.invited("anna", "operator")
    here.taking_silos()
    wait_for(lambda: here.gptfl.start("health", local).wait() == 0)
    assert "it takes silos" in here.gptfl.run("health", local).stdout
    assert here.told("health", anna) == {"well": True, "why": "the coordinator takes silos"}
    here.gptfl.run("health", local, "--alive")
    killed(here.coordinator)
    assert here.failing("health", local)[0] == 1
    assert here.failing("health", local, "--alive")[0] == 1
    away = here.gptfl.start("health", anna)
    assert away.wait() == 1
    assert "does not answer" in away.stdout


def test_a_coordinator_that_is_away_and_files_of_another_kind_are_told_clearly(afar: Callable[..., Afar]) -> None:
    here = afar()
    anna = here.invited("anna", "operator")
    code, said = here.failing("silo", anna)
    assert code == 2
    assert f"{anna} looks like an operator file, expected a silo file" in said
    code, said = here.failing("coordinator", anna)
    assert code == 2
    assert "looks like an operator file, expected a federation file" in said
    checked = here.gptfl.run("check", anna)
    assert "those of the operator anna" in checked.stdout
    killed(here.coordinator)
    address = load_operator(anna).coordinator.address
    for command in ("status", "pause", "silos"):
        code, said = here.failing(command, anna)
        assert code == 6
        assert f"{address} does not answer: Connection refused" in said
    anna.write_text(anna.read_text().replace("operator", "observer", 1).replace("role: operator", "role: observer"))
    code, said = here.failing("status", anna)
    assert code == 6
    assert "is the certificate of gptfl://tiny/operator/anna, but" in said


def test_an_operators_certificate_renews_itself_as_it_is_used_and_can_be_revoked(
    afar: Callable[..., Afar], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = afar()
    anna = here.invited("anna", "operator")
    credentials = anna.parent / "credentials"

    def held() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in credentials.iterdir()}

    first = held()
    assert do(anna, "status").state == "running"
    assert held() == first  # it is not a day old
    monkeypatch.setattr(afar_module, "_RENEW_AFTER", timedelta(0))
    assert do(anna, "status").state == "running"
    renewed = held()
    assert renewed.keys() == first.keys()
    assert renewed["certificate.pem"] != first["certificate.pem"]
    assert renewed["key.pem"] != first["key.pem"]
    assert (credentials / "key.pem").stat().st_mode & 0o077 == 0
    monkeypatch.undo()
    assert do(anna, "status").state == "running"
    told = here.gptfl.run("revoke", here.world.federation.path, "anna", "--role", "operator", "--reason", "left us")
    assert told.stdout.count("of operator anna") == 2
    code, said = here.failing("status", anna)
    assert code == 6
    assert "was revoked at" in said
    (listed,) = here.told("operators", here.world.federation.path)
    assert (listed["standing"], listed["reason"]) == ("revoked", "left us")


def test_whoever_is_to_operate_is_approved_of_on_the_coordinators_machine(
    afar: Callable[..., Afar], gptfl: Commands
) -> None:
    here = afar(approval=True)
    local = here.world.federation.path
    line = gptfl.run("invite", local, "anna", "--role", "operator").stdout.split()[-1]
    joining = gptfl.start("join", line, "--folder", here.world.home("anna"))
    wait_for(lambda: "tell the coordinator's operator your key" in joining.stderr)
    (asks,) = here.told("requests", local)
    assert (asks["role"], asks["name"]) == ("operator", "anna")
    assert here.failing("approve", local, "anna", asks["key"])[0] == 6  # no silo asks
    gptfl.run("approve", local, "anna", asks["key"], "--role", "operator")
    assert joining.wait() == 0
    here.gptfl.run("status", here.world.home("anna") / "operator.yaml")


def test_a_run_that_was_not_started_has_its_silos_in_the_metrics(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation(silos=3)
    assert "\ngptfl_silos 3.0\n" in gptfl.run("metrics", mine.path, "--once").stdout
