"""What a user did wrong is said in a message that names it, with its exit code, by the real command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from support import Command, Commands, wait_for

from gptfl_dist.run.institution import make_credentials
from gptfl_dist.testing.federations import tiny_federation, tiny_images


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refused(command: Command, exit_code: int) -> str:
    """The message and hint of a command with --format json, once it has ended as a user's mistake should."""
    code = command.wait()
    assert code == exit_code, command.stderr
    assert "Traceback" not in command.stdout + command.stderr
    told = json.loads(command.stdout)
    assert told["exit_code"] == exit_code
    assert f"gptfl: {told['message']}" in command.stderr
    wait_for(lambda: not command.alive(), 10)
    return f"{told['message']}\n{told['hint']}"


# The files


def unknown_key(file: Path) -> tuple[str, ...]:
    edit(file, "learning_rate: 0.1", "learning_rat: 0.1")
    return f"{file}:15:3: training.learning_rat: unknown key", "nearest valid key is learning_rate"


def wrong_type(file: Path) -> tuple[str, ...]:
    edit(file, "rounds: 1", "rounds: many")
    return f"{file}:18:11: federation.rounds", '"many" (text)', "a whole number"


def unquoted_number_as_a_label(file: Path) -> tuple[str, ...]:
    edit(file, "- left", "- 1")
    return f"{file}:4:3: labels[0]", 'quote it as "1"'


def missing_file(file: Path) -> tuple[str, ...]:
    file.unlink()
    return f"{file}: there is no such file", "gptfl init"


def missing_silo_file(file: Path) -> tuple[str, ...]:
    (file.parent / "silo-2.yaml").unlink()
    return str(file.parent / "silo-2.yaml"), "there is no such file"


def two_silos_with_one_name(file: Path) -> tuple[str, ...]:
    edit(file, "name: silo-2", "name: silo-1")
    return str(file), "silos names silo-1 twice"


def silo_file_of_another_silo(file: Path) -> tuple[str, ...]:
    edit(file.parent / "silo-2.yaml", "name: silo-2", "name: silo-9")
    return str(file.parent / "silo-2.yaml"), "silo-9", "silo-2"


def port_beyond_all_ports(file: Path) -> tuple[str, ...]:
    file.write_text(file.read_text() + "exchange: {listen: 127.0.0.1:99999}\n")
    return "exchange.listen", "99999", "at most 65535"


@pytest.mark.parametrize(
    "mistake",
    [
        unknown_key,
        wrong_type,
        unquoted_number_as_a_label,
        missing_file,
        missing_silo_file,
        two_silos_with_one_name,
        silo_file_of_another_silo,
        port_beyond_all_ports,
    ],
)
def test_a_wrong_file(mistake: Callable[[Path], tuple[str, ...]], gptfl: Commands, tmp_path: Path) -> None:
    file = tiny_federation(tmp_path)
    expected = mistake(file)
    message = refused(gptfl.start("run", file, "--format", "json"), 2)
    assert [part for part in expected if part not in message] == []


# Data


def missing_data_folder(folder: Path) -> tuple[str, ...]:
    edit(folder / "silo-2.yaml", "silo-2.npz", "nowhere/images")
    return str(folder / "nowhere/images"), "silo-2", "does not exist", "data.path"


def missing_test_data(folder: Path) -> tuple[str, ...]:
    (folder / "test.npz").unlink()
    return str(folder / "test.npz"), "does not exist", "test_data"


@pytest.mark.parametrize("mistake", [missing_data_folder, missing_test_data])
def test_missing_data_is_said_before_anything_starts(
    mistake: Callable[[Path], tuple[str, ...]], gptfl: Commands, tmp_path: Path
) -> None:
    file = tiny_federation(tmp_path)
    expected = mistake(tmp_path)
    message = refused(gptfl.start("run", file, "--format", "json"), 3)
    assert [part for part in expected if part not in message] == []
    assert list(tmp_path.glob("run/silos/*")) == []


def test_a_label_that_the_federation_does_not_know_ends_a_local_run(gptfl: Commands, tmp_path: Path) -> None:
    file = tiny_federation(tmp_path)
    tiny_images(tmp_path / "silo-2.npz", labels=("left", "rihgt"))
    message = refused(gptfl.start("run", file, "--format", "json"), 3)
    assert "silo-2" in message
    assert f"the label 'rihgt' of 12 sample(s) in {tmp_path / 'silo-2.npz'}" in message
    assert "add 'rihgt: right', if that is meant, to data.labels" in message


