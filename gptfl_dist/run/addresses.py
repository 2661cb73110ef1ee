"""Whether an address of a file, host:port, can be listened on."""

from __future__ import annotations

import errno
import socket

from gptfl_dist.config.base import host_of, port_of
from gptfl_dist.errors import LaunchError

_REASONS = {
    errno.EADDRINUSE: "the port is in use",
    errno.EADDRNOTAVAIL: "the address is not this machine's",
    errno.EACCES: "this user may not open the port",
}


def try_listening(address: str) -> None:
    """Listens on `exchange.listen` for a moment, as the coordinator will. Raises LaunchError where it cannot."""
    host = host_of(address)
    try:
        family, _, _, _, target = socket.getaddrinfo(
            host, port_of(address), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise LaunchError(
            f"exchange.listen is {address}, and {host} cannot be resolved: {error.strerror}",
            hint="name an address of this machine, or 0.0.0.0 for all",
        ) from None
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: a closed connection holds no port
        try:
            trial.bind(target)
            trial.listen()
        except OSError as error:
            why = _REASONS.get(error.errno or 0, error.strerror or str(error))
            raise LaunchError(
                f"cannot listen on {address}: {why}",
                hint="stop the process that holds it, or set exchange.listen to another port (0 takes any free one)",
            ) from None
