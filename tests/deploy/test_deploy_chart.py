"""The Helm chart, rendered for both roles: sound, and pods that may do little. No cluster is here to install it in."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
from deploy_files import (
    BIN,
    CHART,
    DEPLOY,
    FILES,
    OLDEST_CLUSTER,
    check,
    job,
    one,
    parse_command,
    read_yaml,
    rendered,
    values,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "coordinator": ("coordinator", {}),
    "coordinator with a set of files": ("coordinator", {"credentials": {"filesSecret": "set"}, "makeAuthority": False}),
    "coordinator of known silos": (
        "coordinator",
        {
            "networkPolicy": {"siloCIDRs": ["198.51.100.0/24"], "extraEgress": [{"ports": [{"port": 443}]}]},
            "service": {"type": "LoadBalancer", "annotations": {"a": "b"}, "loadBalancerSourceRanges": ["1.2.3.0/24"]},
            "persistence": {"existingClaim": "old"},
        },
    ),
    "silo": ("silo", {}),
    "silo with a set of files": ("silo", {"credentials": {"filesSecret": "set"}}),
    "silo with a GPU behind a proxy": (
        "silo",
        {
            "env": [{"name": "https_proxy", "value": "http://proxy.example.org:3128"}],
            "resources": {"limits": {"nvidia.com/gpu": 1}},
            "image": {"repository": "r/gptfl", "digest": "sha256:" + "0" * 64, "pullSecrets": ["pull"]},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "nodeSelector": {"gpu": "yes"},
            "affinity": {"nodeAffinity": {}},
            "podAnnotations": {"a": "b"},
            "podLabels": {"c": "d"},
            "persistence": {"storageClass": "local"},
            "networkPolicy": {"coordinatorCIDRs": ["10.0.0.1/32"], "coordinatorPorts": [3128], "extraEgress": [{}]},
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_is_sound(variant: str) -> None:
    role, more = VARIANTS[variant]
    report = helm_python.lint(CHART, values(role, **more), strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    for manifest in rendered(role, **more):
        for version in (OLDEST_CLUSTER, kubernetes_validate.latest_version()):
            kubernetes_validate.validate(manifest, version, strict=True)
    assert f">={OLDEST_CLUSTER}-0" == read_yaml(CHART / "Chart.yaml")["kubeVersion"]


@pytest.mark.parametrize(
    ("role", "more"),
    [
        ("coordinator", {"role": "both"}),
        ("coordinator", {"file": ""}),
        ("coordinator", {"key": "-----BEGIN PRIVATE KEY-----"}),
        ("coordinator", {"credentials": {"invitationSecret": "line"}}),
        ("silo", {"credentials": {"invitationSecret": "line", "filesSecret": "set"}}),
        ("silo", {"data": {}}),
        ("silo", {"networkPolicy": {"coordinatorCIDRs": []}}),
        ("silo", {"networkPolicy": {"coordinatorCIDRs": ["coordinator.example.org"]}}),
        ("silo", {"ports": {"exchange": 0}}),
    ],
)
def test_the_schema_refuses(role: str, more: dict[str, Any]) -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmError):
        chart.validate_schema(chart.merge_values(values(role, **more)))


def test_the_schema_is_one_and_knows_every_value() -> None:
    check(BIN / "check-jsonschema", "--check-metaschema", CHART / "values.schema.json")

    def names(value: Any, schema: Any) -> Iterator[tuple[set[str], set[str]]]:
        yield set(value), set(schema["properties"])
        for name, inner in value.items():
            if isinstance(inner, dict) and schema["properties"][name].get("additionalProperties") is False:
                yield from names(inner, schema["properties"][name])

    schema = json.loads((CHART / "values.schema.json").read_text())
    for at, (have, known) in enumerate(names(read_yaml(CHART / "values.yaml"), schema)):
        assert have == known - ({"global"} if at == 0 else set())


@pytest.mark.parametrize("role", FILES)
def test_a_pod_may_do_little(role: str) -> None:
    pod = job(role)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["initContainers"] + pod["containers"]:
        context = container["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    parse_command(pod["containers"][0]["args"])
    program, *probe = pod["containers"][0]["readinessProbe"]["exec"]["command"]
    assert program == "gptfl"
    parse_command(probe)
    assert probe[1] == pod["containers"][0]["args"][1]


def test_only_a_coordinator_is_reached_and_a_silo_reaches_only_it() -> None:
    manifests = rendered("silo")
    assert [manifest for manifest in manifests if manifest["kind"] == "Service"] == []
    rules = one("NetworkPolicy", manifests)["spec"]
    assert rules["ingress"] == []
    (coordinator, names) = rules["egress"]
    assert coordinator["to"] == [{"ipBlock": {"cidr": "203.0.113.10/32"}}]
    assert {port["port"] for port in names["ports"]} == {53}

    manifests = rendered("coordinator")
    rules = one("NetworkPolicy", manifests)["spec"]
    assert rules["egress"] == []
    (into,) = rules["ingress"]
    served = [port["port"] for port in one("Service", manifests)["spec"]["ports"]]
    assert [port["port"] for port in into["ports"]] == served


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_container_s_script_is_sound(variant: str, tmp_path: Path) -> None:
    role, more = VARIANTS[variant]
    prepare = job(role, **more)["spec"]["template"]["spec"]["initContainers"][0]
    assert prepare["command"] == ["sh", "-euc"]
    script = tmp_path / "prepare"
    script.write_text(f"#!/bin/sh\nset -eu\n{prepare['args'][0]}")
    check(BIN / "shellcheck", script)


def prepared(home: Path, given: Path, etc: Path, role: str, **more: Any) -> str:
    """Runs the script of the first container with its folders elsewhere, and gptfl as what tells its words."""
    tools = home.parent / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "gptfl").write_text(f'#!/bin/sh\necho gptfl "$@" >> {tools}/told\n')
    (tools / "gptfl").chmod(0o755)
    (tools / "told").write_text("")
    script = job(role, **more)["spec"]["template"]["spec"]["initContainers"][0]["args"][0]
    for inside, outside in {"/var/lib/gptfl": home, "/run/gptfl": given, "/etc/gptfl": etc}.items():
        script = script.replace(inside, str(outside))
    done = subprocess.run(
        ["sh", "-euc", script], env={"PATH": f"{tools}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (tools / "told").read_text()


def test_what_the_first_container_does(tmp_path: Path) -> None:
    """A set of files is copied once, closed to others, and not over what was renewed; an invitation is used once."""
    home, given, etc = tmp_path / "home", tmp_path / "given", DEPLOY / "config"
    home.mkdir()
    given.mkdir()
    names = ("authority.pem", "certificate.pem", "key.pem")
    for name in names:
        (given / name).write_text("first")
    own = home / "credentials"
    prepared(home, given, etc, "silo", credentials={"filesSecret": "set"})
    assert {(own / name).read_text() for name in names} == {"first"}
    assert (own / "key.pem").stat().st_mode & 0o777 == 0o600

    (own / "certificate.pem").write_text("renewed")
    (own / "key.pem").chmod(0o660)  # as a mount for a group leaves it
    prepared(home, given, etc, "silo", credentials={"filesSecret": "set"})
    assert (own / "certificate.pem").read_text() == "renewed"
    assert (own / "key.pem").stat().st_mode & 0o777 == 0o600

    for name in names:
        (given / name).write_text("second")
    prepared(home, given, etc, "silo", credentials={"filesSecret": "set"})
    assert {(own / name).read_text() for name in names} == {"second"}

    assert prepared(home, given, etc, "silo") == ""  # it has a certificate
    shutil.rmtree(own)
    (given / "invitation").write_text("gptfl://...\n")
    (words,) = prepared(home, given, etc, "silo").splitlines()
    parse_command(shlex.split(words)[1:])
    assert words.startswith("gptfl join - ")

    (words,) = prepared(home, given, etc, "coordinator").splitlines()
    parse_command(shlex.split(words)[1:])
    (home / "authority").mkdir()
    (home / "authority" / "issuing.pem").write_text("there")
    assert prepared(home, given, etc, "coordinator") == ""