def test_labels_that_are_no_words_of_the_federation_get_no_guess(gptfl: Commands, tmp_path: Path) -> None:
    file = tiny_federation(tmp_path)
    tiny_images(tmp_path / "silo-2.npz", labels=("0", "1"))
    message = refused(gptfl.start("run", file, "--format", "json"), 3)
    assert "the label '0' of 12 sample(s), '1' of 12 sample(s) in" in message
    assert "add '0: ...' with the federation's name for it" in message


# Generators


@pytest.mark.parametrize("holds", ["nothing", "no model_index.json"])
def test_a_generator_folder_that_is_none(holds: str, gptfl: Commands, tmp_path: Path) -> None:
    synthesis = {"generator": {"source": "./generator"}, "images_per_label": 2}
    file = tiny_federation(tmp_path, arms=["synthetic_only"], synthesis=synthesis)
    if holds != "nothing":
        (tmp_path / "generator").mkdir()
    message = refused(gptfl.start("run", file, "--format", "json"), 4)
    assert str(tmp_path / "generator") in message
    assert ("model_index.json" if holds != "nothing" else "does not exist") in message


# Certificates and ports


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


def institution(folder: Path, port: int) -> Path:
    """A federation file whose coordinator listens at a port, with a set of credentials a side in `credentials`."""
    exchange = {"listen": f"127.0.0.1:{port}"}
    exchange |= {name: f"credentials/coordinator/{name}.pem" for name in ("authority", "certificate", "key")}
    rules = {"rounds": 1, "quorum": "all", "join_deadline": "1h"}
    file = tiny_federation(folder, exchange=exchange, federation=rules)
    make_credentials(file, ["127.0.0.1"], folder / "credentials", 90)
    return file


