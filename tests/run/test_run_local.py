"""`gptfl run FILE`: real processes on this machine that speak gRPC with mutual TLS."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3
from support import RULES, Command, Commands, Federation, wait_for

from gptfl_dist.errors import TrainerLost
from gptfl_dist.learning.group import PLACE
from gptfl_dist.weights import WeightsFile

_PORT = re.compile(r"gRPC with mutual TLS on 127\.0\.0\.1:(\d+)")


@dataclass
class Watched:
    """A run, and what was seen of it in its second round."""

    federation: Federation
    commands: Commands
    command: Command
    processes: dict[int, str]
    trainers_places: list[str]
    connected: dict[int, int]
    without_tls: bytes
    without_certificate: bytes
    coordinator: dict[str, str]
    fresh_beside_it: Command


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    commands = Commands(tmp_path_factory.mktemp("output"))
    federation = Federation(tmp_path_factory.mktemp("watched"), epochs=40)
    command = commands.start("run", federation.path)
    wait_for(lambda: federation.owed(2) or command.process.poll() is not None)
    port = int(_PORT.search(command.stderr)[1])
    processes = command.alive()
    watched = Watched(
        federation,
        commands,
        command,
        processes,
        sorted(_variable(pid, PLACE) for pid, words in processes.items() if "gptfl_dist.run.trainer" in words),
        {pid: _connections(pid, port) for pid in processes},
        _speak_plain(port),
        _connect_without_certificate(port),
        _certificate(port, federation.run_folder / "silos" / "silo-1" / "credentials" / "authority.pem"),
        commands.start("run", federation.path, "--fresh"),
    )
    assert command.wait() == 0, command.stderr
    yield watched
    commands.kill()


def _connections(pid: int, port: int) -> int:
    """How many TCP connections to `port` this process has."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(str(fd.readlink()))
        except FileNotFoundError:
            continue
    found = 0
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            found += int(fields[2].rpartition(":")[2], 16) == port and f"socket:[{fields[9]}]" in sockets
    return found


def _variable(pid: int, name: str) -> str:
    """What an environment variable of this process says."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(each.partition("=")[::2] for each in variables)[name]


def _speak_plain(port: int) -> bytes:
    """What the port answers to HTTP/2 without TLS."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        try:
            return plain.recv(64)
        except ConnectionError:
            return b""


