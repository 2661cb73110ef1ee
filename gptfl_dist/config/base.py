"""What every section of a configuration file shares: unknown keys are errors, and a loaded section cannot change."""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"),
    Field(description="letters, digits, '.', '_' and '-', at most 63, starting with a letter or digit"),
]
"""A name that is safe in a file name, a certificate and a message."""

Address = Annotated[
    str,
    StringConstraints(
        pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+)"
        r":(6553[0-5]|655[0-2]\d|65[0-4]\d\d|6[0-4]\d{3}|[1-5]\d{4}|\d{1,4})$"
    ),
    Field(description="a host and a port of at most 65535 as host:port"),
]

HOST = r"^[A-Za-z0-9_.:-]+$"
Host = Annotated[str, StringConstraints(pattern=HOST), Field(description="a host name or an IP address")]

EVERYWHERE = ("0.0.0.0", "::")
"""The hosts to listen on that stand for all addresses of a machine."""

Share = Annotated[float, Field(gt=0, lt=1)]

Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="a device: auto, cpu, cuda, cuda:1 or mps")
]


def host_of(address: str) -> str:
    """The host of host:port, an IPv6 address without its brackets and in its one spelling."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def host_to_bind(address: str) -> str:
    """The host to listen on: 0.0.0.0 and [::] mean the same, every address of this machine, IPv4 and IPv6 alike."""
    host = host_of(address)
    return "::" if host in EVERYWHERE and socket.has_dualstack_ipv6() else host


class Section(BaseModel):
    """A section of a file. Frozen, so that what was validated stays what runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())
