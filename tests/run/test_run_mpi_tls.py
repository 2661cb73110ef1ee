"""`collective.trust: tls`: the same federation under `mpiexec`, with TLS between rank 0 and the silos' ranks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from support import MPIEXEC, Commands, Federation

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.security.authority import Authority, Credentials

MODEL = "models/fedavg_random-final.safetensors"


def with_tls(federation: Federation, authority: Authority | None = None) -> Federation:
    """The same with `collective.trust: tls`, and a set of certificates for each side, named in its file."""
    authority = authority or Authority.new("tiny", valid=timedelta(days=1))
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


def test_a_set_that_the_other_side_would_refuse_is_found_before_the_job(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = with_tls(federation())
    checked = gptfl.run("check", mine.path)
    assert "not for 127.0.0.1" not in checked.stdout + checked.stderr  # nobody dials the coordinator
    foreign = Authority.new("tiny", valid=timedelta(days=1))
    give(mine, mine.folder / "silo-2.yaml", "coordinator", foreign.issue_silo("silo-2"))
    checked = gptfl.start("check", mine.path)
    assert checked.wait() == 6, checked.stdout
    told = (
        f"silo-2/certificate.pem was not issued by the other side's {mine.folder}/credentials/federation/authority.pem"
    )
    assert told in checked.stdout + checked.stderr


MARKED = """
import torch
from torch import nn

def floats(text):
    return torch.frombuffer(bytearray(text * 64), dtype=torch.float32)

class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(floats(b"THESE ARE THE WEIGHTS OF A MODEL"))
        self.trained = nn.Parameter(torch.zeros(512))

    def forward(self, images):
        return images.new_zeros(len(images), 2)

def build(*, label_count, task):
    return Marked()

def train(model, *_, **__):
    with torch.no_grad():
        model.trained += floats(b"AND THIS IS WHAT A SILO LEARNT..")
    return {}
"""


@pytest.mark.parametrize("trust", ["plain", "tls"])
def test_a_tap_on_what_is_sent_shows_weights_and_updates_unless_there_is_tls(
    gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path, trust: str
) -> None:
    rules = {"rounds": 1, "quorum": "all", "deadline": "120s", "join_deadline": "120s"}
    mine = with_tls(federation(model={"name": "function", "source": "marked:build"}, federation=rules))
    edit(mine.path, collective={"trust": trust})
    (mine.folder / "marked.py").write_text(MARKED)
    for silo in mine.silos:
        edit(mine.folder / f"{silo}.yaml", code={"function": "marked:train", "model": "marked:build"})
    taps = tmp_path / "taps"
    taps.mkdir()
    rank = (sys.executable, str(Path(__file__).with_name("tapped_rank.py")), str(taps))
    command = gptfl.start("run", mine.path, launcher=(MPIEXEC, "-n", "3", *rank))
    assert command.wait() == 0, command.stderr
    sent = [(taps / str(number)).read_bytes() for number in range(3)]
    assert all(len(bytes_) > 4096 for bytes_ in sent)  # weights, or an update
    found = [b"THESE ARE THE WEIGHTS" in sent[0], *(b"WHAT A SILO LEARNT" in bytes_ for bytes_ in sent[1:])]
    found += [b'"nonce"' in bytes_ for bytes_ in sent]
    assert found == [trust == "plain"] * 6


def shown(folder: Path, authority: Authority, credentials: Credentials) -> str:
    Credentials(authority.roots, credentials.certificate, credentials.key).save(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("rank", "whose", "said"),
    [
        (2, "another silo", "the certificate of rank 2 is that of gptfl://tiny/silo/silo-1, expected"),
        (2, "another authority", "the certificate of rank 2 is not one to trust ("),
        (2, "expired", "the certificate of rank 2 is not one to trust (certificate has expired), expected"),
        (0, "a silo", "the certificate of rank 0 is not one to trust (unsuitable certificate purpose), expected"),
    ],
)
def test_a_rank_with_the_wrong_certificate_ends_the_job(
    gptfl: Commands, federation: Callable[..., Federation], tmp_path: Path, rank: int, whose: str, said: str
) -> None:
    authority = Authority.new("tiny", valid=timedelta(days=1))
    late = copy.copy(authority)
    late._valid = timedelta(seconds=-10)
    issued = {
        "another silo": authority.issue_silo("silo-1"),
        "another authority": Authority.new("tiny", valid=timedelta(days=1)).issue_silo("silo-2"),
        "expired": late.issue_silo("silo-2"),
        "a silo": authority.issue_silo("silo-1"),
    }
    mine = with_tls(federation(), authority)
    impostor = (sys.executable, str(Path(__file__).with_name("impostor_rank.py")))
    folder = shown(tmp_path / "shown", authority, issued[whose])
    command = gptfl.start("run", mine.path, launcher=(MPIEXEC, "-n", "3", *impostor, str(rank), folder))
    assert command.wait() == 6, command.stderr
    assert said in command.stderr
    assert f"gptfl://tiny/{'coordinator' if rank == 0 else 'silo/silo-2'}" in command.stderr
    assert "Traceback" not in command.stderr
    command.wait_until_gone()
    assert not (mine.run_folder / "models").exists()  # before any stage


def test_a_silo_file_that_names_another_silos_certificate_is_told_so(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    authority = Authority.new("tiny", valid=timedelta(days=1))
    mine = with_tls(federation(), authority)
    give(mine, mine.folder / "silo-2.yaml", "coordinator", authority.issue_silo("silo-1"))
    command = gptfl.mpi(3, "run", mine.path)
    assert command.wait() == 6, command.stderr
    assert "gptfl, rank 2 on " in command.stderr
    assert "is the certificate of gptfl://tiny/silo/silo-1, but" in command.stderr


def test_certificates_that_are_not_named_are_asked_for(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    mine = federation()
    edit(mine.path, collective={"trust": "tls"})
    command = gptfl.mpi(3, "run", mine.path)
    assert command.wait() == 2, command.stderr
    assert "is missing" in command.stderr or "are missing" in command.stderr
    assert "Traceback" not in command.stderr
    assert "cannot reach rank 0" not in command.stderr


def test_under_torchrun_it_is_refused(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    mine = with_tls(federation(), Authority.new("tiny", valid=timedelta(days=1)))
    command = gptfl.torch(3, "run", mine.path)
    assert command.wait() != 0
    assert "3 ranks of torch.distributed, expected 3 of MPI" in command.stderr