def test_a_port_in_use(gptfl: Commands, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = institution(tmp_path, port)
        message = refused(gptfl.start("coordinator", file, "--format", "json"), 11)
    assert f"127.0.0.1:{port}: the port is in use" in message
    assert "exchange.listen" in message


def test_a_coordinator_with_the_certificate_of_a_silo(gptfl: Commands, tmp_path: Path) -> None:
    file = institution(tmp_path, 0)
    edit(file, "credentials/coordinator", "credentials/silo-1")
    message = refused(gptfl.start("coordinator", file, "--format", "json"), 6)
    assert "credentials/silo-1/certificate.pem" in message
    assert "expected the coordinator's" in message


def test_a_host_that_is_none_gets_no_certificate(gptfl: Commands, tmp_path: Path) -> None:
    file = tiny_federation(tmp_path)
    command = gptfl.start("credentials", file, "--host", "bad host!", "--out", tmp_path / "sets")
    assert command.wait() == 2
    assert "--host is 'bad host!', expected a host name or an IP address" in command.stderr
    assert not (tmp_path / "sets").exists()


def test_a_missing_key_is_said_with_the_setting_that_names_it(gptfl: Commands, tmp_path: Path) -> None:
    file = institution(tmp_path, 0)
    own = ", ".join(f"{name}: credentials/silo-1/{name}.pem" for name in ("authority", "certificate", "key"))
    (tmp_path / "silo-1.yaml").open("a").write(f"coordinator: {{address: '127.0.0.1:1', {own}}}\n")
    for path in tmp_path.glob("credentials/*/key.pem"):
        path.unlink()
    message = refused(gptfl.start("coordinator", file, "--format", "json"), 6)
    assert f"exchange.key: {tmp_path / 'credentials' / 'coordinator' / 'key.pem'}: No such file" in message
    message = refused(gptfl.start("silo", tmp_path / "silo-1.yaml", "--format", "json"), 6)
    assert f"coordinator.key: {tmp_path / 'credentials' / 'silo-1' / 'key.pem'}: No such file" in message


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder and address of a coordinator that waits for its silos; it must survive them all and stop cleanly."""
    folder = tmp_path_factory.mktemp("waiting")
    port = free_port()
    commands = Commands(tmp_path_factory.mktemp("output"))
    command = commands.start("coordinator", institution(folder, port))
    try:
        wait_for(lambda: "taking silos" in command.stderr, 60)
        yield folder, f"127.0.0.1:{port}"
        assert command.process.poll() is None, command.stderr
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(20) == 130
        assert "Traceback" not in command.stderr
        wait_for(lambda: not command.alive(), 10)
    finally:
        commands.kill()


def foreign_set(folder: Path) -> tuple[str, ...]:
    make_credentials(folder.parent / "waiting.yaml", ["127.0.0.1"], folder.parent / "foreign", 90)
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "foreign" / "silo-1", folder)
    return "the certificate of 127.0.0.1:", "is not one to trust: ", "coordinator.authority"


def certificate_of_another_authority(folder: Path) -> tuple[str, ...]:
    make_credentials(folder.parent / "waiting.yaml", ["127.0.0.1"], folder.parent / "foreign", 90)
    for name in ("certificate.pem", "key.pem"):
        shutil.copy(folder.parent / "foreign" / "silo-1" / name, folder / name)
    return str(folder / "certificate.pem"), "was not issued by", "authority.pem"


def key_that_others_may_read(folder: Path) -> tuple[str, ...]:
    (folder / "key.pem").chmod(0o644)
    return "others may read this private key (mode 0644)", f"chmod 600 {folder / 'key.pem'}"


def set_of_another_silo(folder: Path) -> tuple[str, ...]:
    edit(folder.parent / "silo.yaml", "name: silo-1", "name: silo-2")
    return "gptfl://tiny/silo/silo-1", "the silo silo-2"


def missing_key(folder: Path) -> tuple[str, ...]:
    (folder / "key.pem").unlink()
    return str(folder / "key.pem"), "No such file"


@pytest.mark.parametrize(
    "mistake",
    [foreign_set, certificate_of_another_authority, key_that_others_may_read, set_of_another_silo, missing_key],
)
def test_a_silo_with_wrong_credentials(
    mistake: Callable[[Path], tuple[str, ...]], waiting: tuple[Path, str], gptfl: Commands, tmp_path: Path
) -> None:
    folder, address = waiting
    shutil.copytree(folder / "credentials" / "silo-1", tmp_path / "set")
    shutil.copy(folder / "federation.yaml", tmp_path / "waiting.yaml")
    shutil.copy(folder / "silo-1.yaml", tmp_path / "silo.yaml")
    shutil.copy(folder / "silo-1.npz", tmp_path)
    expected = mistake(tmp_path / "set")
    command = gptfl.start(
        *("silo", tmp_path / "silo.yaml", "--coordinator", address),
        *("--credentials", tmp_path / "set", "--format", "json"),
    )
    message = refused(command, 6)
    assert [part for part in expected if part not in message] == []


def test_an_unreadable_image_ends_the_silo_that_has_it(
    waiting: tuple[Path, str], gptfl: Commands, tmp_path: Path
) -> None:
    folder, address = waiting
    for label in ("left", "right"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 40 * number).save(tmp_path / "images" / label / f"{number}.png")
    damaged = tmp_path / "images" / "right" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    (tmp_path / "silo.yaml").write_text("name: silo-2\ndata: {path: images}\ndevice: cpu\n")
    command = gptfl.start(
        *("silo", tmp_path / "silo.yaml", "--coordinator", address),
        *("--credentials", folder / "credentials" / "silo-2", "--format", "json"),
    )
    message = refused(command, 3)
    assert f"the image {damaged} is damaged" in message
    assert "replace it" in message


# The disk


def test_a_run_folder_that_is_a_file(gptfl: Commands, tmp_path: Path) -> None:
    file = tiny_federation(tmp_path)
    (tmp_path / "run").touch()
    message = refused(gptfl.start("run", file, "--format", "json"), 10)
    assert f"run_folder is {tmp_path / 'run'}, which is a file" in message


if os.geteuid() == 0:  # only root may mount a disk that is small enough to fill

    @pytest.fixture
    def small_disk(tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "run"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)

    def test_a_full_disk_stops_the_run_and_the_same_command_goes_on_once_there_is_room(
        small_disk: Path, gptfl: Commands, tmp_path: Path
    ) -> None:
        # The labels are those that YAML 1.1 would turn into truth values.
        file = tiny_federation(tmp_path, labels=["yes", "no", "on", "off"])
        (small_disk / "filler").write_bytes(bytes(2**21))
        message = refused(gptfl.start("run", file, "--format", "json"), 10)
        assert f"{small_disk}/" in message
        assert "the disk is full" in message
        assert "the same command goes on" in message
        (small_disk / "filler").unlink()
        result = gptfl.run("run", file, "--format", "json")
        assert json.loads(result.stdout)["arms"]["fedavg_random"]["rounds"] == 1
        assert [path for path in small_disk.rglob("*") if path.name.endswith(".part")] == []
