"""Whether an address of a file, host:port, can be listened on."""

from __future__ import annotations

import errno
import socket

from gptfl_dist.config.base import host_of, host_to_bind, port_of
from gptfl_dist.errors import LaunchError

_REASONS = {
    errno.EADDRNOTAVAIL: "the address is not this machine's",
    errno.EACCES: "this user may not open the port",
}


class PortInUse(LaunchError):
    """Another process listens there."""


def try_listening(address: str, setting: str) -> None:
    """Listens on the address of a setting for a moment, as the coordinator will.

    Raises PortInUse where somebody does already, LaunchError where it cannot for another reason.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(
            host_to_bind(address), port_of(address), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise LaunchError(
            f"{setting} is {address}, and {host_of(address)} cannot be resolved: {error.strerror}",
            hint="name an address of this machine, or 0.0.0.0 for all",
        ) from None
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: a closed connection holds no port
        if target[0] == "::":
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            trial.bind(target)
            trial.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    f"cannot listen on {address}: the port is in use",
                    hint=f"stop the process that holds it, or set {setting} to another port",
                ) from None
            why = _REASONS.get(error.errno or 0, error.strerror or str(error))
            raise LaunchError(
                f"cannot listen on {address}: {why}", hint=f"set {setting} to an address and a port that can be had"
            ) from None
