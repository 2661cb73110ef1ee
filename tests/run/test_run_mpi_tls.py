"""`collective.trust: tls`: the same federation under `mpiexec`, with TLS between rank 0 and the silos' ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from support import Commands, Federation

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.security.authority import Authority, Credentials

MODEL = "models/fedavg_random-final.safetensors"


def with_tls(federation: Federation, authority: Authority | None = None) -> Federation:
    """The same with `collective.trust: tls`, and a set of certificates for each side, named in its file."""
    authority = authority or Authority("tiny", valid=timedelta(days=1))
    give(federation, federation.path, "exchange", authority.issue_coordinator(["localhost"]))
    for silo in federation.silos:
        give(federation, federation.folder / f"{silo}.yaml", "coordinator", authority.issue_silo(silo))
    edit(federation.path, collective={"trust": "tls"})
    return federation


def give(federation: Federation, path: Path, section: str, credentials: Credentials) -> None:
    folder = federation.folder / "credentials" / path.stem
    credentials.save(folder)
    named = {name: str(folder / f"{name}.pem") for name in ("authority", "certificate", "key")}
    edit(path, **{section: named | ({"address": "localhost:1"} if section == "coordinator" else {})})


def edit(path: Path, **sections: object) -> None:
    path.write_text(dump_yaml({**yaml.safe_load(path.read_text()), **sections}))


def test_the_weights_are_those_of_the_grpc_run_bit_for_bit(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation
) -> None:
    mine = with_tls(federation())
    command = gptfl.mpi(3, "run", mine.path)
    assert command.wait() == 0, command.stderr
    assert mine.result() == undisturbed.result()
    assert (mine.run_folder / MODEL).read_bytes() == (undisturbed.run_folder / MODEL).read_bytes()
    assert mine.summary()["transport"] == "mpi+tls"
    assert "TLS 1.3 with each of them" in command.stderr
    command.wait_until_gone()

    again = gptfl.mpi(3, "run", mine.path)
    assert again.wait() == 0, again.stderr
    assert "this run is finished" in again.stderr