def _connect_without_certificate(port: int) -> bytes:
    """What a client that shows no certificate is sent; nothing where the connection ends with an alert or a reset."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            with context.wrap_socket(raw) as secured:
                return secured.recv(64)
        except (ssl.SSLError, ConnectionError):
            return b""


def _certificate(port: int, authority: Path) -> dict[str, str]:
    """TLS version and name of the coordinator, as a silo of the run that trusts its authority sees them."""
    folder = authority.parent
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secured,
    ):
        names = dict(secured.getpeercert()["subjectAltName"])
        return {"version": str(secured.version()), "uri": names["URI"], "first": secured.recv(16).hex()}


def test_coordinator_agents_and_trainers_are_processes_of_their_own(watched: Watched) -> None:
    roles = {
        "coordinator": "gptfl_dist run ",
        "agent": "gptfl_dist silo ",
        "trainer": "gptfl_dist.run.trainer",
        "evaluator": "gptfl_dist.run.evaluator",
    }
    counted = {role: sum(part in command for command in watched.processes.values()) for role, part in roles.items()}
    assert counted == {"coordinator": 1, "agent": 2, "trainer": 2, "evaluator": 1}
    assert len(watched.processes) == sum(counted.values())


def test_trainers_know_their_places_on_the_machine_by_which_they_share_out_its_gpus(watched: Watched) -> None:
    assert watched.trainers_places == ["0", "1"]


def test_nobody_else_enters_a_silos_work_folder(watched: Watched) -> None:
    for silo in watched.federation.silos:
        assert (watched.federation.run_folder / "silos" / silo).stat().st_mode & 0o777 == 0o700


def test_agents_alone_are_connected_to_the_coordinator(watched: Watched) -> None:
    agents = {pid for pid, command in watched.processes.items() if "gptfl_dist silo " in command}
    assert {pid for pid, count in watched.connected.items() if count} == agents


def test_the_port_speaks_tls_1_3_with_the_authoritys_certificates_only(watched: Watched) -> None:
    assert not watched.without_tls.startswith(b"\0\0")  # no HTTP/2 settings frame
    assert watched.without_certificate == b""  # the coordinator hangs up
    assert watched.coordinator["version"] == "TLSv1.3"
    assert "coordinator" in watched.coordinator["uri"]
    assert watched.coordinator["first"][6:8] == "04"  # an HTTP/2 settings frame: this silo was let in


def test_fresh_leaves_a_run_alone_that_is_at_work(watched: Watched) -> None:
    assert watched.fresh_beside_it.wait() == 10
    assert "another coordinator is at work" in watched.fresh_beside_it.stderr


def test_the_summary_tells_what_was_run_and_what_it_cost(watched: Watched) -> None:
    summary = watched.federation.summary()
    arm = summary["arms"]["fedavg_random"]
    assert (summary["run"], summary["transport"], summary["silos"], summary["seed"]) == ("tiny", "grpc+mtls", 2, 0)
    assert set(summary["arms"]) == {"fedavg_random"}
    assert (arm["rounds"], len(arm["curve"])) == (3, 3)
    # Each round hands the weights to both silos and takes an update of that size from each; the final weights
    # are handed out once more, to be evaluated.
    assert arm["bytes_up"] == 3 * 2 * summary["model_bytes"]
    assert arm["bytes_down"] == 4 * 2 * summary["model_bytes"]
    assert summary["target_accuracy"] == max(arm["curve"])
    assert arm["curve"][arm["rounds_to_target"] - 1] >= summary["target_accuracy"]
    assert summary["seconds"]["fedavg_random"] > 0


def test_it_learns(watched: Watched) -> None:
    arm = watched.federation.summary()["arms"]["fedavg_random"]
    assert arm["start_accuracy"] <= 0.6
    assert arm["accuracy"] >= 0.9


def test_the_models_load_and_are_those_of_the_summary(watched: Watched) -> None:
    from safetensors import safe_open

    told = watched.federation.summary()
    for name, digest in (
        ("fedavg_random-final", told["weights"]["fedavg_random"]["final"]),
        ("fedavg_random", told["weights"]["fedavg_random"]["best"]),
    ):
        path = watched.federation.run_folder / "models" / f"{name}.safetensors"
        with safe_open(path, framework="np") as model:
            tensors = {key: model.get_tensor(key) for key in model.keys()}  # noqa: SIM118  (it is no dict)
        assert sum(tensor.size for tensor in tensors.values()) == told["parameters"]
        with WeightsFile(path) as weights:
            flat = weights.read(0, weights.nbytes)
        assert blake3(flat).hexdigest() == digest


def test_the_report_is_there_and_whole(watched: Watched) -> None:
    report = (watched.federation.run_folder / "report.html").read_text()
    assert report.rstrip().endswith("</html>")


def test_no_key_of_the_authority_is_left_and_no_unfinished_file(watched: Watched) -> None:
    files = [path for path in watched.federation.folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".part" or path.name == "incoming.safetensors"] == []
    assert {path.name for path in files if path.suffix == ".pem"} == {"authority.pem", "certificate.pem", "key.pem"}
    keys = [path for path in files if path.name == "key.pem"]
    assert [path.parent.parent.name for path in sorted(keys)] == ["silo-1", "silo-2"]


def test_a_key_that_a_killed_run_had_half_written_is_removed(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation(epochs=1)
    left = mine.run_folder / "silos" / "silo-1" / "credentials" / ".key.pem.4711.part"
    left.parent.mkdir(parents=True)
    left.write_text("-----BEGIN PRIVATE KEY-----")
    gptfl.run("run", mine.path)
    assert list(mine.folder.rglob("*.part")) == []


def test_the_logs_say_what_trainer_and_evaluator_work_with(watched: Watched) -> None:
    folder = watched.federation.run_folder
    first, *rounds = (folder / "silos" / "silo-1" / "trainer.log").read_text().splitlines()
    assert first.endswith("INFO silo-1: device cpu, 150 samples to train on, 50 to validate, 13,186 parameters")
    told = [line.partition(" INFO ")[2] for line in rounds]
    assert told == [f"round {number}: 40 epochs on 150 samples, threads 1" for number in (1, 2, 3)]
    (line,) = (folder / "logs" / "evaluator.log").read_text().splitlines()
    assert line.endswith("INFO tests on 16 samples: device cpu, threads 1")


def test_a_second_call_returns_what_was_found_as_json_and_fresh_makes_it_anew(watched: Watched) -> None:
    federation = watched.federation
    before = federation.summary()
    again = watched.commands.run("run", federation.path, "--format", "json")
    assert json.loads(again.stdout) == before
    assert "--fresh" in again.stderr
    assert federation.summary() == before

    watched.commands.run("run", federation.path, "--fresh")
    anew = federation.summary()
    assert anew["started"] > before["finished"]
    assert anew["weights"] == before["weights"]
    assert anew["arms"]["fedavg_random"]["curve"] == before["arms"]["fedavg_random"]["curve"]


def test_a_killed_trainer_is_started_again_and_killed_once_more_costs_its_silo_the_round_and_no_more(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    rules = {"rounds": 3, "quorum": "majority", "deadline": "120s", "join_deadline": "120s"}
    three = federation(silos=3, epochs=25, federation=rules)
    command = gptfl.start("run", three.path)
    wait_for(lambda: three.owed(2) == {"silo-1", "silo-2", "silo-3"})
    lost = re.compile(r"round 2: silo-\d failed: TrainerLost: the trainer was killed by signal 9")
    known = set(command.pids("gptfl_dist.run.trainer"))
    os.kill(min(known), signal.SIGKILL)
    # Another, and a third one where the first was killed before its silo had the weights, and so was not at work yet.
    while command.process.poll() is None:
        started = set(command.pids("gptfl_dist.run.trainer")) - known
        if lost.search(command.stderr):  # told before round 3 began, so a trainer of round 3 is spared
            break
        for victim in started:
            os.kill(victim, signal.SIGKILL)
        known |= started
        time.sleep(0.02)
    assert command.wait() == 0, command.stderr
    assert lost.search(command.stderr)
    arm = three.summary()["arms"]["fedavg_random"]
    assert arm["rounds"] == 3
    # Five updates in rounds 2 and 3 together: the silo was back in round 3, with a new trainer.
    assert arm["bytes_up"] == (3 + 2 + 3) * three.summary()["model_bytes"]


def test_a_killed_evaluator_ends_the_run_with_its_name_and_the_same_command_goes_on(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    world = federation(federation={**RULES, "rounds": 3})
    command = gptfl.start("run", world.path)
    wait_for(lambda: world.owed(2))
    (evaluator,) = command.pids("gptfl_dist.run.evaluator")
    os.kill(evaluator, signal.SIGKILL)
    assert command.wait() == TrainerLost.exit_code, command.stderr
    assert "gptfl: the evaluator was killed by signal 9" in command.stderr
    assert "evaluator.log" in command.stderr
    command.wait_until_gone()
    gptfl.run("run", world.path)
    assert len(world.summary()["arms"]["fedavg_random"]["curve"]) == 3


def test_a_silo_with_unreadable_data_ends_the_run_with_its_message(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    broken = federation()
    (broken.folder / "silo-2.npz").write_bytes(b"no archive")
    command = gptfl.start("run", broken.path)
    assert command.wait() == 3
    assert "silo silo-2 ended with exit code 3" in command.stderr
    assert str(broken.folder / "silo-2.npz") in command.stderr
    assert (
        f"ERROR DataError: {broken.folder / 'silo-2.npz'}"
        in (broken.run_folder / "silos" / "silo-2" / "trainer.log").read_text()
    )
    assert command.alive() == {}


def test_weights_that_a_killed_run_had_not_tested_are_tested_when_it_goes_on(watched: Watched) -> None:
    whole = watched.federation.result()
    with closing(sqlite3.connect(watched.federation.run_folder / "ledger.sqlite")) as ledger, ledger:
        ledger.execute("UPDATE arms SET finished = 0, tested = NULL")
        ledger.execute("UPDATE rounds SET tested = NULL WHERE round = 3")
        ledger.execute("DELETE FROM facts WHERE name = 'finished'")
    watched.commands.run("run", watched.federation.path)
    assert watched.federation.result() == whole
    assert watched.federation.summary()["arms"]["fedavg_random"]["start_accuracy"] is not None


SCRIPT = """
import sys, time
from pathlib import Path
import gptfl_dist
from gptfl_dist.config.task import Model, Task
from gptfl_dist.learning.models import build_model
silo = gptfl_dist.join(build_model(Model(name="cnn"), Task(size=8, channels=1), 2, 0))
while silo.receive():
    silo.deliver(samples=8)
time.sleep(6)  # more than the five seconds that a stopped agent has
Path(__file__).with_suffix(".saved").touch()
"""


def test_a_script_has_its_time_after_the_federation(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    mine = federation(federation={"rounds": 1, "deadline": "120s", "join_deadline": "120s"})
    (mine.folder / "script.py").write_text(SCRIPT)
    silo = mine.folder / "silo-1.yaml"
    silo.write_text(silo.read_text() + "code: {script: script.py}\n")
    gptfl.run("run", mine.path)
    assert (mine.folder / "script.saved").exists()
