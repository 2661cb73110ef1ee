"""`gptfl credentials`, `gptfl coordinator` and `gptfl silo`: each side by itself, as institutions run them."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from audited import each_once, events
from support import Command, Commands, Federation, free_port, wait_for

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.run.audit import audit_of


def _change(path: Path, **settings: Any) -> None:
    content = yaml.safe_load(path.read_text())
    path.write_text(dump_yaml({**content, **settings}))


class Sides:
    """A federation whose sides are started one by one."""

    def __init__(self, federation: Federation, gptfl: Commands) -> None:
        self.federation = federation
        self._gptfl = gptfl
        self.port = free_port()
        # The silos' own files do not stand in the federation file: the coordinator never sees them.
        _change(federation.path, silos=[{"name": name} for name in federation.silos])
        self.issue("credentials")

    def issue(self, sets: str) -> None:
        """Makes certificates in the folder `sets` and names them in the files."""
        folder, address = self.federation.folder, f"localhost:{self.port}"
        self._gptfl.run("credentials", self.federation.path, "--host", "localhost", "--out", folder / sets)

        def set_of(name: str) -> dict[str, str]:
            return {part: f"{sets}/{name}/{part}.pem" for part in ("authority", "certificate", "key")}

        _change(self.federation.path, exchange={"listen": address, **set_of("coordinator")})
        for name in self.federation.silos:
            _change(folder / f"{name}.yaml", coordinator={"address": address, **set_of(name)})

    def coordinator(self) -> Command:
        return self._gptfl.start("coordinator", self.federation.path)

    def silo(self, name: str) -> Command:
        return self._gptfl.start("silo", self.federation.folder / f"{name}.yaml")


@pytest.fixture
def sides(gptfl: Commands, federation: Callable[..., Federation]) -> Sides:
    return Sides(federation(), gptfl)


def _finish(*commands: Command) -> None:
    for command in commands:
        assert command.wait() == 0, command.stderr
        assert command.alive() == {}


def test_a_late_silo_is_waited_for_and_a_killed_one_comes_back_in_its_round(
    sides: Sides, undisturbed: Federation
) -> None:
    coordinator, first = sides.coordinator(), sides.silo("silo-1")
    wait_for(lambda: "taking silos at localhost" in coordinator.stderr)
    wait_for(lambda: "connected to the run" in _log(sides, "silo-1"))
    assert sides.federation.owed(1) == set()  # the cohort is not complete

    second = sides.silo("silo-2")
    wait_for(lambda: "silo-2" in sides.federation.owed(2))
    os.kill(second.process.pid, signal.SIGKILL)
    second.wait_until_gone()
    again = sides.silo("silo-2")
    _finish(coordinator, first, again)
    assert "the federation is finished" in first.stderr
    assert sides.federation.result() == undisturbed.result()


def test_a_killed_coordinator_goes_on_in_its_round_and_silos_come_back(sides: Sides, undisturbed: Federation) -> None:
    coordinator = sides.coordinator()
    silos = [sides.silo(name) for name in sides.federation.silos]
    wait_for(lambda: sides.federation.owed(2))
    os.kill(coordinator.process.pid, signal.SIGKILL)
    coordinator.wait_until_gone()
    assert audit_of(sides.federation.run_folder).faults == []
    again = sides.coordinator()
    _finish(again, *silos)
    assert sides.federation.result() == undisturbed.result()
    audit = audit_of(sides.federation.run_folder)
    assert audit.faults == []
    each_once(audit)
    assert [len(events(audit, f"run {what}")) for what in ("started", "resumed", "ended")] == [1, 1, 1]
    for name in sides.federation.silos:
        accepted = [entry for entry in events(audit, "update accepted") if entry["silo"] == name]
        assert [entry["round"] for entry in accepted] == [1, 2, 3]  # none was asked for twice
        assert "connected again" in _log(sides, name)


def test_a_run_goes_on_with_new_certificates(sides: Sides, undisturbed: Federation) -> None:
    coordinator = sides.coordinator()
    silos = [sides.silo(name) for name in sides.federation.silos]
    wait_for(lambda: sides.federation.owed(2))
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.wait() == 130
    sides.issue("new-credentials")
    again = sides.coordinator()
    for silo in silos:  # with the old set
        assert silo.wait() == 6
        assert "is not one to trust" in silo.stderr
    _finish(again, *(sides.silo(name) for name in sides.federation.silos))
    assert sides.federation.result() == undisturbed.result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_silo_tries_to_reach_its_coordinator_until_it_is_stopped_and_says_so_once(
    sides: Sides, number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", sides.port)) as nobody:
        nobody.settimeout(60)
        silo = sides.silo("silo-1")
        for connection in range(6):  # three tries: gRPC's connection, and the one that finds out why it failed
            line = nobody.accept()[0]
            if connection in (2, 3):  # ends with a reset, as it does where the silo's first bytes are there already
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.close()
    assert silo.stderr.count("not connected: ") == 1
    assert "hangs up during the TLS handshake" in silo.stderr
    assert "UNAVAILABLE" not in silo.stderr
    os.kill(silo.process.pid, number)
    assert silo.wait(10) == 130
    assert "the same command goes on" in silo.stderr
    assert silo.alive() == {}


def test_other_settings_are_refused_before_a_port_is_opened(sides: Sides) -> None:
    coordinator = sides.coordinator()
    wait_for(lambda: "taking silos at localhost" in coordinator.stderr)
    twin = sides.coordinator()
    assert twin.wait(60) == 10
    assert "another coordinator is at work on this run" in twin.stderr
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.wait() == 130
    _change(sides.federation.path, seed=4711)
    other = sides.coordinator()
    assert other.wait() == 2
    assert "holds a run of other settings" in other.stderr
    assert "answering operators" in coordinator.stderr
    assert "answering operators" not in twin.stderr + other.stderr


def test_a_second_process_in_a_silos_work_folder_is_refused_and_the_first_goes_on(sides: Sides) -> None:
    first = sides.silo("silo-1")
    wait_for(lambda: "not connected: " in first.stderr)
    second = sides.silo("silo-1")
    assert second.wait(60) == 10
    assert f"{sides.federation.folder / 'silo-1-work'}: another process is at work there for a silo" in second.stderr
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait_until_gone()
    third = sides.silo("silo-1")
    wait_for(lambda: "not connected: " in third.stderr)
    assert third.process.poll() is None


def _log(sides: Sides, silo: str) -> str:
    log = sides.federation.folder / f"{silo}-work" / "agent.jsonl"
    return log.read_text() if log.exists() else ""
