"""The pre-flight: real files, real certificates, real sockets; every mistake is found and none hides another."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image
from slurm_cluster import SlurmCluster
from support import Commands

from gptfl_dist.config.at_rest import AtRest
from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.errors import GptflError
from gptfl_dist.ledger.lock import locked
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.run.check import Finding, check_file
from gptfl_dist.run.institution import make_credentials
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.testing.federations import tiny_federation, tiny_images
from gptfl_dist.weights.sealed import in_use, use_key


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({f.checked for f in findings}) == len(findings)
    return {f.checked: f for f in findings}


# Federation files


def test_all_is_well(tmp_path: Path) -> None:
    # The labels are those that YAML 1.1 would turn into truth values.
    file = tiny_federation(tmp_path, labels=["yes", "no", "on", "off"])
    findings = by_name(check_file(file))
    assert findings.pop("test data").status == "warning"  # it has no image of the labels on and off
    assert [(f.checked, f.found) for f in findings.values() if f.status != "ok" or f.exit_code] == []
    assert findings["training of silo-2"].found.startswith("24 images of 2 of 4 labels")
    assert findings["file"].line() == f"ok       file: {file} is a federation file of 2 silos and 4 labels"
    assert not (tmp_path / "run").exists()


def test_what_travels_is_told_and_what_is_thrown_away_is_doubted(tmp_path: Path) -> None:
    file = tiny_federation(tmp_path, compression={"up": "int8", "lossless": "zstd"})
    found = by_name(check_file(file))["compression"]
    assert found.status == "ok"
    assert found.found.startswith("updates take 25.2% and weights 100.0% of")
    edit(file, "up: int8", "up: topk\n  error_feedback: false")
    found = by_name(check_file(file))["compression"]
    assert found.status == "warning"
    assert "99% of each update is lost" in found.found


def test_it_is_told_how_many_malicious_silos_a_rule_bears(tmp_path: Path) -> None:
    file = tiny_federation(tmp_path, silos=5, strategy={"rule": "trimmed_mean", "malicious": 2})
    found = by_name(check_file(file))["strategy"]
    assert (found.status, found.found) == (
        "ok", "trimmed_mean of 5 updates or more, sgd; bears 2 malicious silo(s) a round",
    )  # fmt: skip


def test_the_control_variate_is_part_of_what_the_silos_model_is_held_against(tmp_path: Path) -> None:
    file = tiny_federation(tmp_path, strategy={"rule": "scaffold"})
    findings = by_name(check_file(file))
    assert [(f.checked, f.found) for f in findings.values() if f.status != "ok"] == []


def test_no_mistake_hides_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        file = tiny_federation(
            tmp_path,
            silos=6,
            arms=["fedavg_random", "gptfl"],
            exchange={"listen": address},
            synthesis={
                "generator": {"source": "./generator"},
                "prompts": {"file": "prompts.yaml"},
                "images_per_label": 10**15,
            },
            pretraining={"device": "cuda:77"},
            run_folder="test.npz/run",
        )
        tiny_images(tmp_path / "test.npz", labels=("left", "up"))
        (tmp_path / "silo-1.npz").unlink()
        edit(tmp_path / "silo-2.yaml", "name: silo-2", "name: silo-9")
        edit(file, "file: silo-3.yaml", "file: silo-3.yaml\n  max_samples: 5")
        (tmp_path / "silo-4.yaml").open("a").write("policy: {max_rounds: 1, max_model: 1kB}\n")
        (tmp_path / "silo-5.yaml").open("a").write("code: {function: 'nowhere:train'}\n")
        edit(file, "file: silo-6.yaml", "max_samples: 1000")
        findings = check_file(file)
    found = by_name(findings)
    expected = {
        "device": (2, "cuda:77"),
        "prompts": (2, f"{tmp_path / 'prompts.yaml'}: there is no such file"),
        "generator": (4, str(tmp_path / "generator")),
        "run folder": (10, f"{tmp_path / 'test.npz'} is a file"),
        "disk space": (10, "the run may need"),
        "test data": (3, "'up'"),
        "training of silo-1": (3, f"{tmp_path / 'silo-1.npz'} does not exist"),
        "silo file of silo-2": (2, f"name is silo-9, {file} expects silo-2"),
        "training of silo-3": (2, "max_samples 5"),
        "silo file of silo-4": (7, "policy.max_rounds is 1"),
        "training of silo-4": (7, "policy.max_model allows 1.00 kB"),
        "training of silo-5": (5, "code.function nowhere:train cannot be imported"),
        "exchange.listen": (11, f"{address}: the port is in use"),
    }
    failed = {f.checked: (f.exit_code, f.found) for f in findings if f.status == "failed"}
    assert {name: code for name, (code, _) in failed.items()} == {name: code for name, (code, _) in expected.items()}
    assert [(name, failed[name][1]) for name, (_, part) in expected.items() if part not in failed[name][1]] == []
    assert all(found[name].hint for name in expected)
    assert (found["silo files"].status, found["silo files"].exit_code) == ("warning", 0)
    assert "silo-6" in found["silo files"].found


def test_a_silo_file_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    file = tiny_federation(tmp_path)
    (tmp_path / "silo-2.yaml").unlink()
    failed = [finding for finding in check_file(file) if finding.status == "failed"]
    assert [finding.checked for finding in failed] == ["silo file of silo-2"]


def test_a_port_in_use_is_no_fault_where_a_coordinator_of_this_run_is_at_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        file = tiny_federation(tmp_path, exchange={"listen": address})
        assert by_name(check_file(file))["exchange.listen"].exit_code == 11
        folder = load_federation(file).run_folder
        folder.mkdir()
        with locked(folder):
            found = by_name(check_file(file))["exchange.listen"]
    assert found.status == "ok"
    assert found.found.startswith(f"{address} is in use, and a coordinator of this run is at work")


def test_silos_whose_modules_have_one_name_are_kept_apart(tmp_path: Path) -> None:
    file = tiny_federation(tmp_path, model={"name": "function", "source": "model:build"})
    network = (
        "from torch import nn\ndef build(label_count, task):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear({width} * 64, label_count){more})\n"
    )
    (tmp_path / "model.py").write_text(network.format(width=1, more=""))
    for number, more in ((1, ""), (2, ", nn.Linear(label_count, label_count)")):
        home = tmp_path / f"home-{number}"
        home.mkdir()
        (home / "model.py").write_text(network.format(width=1, more=more))
        silo = home / "silo.yaml"
        silo.write_text(f"name: silo-{number}\ndata: {{path: ../silo-{number}.npz}}\ncode: {{model: 'model:build'}}\n")
        edit(file, f"file: silo-{number}.yaml", f"file: {home.name}/silo.yaml")
    findings = by_name(check_file(file))
    assert findings["model"].status == "ok"
    assert findings["training of silo-1"].status == "ok"
    assert findings["training of silo-2"].exit_code == 5
    assert "not the federation's" in findings["training of silo-2"].found


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: a\ncolour: red\n", "no federation, silo, operator or experiment file"),
        ("name: a\nlabels: [a, b]\nsilos: []\n", "silos"),
        ("name: a\ndata: {path: x, form: npz}\n", "nearest valid key is format"),
        ("labels: [a\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_neither_or_wrong(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    (only,) = check_file(tmp_path / "file.yaml")
    assert (only.checked, only.status, only.exit_code) == ("file", "failed", 2)
    assert part in only.found
    assert "`gptfl init" in only.hint


# Credentials of the coordinator


def institution(folder: Path, *, hosts: list[str], listen: str = "127.0.0.1:0", side: str = "coordinator") -> Path:
    """A federation file with credentials of three days, whose silo-1 dials localhost."""
    exchange = {"listen": listen}
    exchange |= {name: f"credentials/{side}/{name}.pem" for name in ("authority", "certificate", "key")}
    file = tiny_federation(folder, exchange=exchange)
    make_credentials(file, hosts, folder / "credentials", 3)
    files = ", ".join(f"{name}: credentials/silo-1/{name}.pem" for name in ("authority", "certificate", "key"))
    (folder / "silo-1.yaml").open("a").write(f"coordinator: {{address: 'localhost:1', {files}}}\n")
    return file


@pytest.mark.parametrize(
    ("settings", "status", "exit_code", "part"),
    [
        ({"hosts": ["127.0.0.1", "localhost"]}, "warning", 0, "the certificate ends in "),
        ({"hosts": ["127.0.0.1"]}, "failed", 6, "not for localhost (coordinator.address of silo-1)"),
        ({"hosts": ["localhost"]}, "warning", 0, "not for 127.0.0.1 (exchange.listen)"),
        ({"hosts": ["localhost"], "listen": "0.0.0.0:0"}, "warning", 0, "the certificate ends in "),
        ({"hosts": ["localhost"], "side": "silo-2"}, "failed", 6, "gptfl://tiny/silo/silo-2, expected the coordinator"),
        ({"hosts": ["localhost"], "side": "nobody"}, "failed", 6, "exchange.authority: "),
    ],
)
def test_the_coordinators_credentials(
    settings: dict[str, Any], status: str, exit_code: int, part: str, tmp_path: Path
) -> None:
    found = by_name(check_file(institution(tmp_path, **settings)))["credentials"]
    assert (found.status, found.exit_code) == (status, exit_code)
    assert part in found.found


# Silo files


def save(authority: Authority, folder: Path, name: str = "silo-1") -> None:
    authority.issue_silo(name).save(folder / "set")


@contextmanager
def serving(credentials: Credentials | None, clients: bytes = b"") -> Iterator[int]:
    """A real gRPC server that demands certificates of the authority `clients`; without credentials it speaks no TLS."""
    server = grpc.server(ThreadPoolExecutor(1))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        secrets = grpc.ssl_server_credentials([(credentials.key, credentials.certificate)], clients, True)
        port = server.add_secure_port("127.0.0.1:0", secrets)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def silo_file(folder: Path, address: str) -> Path:
    tiny_images(folder / "data.npz")
    files = ", ".join(f"{name}: set/{name}.pem" for name in ("authority", "certificate", "key"))
    path = folder / "silo.yaml"
    path.write_text(
        f"name: silo-1\ndata: {{path: data.npz, labels: {{left: links}}}}\ndevice: cpu\n"
        f"coordinator: {{address: '{address}', {files}}}\n"
    )
    return path


def test_a_silo_that_reaches_its_coordinator(tmp_path: Path) -> None:
    authority = Authority.new("tiny", valid=timedelta(days=30))
    save(authority, tmp_path)
    with serving(authority.issue_coordinator(["127.0.0.1"]), authority.roots) as port:
        findings = by_name(check_file(silo_file(tmp_path, f"127.0.0.1:{port}")))
    assert [(f.checked, f.found) for f in findings.values() if f.status != "ok"] == []
    assert findings["data"].found == "24 images can be read: links 12, right 12"
    assert "TLS 1.3" in findings["coordinator"].found


def test_a_silo_whose_coordinator_is_not_the_one_it_trusts(tmp_path: Path) -> None:
    authority = Authority.new("tiny", valid=timedelta(days=30))
    stranger = Authority.new("tiny", valid=timedelta(days=30))
    save(authority, tmp_path)
    own = authority.issue_coordinator(["127.0.0.1"])
    cases: list[tuple[Credentials | None, bytes, str, str]] = [
        (stranger.issue_coordinator(["127.0.0.1"]), stranger.roots, "127.0.0.1", "not one to trust"),
        (own, authority.roots, "localhost", "not one to trust: Hostname mismatch"),
        (own, stranger.roots, "127.0.0.1", "certificate"),  # it takes only certificates of another authority
        (None, b"", "127.0.0.1", "speaks no TLS"),
    ]
    for credentials, clients, host, part in cases:
        with serving(credentials, clients) as port:
            found = by_name(check_file(silo_file(tmp_path, f"{host}:{port}")))["coordinator"]
        assert (found.status, found.exit_code) == ("failed", 6), found
        assert part in found.found


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    save(Authority.new("tiny", valid=timedelta(days=30)), tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        found = by_name(check_file(silo_file(tmp_path, f"127.0.0.1:{port}")))["coordinator"]
        assert (found.exit_code, found.found) == (6, f"127.0.0.1:{port} does not answer: Connection refused")
        silent.listen()
        found = by_name(check_file(silo_file(tmp_path, f"127.0.0.1:{port}")))["coordinator"]
        assert found.exit_code == 6
        assert "timed out" in found.found
    found = by_name(check_file(silo_file(tmp_path, "nowhere.invalid:1")))["coordinator"]
    assert found.exit_code == 6
    assert "nowhere.invalid cannot be resolved" in found.found


def expired(folder: Path) -> str:
    save(Authority.new("tiny", valid=timedelta(minutes=-1)), folder)
    return "valid 2"


def readable_by_others(folder: Path) -> str:
    save(Authority.new("tiny", valid=timedelta(days=30)), folder)
    (folder / "set" / "key.pem").chmod(0o640)
    return "others may read this private key (mode 0640)"


def of_another_silo(folder: Path) -> str:
    save(Authority.new("tiny", valid=timedelta(days=30)), folder, "silo-2")
    return "gptfl://tiny/silo/silo-2, expected the silo silo-1"


def without_a_key(folder: Path) -> str:
    save(Authority.new("tiny", valid=timedelta(days=30)), folder)
    (folder / "set" / "key.pem").unlink()
    return f"coordinator.key: {folder / 'set' / 'key.pem'}: No such file"


def of_two_makings(folder: Path) -> str:
    save(Authority.new("tiny", valid=timedelta(days=30)), folder)
    key = folder / "set" / "key.pem"
    key.write_bytes(Authority.new("tiny", valid=timedelta(days=30)).issue_silo("silo-1").key)
    return f"{key} is not the key of"


@pytest.mark.parametrize("mistake", [expired, readable_by_others, of_another_silo, without_a_key, of_two_makings])
def test_a_silos_credentials(mistake: Callable[[Path], str], tmp_path: Path) -> None:
    part = mistake(tmp_path)
    findings = check_file(silo_file(tmp_path, "127.0.0.1:1"))
    found = by_name(findings)["credentials"]
    assert found.exit_code == 6
    assert part in found.found
    assert [f.checked for f in findings if f.status == "failed"] == ["credentials"]  # said once
    assert by_name(findings)["coordinator"].found == "127.0.0.1:1 was not dialled: that needs the credentials"


def test_data_that_a_silo_cannot_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(tmp_path / "images" / "a" / f"{number}.png")
    (tmp_path / "silo.yaml").write_text("name: silo-1\ndata: {path: images}\n")
    assert by_name(check_file(tmp_path / "silo.yaml"))["data"].found == "3 images can be read: a 3"
    damaged = tmp_path / "images" / "a" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:30])
    found = by_name(check_file(tmp_path / "silo.yaml"))["data"]
    assert found.exit_code == 3
    assert str(damaged) in found.found


@pytest.mark.parametrize(
    ("script", "status", "exit_code", "part"),
    [
        ("import gptfl_dist\nimport helper\nraise SystemExit('it was run')\n", "ok", 0, "train.py"),
        ("import torch\n", "warning", 0, "does not import gptfl_dist"),
        ("import gptfl_dist, nowhere.at_all\n", "failed", 9, "imports nowhere, not found here"),
        ("def broken(:\n", "failed", 9, "is no Python"),
        (None, "failed", 9, "cannot be read: No such file"),
    ],
)
def test_a_script_is_read_and_not_run(
    script: str | None, status: str, exit_code: int, part: str, tmp_path: Path
) -> None:
    (tmp_path / "helper.py").touch()
    if script is not None:
        (tmp_path / "train.py").write_text(script)
    (tmp_path / "silo.yaml").write_text("name: silo-1\ncode: {script: train.py}\n")
    found = by_name(check_file(tmp_path / "silo.yaml"))["code"]
    assert (found.status, found.exit_code) == (status, exit_code)
    assert part in found.found


# The command


def test_the_command_ends_with_the_code_of_the_first_failure(gptfl: Commands, tmp_path: Path) -> None:
    synthesis = {"generator": {"source": "nobody/no-such-pipeline"}, "images_per_label": 2}
    file = tiny_federation(tmp_path, arms=["synthetic_only"], synthesis=synthesis)
    (tmp_path / "test.npz").unlink()
    command = gptfl.start("check", file, "--format", "json", HF_HUB_OFFLINE="1")
    assert command.wait() == 4, command.stderr
    failed = [finding for finding in json.loads(command.stdout) if finding["status"] == "failed"]
    assert [(finding["checked"], finding["exit_code"]) for finding in failed] == [("generator", 4), ("test data", 3)]
    assert "gptfl generate would fail to download it" in failed[0]["found"]
    assert command.stderr == ""


@pytest.mark.parametrize(
    ("launch", "status", "part"),
    [
        ("{how: mpirun, mpirun: {command: no-mpi}}", "failed", "no-mpi is not found"),
        ("{how: torchrun, torchrun: {processes: 2}}", "ok", "2 processes"),
        ("{how: slurm, slurm: {options: [--ntasks=2]}}", "ok", "to start at"),
        ("{how: slurm, slurm: {options: [--partition=none]}}", "failed", "invalid partition"),
    ],
)
def test_the_launcher_of_a_silo(tmp_path: Path, slurm: SlurmCluster, launch: str, status: str, part: str) -> None:
    path = silo_file(tmp_path, "localhost:1")
    path.write_text(path.read_text() + f"launch: {launch}\n")
    findings = by_name(check_file(path))
    assert (findings["launcher"].status, findings["launch folder"].status) == (status, "ok")
    assert part in findings["launcher"].found


def test_the_launchers_of_a_federations_silos_and_what_fast_does_not_take(tmp_path: Path) -> None:
    file = tiny_federation(tmp_path, collective={"reduction": "fast"})
    script = tmp_path / "own.py"
    script.write_text("import gptfl_dist\n\nsilo = gptfl_dist.join(None)\nsilo.receive()\nsilo.deliver(samples=1)\n")
    for name, section in (
        ("silo-1", "launch: {how: mpirun, mpirun: {command: no-mpi}}"),
        ("silo-2", f"code: {{script: {script}}}"),
    ):
        silo = tmp_path / f"{name}.yaml"
        silo.write_text(silo.read_text() + section + "\n")
    findings = by_name(check_file(file))
    assert findings["silo file of silo-1"].status == "failed"
    assert "no-mpi is not found" in findings["silo file of silo-1"].found
    assert (findings["fast at silo-1"].status, findings["fast at silo-2"].status) == ("warning", "warning")
    assert "has launch.how: mpirun" in findings["fast at silo-1"].found
    assert "has code.script:" in findings["fast at silo-2"].found


# Encryption at rest


def _sealed(folder: Path, key: Path) -> None:
    """Begins a run folder or a silo's work folder with a key."""
    use_at_rest(AtRest(key_file=key), folder)
    use_key(None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{key_file: missing.key}", "No such file"),
        ("{key_file: open.key}", "others may read"),
        ("{key_file: other.key}", "the key that at_rest names is another one"),
        ("{key_env: GPTFL_NO_SUCH_VARIABLE}", "there is no such variable"),
        ("{key_command: [echo, 00ff]}", "gives no key: expected 64 hexadecimal digits"),
        ("{key_command: [sh, -c, exit 3]}", "ended with exit code 3"),
        ("", "no at_rest names its key"),
        ("{key_file: at-rest.key}", ""),
    ],
)
def test_the_key_of_each_side_is_had_as_a_run_would(tmp_path: Path, settings: str, said: str) -> None:
    for name, digits, mode in (("at-rest", "a5", 0o600), ("other", "b6", 0o600), ("open", "a5", 0o644)):
        (tmp_path / f"{name}.key").write_text(digits * 32)
        (tmp_path / f"{name}.key").chmod(mode)
    file = tiny_federation(tmp_path)
    silo = tmp_path / "silo-1.yaml"
    folders = [tmp_path / "run", tmp_path / "run" / "silos" / "silo-1", tmp_path / "silo-1-work"]
    for folder in folders:
        _sealed(folder, tmp_path / "at-rest.key")
    for path in (file, silo):
        with path.open("a") as text:
            text.write(f"at_rest: {settings}\n" if settings else "")
    of_federation, of_silo = by_name(check_file(file)), by_name(check_file(silo))
    found = [of_federation["at_rest"], of_federation["at_rest of silo-1"], of_silo["at_rest"]]
    ends = [(file, folders[0]), (silo, folders[1]), (silo, folders[2])]
    for finding, (path, folder) in zip(found, ends, strict=True):
        if not said:
            assert (finding.status, finding.found) == ("ok", f"the key is the one that {folder} was begun with")
            continue
        assert said in finding.found
        with pytest.raises(GptflError) as ended:  # what the run would end with
            use_at_rest((load_federation(path) if path == file else load_silo(path)).at_rest, folder)
        use_key(None)
        assert (finding.status, finding.exit_code) == ("failed", 2)
        assert (finding.found, finding.hint) == (ended.value.message, ended.value.hint)
    assert of_federation["at_rest of silo-2"].found == "none: weights and updates are kept as they are"


def test_the_check_of_a_key_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "at-rest.key").write_text("a5" * 32)
    (tmp_path / "at-rest.key").chmod(0o600)
    file = tiny_federation(tmp_path, at_rest={"key_file": "at-rest.key"})
    assert by_name(check_file(file))["at_rest"].found == "there is a key"
    assert not (tmp_path / "run").exists()
    assert not in_use()
