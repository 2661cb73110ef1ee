"""Addresses as the files name them, host:port, and whether one can be listened on."""

from __future__ import annotations

import errno
import ipaddress
import socket

from gptfl_dist.errors import LaunchError

__all__ = ["host_of", "port_of", "try_listening"]

_REASONS = {
    errno.EADDRINUSE: "the port is in use",
    errno.EADDRNOTAVAIL: "the address is not this machine's",
    errno.EACCES: "this user may not open the port",
}


def host_of(address: str) -> str:
    """The host of host:port, an IPv6 address without its brackets and in its one spelling."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


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
