"""Which exchange is taken and why, and which rank serves which silo."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Commands, Federation

from gptfl_dist.errors import ConfigError, LaunchError
from gptfl_dist.run.launcher import Wire, choose
from gptfl_dist.run.world import assign

_NAMES = st.lists(st.text("abc123", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


@given(_NAMES, st.integers(2, 40))
def test_every_working_rank_has_a_silo_and_every_silo_a_rank(silos: list[str], ranks: int) -> None:
    shares = assign(silos, ranks)
    assert list(shares) == sorted(silos)
    assert {rank for its in shares.values() for rank in its} == set(range(1, ranks))
    for one, other in pairwise(shares.values()):  # in order, and a rank is shared or it is not
        assert one == other or one.stop == other.start
    by_rank = [sum(rank in its for its in shares.values()) for rank in range(1, ranks)]
    lengths = [len(its) for its in shares.values()]
    assert max(by_rank) - min(by_rank) <= 1
    assert max(lengths) - min(lengths) <= 1
    assert max(by_rank) == 1 or max(lengths) == 1


@given(_NAMES, st.integers(2, 40))
def test_the_order_of_the_file_does_not_matter(silos: list[str], ranks: int) -> None:
    assert assign(silos, ranks) == assign(silos[::-1], ranks)


def test_four_silos_on_three_ranks_and_two_silos_on_six() -> None:
    assert assign(["a", "b", "c", "d"], 3) == {"a": range(1, 2), "b": range(1, 2), "c": range(2, 3), "d": range(2, 3)}
    assert assign(["a", "b"], 6) == {"a": range(1, 4), "b": range(4, 6)}


_TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "3", "RANK": "1"}
_MPIEXEC = {"PMI_SIZE": "3", "PMI_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "wire", "why"),
    [
        ({}, Wire.grpc, "neither an MPI launcher nor torchrun started this process"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_PROCID": "1"}, Wire.grpc, "Slurm's variables alone"),
        ({"WORLD_SIZE": "3", "RANK": "1"}, Wire.grpc, "neither"),
        (_MPIEXEC, Wire.mpi, "PMI_SIZE=3"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Wire.mpi, "OMPI_COMM_WORLD_SIZE=2"),
        (_TORCHRUN, Wire.torch, "TORCHELASTIC_RUN_ID=1"),
        (_TORCHRUN | _MPIEXEC, Wire.torch, "TORCHELASTIC_RUN_ID=1"),
    ],
)
def test_auto_takes_what_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wire: Wire, why: str
) -> None:
    _only(monkeypatch, variables)
    choice = choose(Wire.auto)
    assert choice.wire is wire
    assert why in choice.why


def test_what_is_asked_for_wins_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, _TORCHRUN)
    assert choose(Wire.mpi).wire is Wire.mpi
    for rank in ("0", "1"):  # all of them: or rank 0 would begin a run that the others end
        _only(monkeypatch, {**_TORCHRUN, "RANK": rank})
        with pytest.raises(ConfigError, match="every process several times"):
            choose(Wire.grpc)
    _only(monkeypatch, {"PMI_SIZE": "1", "PMI_RANK": "0"})
    assert choose(Wire.grpc).wire is Wire.grpc
    _only(monkeypatch, {})
    with pytest.raises(LaunchError, match="torchrun did not start this process") as error:
        choose(Wire.torch)
    assert "torchrun --nproc-per-node" in error.value.hint


def _only(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in (*_TORCHRUN, *_MPIEXEC, "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_world_of_one_is_refused(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    command = gptfl.mpi(1, "run", federation().path)
    assert command.wait() == 11
    assert "the MPI world has 1 rank, expected 2 or more" in command.stderr
