"""Two hospitals and a coordinator on hosts of their own, which are network namespaces: from empty folders to the end.

Between the hospitals and the coordinator there is no route, only a proxy that knows CONNECT, delays and stalls. So
nothing can dial a silo. Every byte on every interface is captured, and no private key is among them.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import secrets_on_the_wire
import yaml
from support import RULES, Command, Commands, Federation, wait_for

from gptfl_dist.config.document import dump_yaml

_PROXY_PORT = 3128
_LIFE = 30.0  # seconds that a certificate holds, and that the federation goes on for


class Hosts:
    """Namespaces for the coordinator and each silo, each joined by a cable to the proxy's and to no other."""

    def __init__(self, *names: str) -> None:
        self._mark = uuid.uuid4().hex[:6]
        self.address = {name: f"10.99.{number}.2" for number, name in enumerate(names, start=1)}
        self.proxy = {name: f"10.99.{number}.1" for number, name in enumerate(names, start=1)}
        for name in ("proxy", *names):
            self._ip("netns", "add", self.space(name))
            self._ip("-n", self.space(name), "link", "set", "lo", "up")
        for number, name in enumerate(names, start=1):
            near, far = f"p{self._mark}{number}", f"h{self._mark}{number}"
            self._ip("link", "add", near, "type", "veth", "peer", "name", far)
            for end, side, address in ((near, "proxy", self.proxy[name]), (far, name, self.address[name])):
                self._ip("link", "set", end, "netns", self.space(side))
                self._ip("-n", self.space(side), "address", "add", f"{address}/24", "dev", end)
                self._ip("-n", self.space(side), "link", "set", end, "up")

    def space(self, name: str) -> str:
        return f"gptfl-{self._mark}-{name}"

    def on(self, name: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.space(name))

    def remove(self) -> None:
        for name in ("proxy", *self.address):
            subprocess.run(["ip", "netns", "delete", self.space(name)], check=False)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts("coordinator", "silo-1", "silo-2")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root, and iproute2, to make network namespaces")
    yield made
    made.remove()


class Wire:
    """The capture of every byte on every interface of all hosts, and the private keys that were made on them."""

    def __init__(self, hosts: Hosts, gptfl: Commands, folder: Path) -> None:
        self._captured = []
        for name in ("proxy", *hosts.address):
            file = folder / f"{name}.capture"
            program = (sys.executable, str(Path(secrets_on_the_wire.__file__)))
            self._captured.append((gptfl.start(file, launcher=hosts.on(name), program=program), file))
        for command, _ in self._captured:
            wait_for(lambda: "capturing" in command.stdout)  # noqa: B023  (called at once)
        self.keys = folder / "keys"

    def stop(self) -> list[bytes]:
        """Each frame and each stream."""
        seen = []
        for command, file in self._captured:
            os.kill(command.process.pid, signal.SIGINT)
            assert command.wait() == 0, command.stderr
            assert ", 0 missed" in command.stdout
            seen += secrets_on_the_wire.told(file)
        return seen

    def secrets(self) -> list[bytes]:
        return [bytes.fromhex(line) for line in self.keys.read_text().split()]


def tell(hosts: Hosts, secret: bytes) -> None:
    """Sends a secret from a silo's host in two pieces of a stream, each of which says nothing yet."""
    body = b64encode(b"?" + secret)
    program = f"""
import socket, time
with socket.create_connection(("{hosts.proxy["silo-1"]}", {_PROXY_PORT})) as line:
    for piece in {[body[:9], body[9:18], body[18:27], body[27:]]}:
        line.sendall(piece)
        time.sleep(0.1)
"""
    subprocess.run([*hosts.on("silo-1"), sys.executable, "-c", program], check=True)


def test_from_empty_folders_to_a_finished_federation_behind_a_proxy_and_no_private_key_is_on_the_wire(
    hosts: Hosts, gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path
) -> None:
    wire = Wire(hosts, gptfl, tmp_path)
    # For so long that both silos renew their certificates.
    world = federation(epochs=2, federation={**RULES, "rounds": 9999, "max_time": f"{_LIFE:g}s"})
    content = yaml.safe_load(world.path.read_text())
    content["silos"] = [{"name": name} for name in world.silos]
    content["exchange"] = {"listen": "0.0.0.0:8443"}
    content["enrolment"] = {
        "hosts": [hosts.address["coordinator"]], "listen": "0.0.0.0:8444", "certificates": f"{_LIFE:g}s"
    }  # fmt: skip
    world.path.write_text(dump_yaml(content))
    proxy = gptfl.start(
        "0.0.0.0", str(_PROXY_PORT), launcher=hosts.on("proxy"),
        program=(sys.executable, str(Path(__file__).with_name("connect_proxy.py"))),
    )  # fmt: skip
    wait_for(lambda: "proxy ready" in proxy.stdout)

    def run_on(name: str, *words: str | Path) -> Command:
        through = {} if name == "coordinator" else {"https_proxy": f"http://{hosts.proxy[name]}:{_PROXY_PORT}"}
        program = (sys.executable, str(Path(__file__).with_name("keys_kept.py")), str(wire.keys))
        return gptfl.start(*words, launcher=hosts.on(name), program=program, **through)

    def done_on(name: str, *words: str | Path) -> Command:
        command = run_on(name, *words)
        assert command.wait() == 0, command.stderr
        return command

    # Four commands at the coordinator
    done_on("coordinator", "authority", "init", world.path)
    lines = {
        name: done_on("coordinator", "invite", world.path, name).stdout.strip().removeprefix("gptfl join ")
        for name in world.silos
    }
    coordinator = run_on("coordinator", "coordinator", world.path)
    wait_for(lambda: "enrolling invited silos" in coordinator.stderr)

    # Two at each silo
    silos = []
    for name, line in lines.items():
        home = tmp_path / name
        done_on(name, "join", line, "--folder", home, "--data", world.folder / f"{name}.npz")
        silos.append(run_on(name, "silo", home / "silo.yaml"))
    for command in (coordinator, *silos):
        assert command.wait() == 0, command.stderr
    rounds = world.summary()["arms"]["fedavg_random"]["curve"]
    assert len(rounds) > 1
    logs = [(tmp_path / name / f"{name}-work" / "agent.jsonl").read_text() for name in world.silos]
    assert all("the certificate was renewed" in log for log in logs)
    program = f"import socket; socket.create_connection(('{hosts.address['silo-1']}', 1), 5)"
    dialled = subprocess.run([*hosts.on("coordinator"), sys.executable, "-c", program], capture_output=True, text=True)
    assert "Network is unreachable" in dialled.stderr  # nothing can dial a silo

    # No private key of anybody's was on any wire; two that are told on purpose are found by the same search.
    decoys = [secrets.token_bytes(32) for _ in range(2)]
    for decoy in decoys:
        tell(hosts, decoy)
    made, seen = wire.secrets(), wire.stop()
    at_work = [path for name in world.silos for path in (tmp_path / name / "credentials").glob("key.pem*")]
    at_work += (world.folder / "authority").glob("*.key")
    assert len(at_work) == 4  # of two silos, root and issuing
    assert {secrets_on_the_wire.scalar(path.read_bytes()) for path in at_work} < set(made)
    assert len(made) >= len(at_work) + len(world.silos) + 1  # the silos' first keys, and the coordinator's own
    assert secrets_on_the_wire.found([*made, *decoys], seen) == decoys
