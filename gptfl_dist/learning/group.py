"""The ranks that do one job together: processes that torch.distributed joins. A process by itself is a group of one.

    group = open_group(patience)       # what the environment says: a group of one, or one rank of several
    message = group.tell(message)      # rank 0's JSON message, at every rank; the others give None
    data = group.share(data)           # the same for bytes
    parts = group.gather(data)         # every rank's bytes, at rank 0
    group.sum(tensor)                  # in place, at every rank; group.copy(tensor): rank 0's
    group.device(name)                 # the GPU of this rank; group.threads(wanted): its threads
    group.close()

Whoever starts the processes chooses one of two ways to say what they are:

- torch's: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and, if it is known, LOCAL_RANK, as torchrun sets them.
- GPTFL_RENDEZVOUS, a path that every rank can reach and at which no file lies, with the variables of a launcher that
  sets no address: GPTFL_RANK and GPTFL_RANKS (our own), PMI_RANK and PMI_SIZE (mpiexec of MPICH), OMPI_COMM_WORLD_RANK
  and _SIZE (Open MPI), SLURM_PROCID and SLURM_NTASKS (srun). Rank 0 writes its address there and removes it once all
  have met. No MPI library is needed.

A launcher's variables alone mean nothing: every process that a rank of an MPI job starts inherits them. `outside` gives
an environment without both, for such a process. CPU tensors go over gloo, whose waiting ranks sleep; CUDA tensors over
NCCL where each rank has a GPU of its own, which NCCL asks for, and else over gloo too. A rank that ends breaks its
connections, so the others raise RankLost in the call that they are in, or the next; one that hangs is given up after
`patience`. torch is loaded by groups of several alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfl_dist.errors import ConfigError, LaunchError, RankLost, first_line
from gptfl_dist.files import write_file

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

RENDEZVOUS = "GPTFL_RENDEZVOUS"
_TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK, RANKS = "GPTFL_RANK", "GPTFL_RANKS"
_LAUNCHERS = (
    (RANK, RANKS),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
_OF_A_RANK = frozenset(
    {
        *_TORCH,
        *("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
        *(RENDEZVOUS, RANK, RANKS),
    }
)
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
PLACE = "GPTFL_PLACE"
"""Tells a process its place among those that we start side by side on one machine, and that are no group."""
_MEETING = 300.0  # seconds that rank 0 has to write its address


class Group:
    """A group of one."""

    rank = 0
    size = 1

    @property
    def leader(self) -> bool:
        """Whether this is rank 0, which speaks for the group."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of the configuration (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`) as this rank is to use it.

        Processes that were started side by side on one machine take its GPUs in turn.
        """
        place = _number(*_LOCAL_RANKS, PLACE)
        return name if place is None or name not in ("auto", "cuda") else _gpu(place, name)

    def threads(self, wanted: int) -> int:
        """`wanted`, or where it is 0 all cores that this rank may use; ranks that may use the same ones share them."""
        return wanted or max(1, len(os.sched_getaffinity(0)) // self._sharers)

    _sharers = 1

    def tell(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """Rank 0's message, at every rank."""
        told: dict[str, Any] = json.loads(self.share(None if message is None else json.dumps(message).encode()))
        return told

    def share(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, at every rank."""
        assert data is not None
        return data

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank gives, by rank, at rank 0; nothing at the others."""
        return [data]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up the tensors of all ranks, in place; returns it."""
        return tensor

    def copy(self, tensor: torch.Tensor) -> None:
        """Overwrites the tensor by rank 0's."""

    def process_group(self, tensor: torch.Tensor) -> ProcessGroup | None:
        """The group of torch.distributed for tensors like this one; None is its default group."""
        return None

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Raises RankLost where a call of torch.distributed in the block finds that a rank is gone."""
        yield

    def close(self) -> None:
        """Leaves the group."""


ALONE = Group()


class _Ranks(Group):
    """One rank of several. The default process group of torch.distributed is open, over gloo."""

    def __init__(self, rank: int, size: int, local_rank: int | None, patience: timedelta) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        # Where a batch system bound ranks to cores they have them alone; else ranks of one machine share all of them.
        mine = [socket.gethostname(), sorted(os.sched_getaffinity(0))]
        places = self._everyones(mine)
        self._sharers = places.count(mine)
        hosts = [host for host, _ in places]
        self._local_rank = hosts[:rank].count(mine[0]) if local_rank is None else local_rank
        gpus = self._everyones(_serial_number(self._local_rank))
        apart = None not in gpus and len(set(gpus)) == size and dist.is_nccl_available()
        self._of_gpus = dist.new_group(backend="nccl", timeout=patience) if apart else None

    def device(self, name: str) -> str:
        import torch

        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cpu", "cuda"):
            raise ConfigError(
                f"device is {name}, but {self.size} ranks share the work",
                hint="set device to auto, cpu or cuda: with cuda each rank takes a GPU of its own",
            )
        return _gpu(self._local_rank, name) if name == "cuda" else name

    def share(self, data: bytes | None) -> bytes:
        import torch

        count = torch.tensor([0 if data is None else len(data)])
        self.copy(count)
        shared = torch.empty(int(count), dtype=torch.uint8)
        if data:
            shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if len(shared):
            self.copy(shared)
        return shared.numpy().tobytes()

    def gather(self, data: bytes) -> list[bytes]:
        import torch
        import torch.distributed as dist

        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(data)
        self.sum(counts)
        mine = torch.zeros(max(1, int(counts.max())), dtype=torch.uint8)  # all send as many bytes as the longest
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.leader else None
        with self.unbroken():
            dist.gather(mine, parts, dst=0)
        return [part[:count].numpy().tobytes() for part, count in zip(parts or [], counts.tolist(), strict=False)]

    def _everyones(self, value: Any) -> list[Any]:
        """What each rank gives, which JSON can hold, by rank, at every rank."""
        gathered = [json.loads(part) for part in self.gather(json.dumps(value).encode())]
        everyones: list[Any] = self.tell({"by rank": gathered} if self.leader else None)["by rank"]
        return everyones

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        with self.unbroken():
            dist.all_reduce(tensor, group=self.process_group(tensor))
        return tensor

    def copy(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        with self.unbroken():
            dist.broadcast(tensor, src=0, group=self.process_group(tensor))

    def process_group(self, tensor: torch.Tensor) -> ProcessGroup | None:
        return self._of_gpus if tensor.is_cuda else None

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        import torch.distributed as dist

        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another: {first_line(error, 160)}",
                hint="a rank that ended says why in its own output",
            ) from error


def open_group(patience: timedelta) -> Group:
    """Joins the group that the environment names; a group of one where it names none.

    `patience` bounds how long a rank waits for another in one call. Raises LaunchError.
    """
    rank, size = place()
    if size == 1:
        return Group()
    met = None if _told_by_torch() else Path(os.environ[RENDEZVOUS])
    _join(rank, size, met, patience)
    return _Ranks(rank, size, _number(*_LOCAL_RANKS), patience)


def place() -> tuple[int, int]:
    """This process's rank and the size of its group, which it need not have joined. Raises LaunchError."""
    if _told_by_torch():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if RENDEZVOUS not in os.environ:
        return 0, 1
    if (told := told_by_launcher()) is not None:
        return told
    raise LaunchError(
        f"{RENDEZVOUS} is set, but no launcher told this process its rank",
        hint=f"start it by torchrun, mpiexec or srun; expected {', '.join(f'{r} and {s}' for r, s in _LAUNCHERS)}",
    )


def told_by_launcher() -> tuple[int, int] | None:
    """The rank and the number of ranks that a launcher which sets no address told this process."""
    for rank, size in _LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def _told_by_torch() -> bool:
    return all(name in os.environ for name in _TORCH)


def _number(*variables: str) -> int | None:
    """What the first of these that is set says."""
    return next((int(os.environ[name]) for name in variables if name in os.environ), None)


def _gpu(place: int, name: str) -> str:
    """The GPU of the process at this place of its machine; `name` where there is none."""
    import torch

    if not torch.cuda.is_available():
        return name
    own = f"cuda:{place % torch.cuda.device_count()}"  # a scheduler may show each process its own alone
    torch.cuda.set_device(own)
    return own


def _serial_number(place: int) -> str | None:
    """Of the GPU of the process at this place of its machine, however a scheduler has numbered it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(_gpu(place, "cuda")).uuid)


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that a rank starts and that is none itself. It keeps the rank's GPU."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_RANK and not name.startswith("TORCHELASTIC_")
    }


def _join(rank: int, size: int, met: Path | None, patience: timedelta) -> None:
    """Opens the default process group of torch.distributed, at torch's own address or at that in the file `met`."""
    import torch.distributed as dist

    # Functions in there keep the group that is the default when they are imported, and its threads would then live on
    # into the interpreter's end, which aborts the process now and then. What trains would import it later.
    import torch.distributed.nn  # noqa: F401
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

    try:
        if met is None:
            dist.init_process_group("gloo", timeout=patience)
            return
        if rank == 0:
            host = socket.gethostname()
            store = TCPStore(host, 0, size, is_master=True, timeout=patience, wait_for_workers=False)
            write_file(met, f"{host} {store.port}")
        else:
            host, port = _address(met)
            store = TCPStore(host, port, size, is_master=False, timeout=patience)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {size} cannot join the others: {first_line(error)}",
            hint="all ranks must run, and reach rank 0 by the name of its host",
        ) from error
    if rank == 0:
        met.unlink(missing_ok=True)


def _address(met: Path) -> tuple[str, int]:
    """Host and port of rank 0, once it has written them."""
    end = time.monotonic() + _MEETING
    while time.monotonic() < end:
        try:
            host, port = met.read_text().split()
            return host, int(port)
        except FileNotFoundError:
            time.sleep(0.05)
    raise LaunchError(
        f"rank 0 did not write its address to {met} within {_MEETING:g} s",
        hint="that path must lie in a folder that all ranks share",
    )
