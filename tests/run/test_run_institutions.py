"""Two hospitals and a coordinator on hosts of their own, which are network namespaces: from empty folders to the end.

Between the hospitals and the coordinator there is no route, only a proxy that knows CONNECT, delays and stalls. So
nothing can dial a silo.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from support import GPTFL, RULES, Command, Commands, Federation, wait_for

from gptfl_dist.config.document import dump_yaml

_PROXY_PORT = 3128


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


def test_from_empty_folders_to_a_finished_federation_behind_a_proxy(
    hosts: Hosts, gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path
) -> None:
    world = federation(federation={**RULES, "rounds": 2})
    content = yaml.safe_load(world.path.read_text())
    content["silos"] = [{"name": name} for name in world.silos]
    content["exchange"] = {"listen": "0.0.0.0:8443"}
    content["enrolment"] = {"hosts": [hosts.address["coordinator"]], "listen": "0.0.0.0:8444"}
    world.path.write_text(dump_yaml(content))
    proxy = gptfl.start(
        "0.0.0.0", str(_PROXY_PORT), launcher=hosts.on("proxy"),
        program=(sys.executable, str(Path(__file__).with_name("connect_proxy.py"))),
    )  # fmt: skip
    wait_for(lambda: "proxy ready" in proxy.stdout)

    def run_on(name: str, *words: str | Path) -> Command:
        through = {} if name == "coordinator" else {"https_proxy": f"http://{hosts.proxy[name]}:{_PROXY_PORT}"}
        return gptfl.start(*words, launcher=hosts.on(name), program=GPTFL, **through)

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
    assert len(world.summary()["arms"]["fedavg_random"]["curve"]) == 2
    program = f"import socket; socket.create_connection(('{hosts.address['silo-1']}', 1), 5)"
    dialled = subprocess.run([*hosts.on("coordinator"), sys.executable, "-c", program], capture_output=True, text=True)
    assert "Network is unreachable" in dialled.stderr  # nothing can dial a silo
