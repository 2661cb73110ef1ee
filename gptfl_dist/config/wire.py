"""The sections of the wire: `exchange`, `enrolment`, `collective` and `compression`.

They say where silos come in and by which certificates, what each may ask for, and in which form updates and weights
travel; nothing of them says what is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from gptfl_dist.config.base import Address, Host, Section, Share
from gptfl_dist.config.units import Duration, Rate, Size


class Limits(Section):
    """What one silo may ask of the coordinator, as one operator may. Who goes beyond is slowed or refused, alone."""

    rate: Annotated[Rate, Field(ge=4096)] = 2**30
    calls: PositiveInt = 100
    connections: Annotated[int, Field(ge=2)] = 4
    transfers: Annotated[int, Field(ge=2)] = 4


class Exchange(Section):
    """The wire. `listen` is where the coordinator takes silos over gRPC; port 0 takes any free port."""

    listen: Address = "127.0.0.1:0"
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    chunk: Size = 2**20
    keepalive: Duration = 30.0
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        given = [name for name in ("authority", "certificate", "key") if getattr(self, name) is not None]
        if given and len(given) < 3:
            missing = {"authority", "certificate", "key"} - set(given)
            raise ValueError(f"{', '.join(given)} given without {', '.join(sorted(missing))}: give all three or none")
        if not 4096 <= self.chunk <= 2**24:
            raise ValueError(f"chunk is {self.chunk} bytes, expected 4KiB to 16MiB")
        return self


class Enrolment(Section):
    """The federation's own authority, kept in a folder, and the port where invited silos enrol.

    `hosts` are the names and addresses under which silos dial both ports, the first the one that invitations name.
    """

    authority: Path = Path("authority")
    hosts: list[Host] = Field(min_length=1)
    listen: Address = "0.0.0.0:8444"
    certificates: Annotated[Duration, Field(ge=5.0)] = 7 * 24 * 3600.0
    approval: bool = False


class Collective(Section):
    """How ranks under mpiexec or torchrun deal with each other; there `exchange` names nothing but the certificates.

    Updates come whole (`exact`) or are summed on their way (`fast`).
    """

    reduction: Literal["exact", "fast"] = "exact"
    trust: Literal["plain", "tls"] = "plain"


class Compression(Section):
    """How updates (up) and weights (down) are encoded on their way; `top_share` and `error_feedback` are of updates."""

    up: Literal["none", "fp16", "bf16", "int8", "topk"] = "none"
    down: Literal["none", "fp16", "bf16", "int8"] = "none"
    top_share: Share = 0.01
    error_feedback: bool = True
    lossless: Literal["none", "zstd"] = "none"
