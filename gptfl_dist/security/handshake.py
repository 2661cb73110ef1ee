"""A TLS handshake with a coordinator for its own sake: it says in plain words why no connection comes about.

gRPC tells of a connection that fails in the words of its own insides. `shake_hands` dials as a silo does (TLS 1.3, the
certificates of both sides, through the proxy of the environment where there is one) up to the coordinator's first
word, and hangs up. `gptfl check` calls it, and `gptfl silo` where gRPC does not get through.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket
import ssl
from base64 import b64encode
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass

from cryptography import x509

from gptfl_dist.config.base import host_of, port_of
from gptfl_dist.errors import ConnectionFailed, IdentityError
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.clocks import life, out_of_date
from gptfl_dist.security.credentials import how_to_replace, identity_in, tls_context
from gptfl_dist.security.identity import Identity

_PATIENCE = 5.0  # seconds for the whole of it
_OUT_OF_DATE = (9, 10)  # OpenSSL's codes of a certificate that is not yet valid, or has expired
_OTHER_HOST = (62, 64)  # of one for another host name, or another IP address
_ADDRESS = "check coordinator.address"
_THERE = f"{_ADDRESS}, that the coordinator runs, and that a firewall lets this machine dial out to it"
_PROXY = "check the variables https_proxy and no_proxy, and what the proxy lets through"

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Unreachable(ConnectionFailed):
    """Nothing answers at the address, or what answers hangs up. Trying again may help."""


async def shake_hands(address: str, credentials: Credentials) -> None:
    """Raises Unreachable where trying again may help, ConnectionFailed or IdentityError where it does not."""
    own = identity_in(credentials.certificate, "this side's certificate")
    host = host_of(address)
    writer = None
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await _dial(address)
            await writer.start_tls(_context(credentials), server_hostname=host)
            peer = writer.get_extra_info("peercert") or {}
            # In TLS 1.3 this side is done before the other has judged its certificate: only its first word tells.
            first = await _first_word(reader, address, credentials)
    except ssl.SSLCertVerificationError as error:
        dates = await _dates_shown(address) if error.verify_code in _OUT_OF_DATE else ""
        raise IdentityError(
            f"the certificate of {address} is not one to trust: {error.verify_message}{dates}",
            hint=_advice(error, host),
        ) from None
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise ConnectionFailed(f"what answers at {address} speaks no TLS", hint=_ADDRESS) from None
        raise IdentityError(f"no TLS 1.3 connection with {address}: {error.reason or error}", hint=_ADDRESS) from None
    except TimeoutError:
        raise Unreachable(f"{address} does not answer: timed out", hint=_THERE) from None
    except socket.gaierror as error:
        raise Unreachable(f"{host} cannot be resolved: {error.strerror}", hint=_ADDRESS) from None
    except OSError as error:
        raise Unreachable(f"{address} {_what_happened(error)}", hint=_THERE) from None
    finally:
        if writer is not None:
            writer.transport.abort()
    if not first:
        raise Unreachable(
            f"{address} hangs up after the TLS handshake: it is stopping, or does not take this side's certificate",
            hint="if this lasts, ask the coordinator's operator for a matching set of files, and compare the clocks: "
            f"here it is {datetime.now(UTC):%F %T} UTC",
        )
    uris = [str(value) for kind, value in peer.get("subjectAltName", ()) if kind == "URI"]
    if uris != [Identity(own.federation, "coordinator", "coordinator").uri]:
        raise IdentityError(
            f"{address} is {', '.join(uris) or 'nobody'}, expected the coordinator of {own.federation}", hint=_ADDRESS
        )


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is this machine, named in a way that never leaves it."""
    host = host_of(address).lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _dial(address: str) -> _Streams:
    """A TCP connection with an address, through the proxy that gRPC would take. Raises Unreachable or OSError."""
    proxy = proxy_for(address)
    if proxy is None:
        return await asyncio.open_connection(host_of(address), port_of(address))
    try:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    except OSError as error:
        raise Unreachable(f"the proxy {proxy.host} {_what_happened(error)}", hint=_PROXY) from None
    try:
        extra = "".join(f"{name}: {value}\r\n" for name, value in proxy.headers.items())
        writer.write(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{extra}\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
    except (EOFError, asyncio.LimitOverrunError):
        answer = b""
    except BaseException:
        writer.transport.abort()
        raise
    status = answer.partition(b"\r\n")[0].decode(errors="replace")
    if status.split()[1:2] != ["200"]:
        writer.transport.abort()
        raise Unreachable(f"the proxy {proxy.host} gives no way to {address}: {status or 'no answer'}", hint=_PROXY)
    return reader, writer


class Proxy(NamedTuple):
    """An HTTP proxy, and what is said to it beside the address that is wanted."""

    host: str
    port: int
    headers: dict[str, str]


def proxy_for(address: str) -> Proxy | None:
    """The proxy for HOST:PORT, from the variables that gRPC reads; None where there is none."""
    past = _first_set("no_grpc_proxy", "no_proxy")
    if is_loopback(address) or proxy_bypass(host_of(address), {"no": past}):
        return None
    proxy = urlsplit(_first_set("grpc_proxy", "https_proxy", "http_proxy"))
    if proxy.hostname is None:
        return None
    login = b64encode(unquote(f"{proxy.username}:{proxy.password or ''}").encode()).decode()
    return Proxy(proxy.hostname, proxy.port or 80, {"Proxy-Authorization": f"Basic {login}"} if proxy.username else {})


def _first_set(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


def _context(credentials: Credentials) -> ssl.SSLContext:
    context = tls_context(credentials, server=False)
    context.check_hostname = True
    context.set_alpn_protocols(["h2"])
    return context


async def _first_word(reader: asyncio.StreamReader, address: str, credentials: Credentials) -> bytes:
    try:
        return await reader.read(1)
    except ssl.SSLError as error:
        why, advice = error.reason or str(error), "ask the coordinator's operator for a matching set of files"
        if why.endswith("CERTIFICATE_EXPIRED"):  # by the coordinator's clock
            why = f"expired, it says; it is {life(x509.load_pem_x509_certificate(credentials.certificate))}"
            advice = how_to_replace(identity_in(credentials.certificate, "this side's certificate"))
        raise IdentityError(
            f"{address} does not take this side's certificate: {why}",
            hint=f"{advice}; compare the clocks",
        ) from None
    except ConnectionError:
        return b""


async def _dates_shown(address: str) -> str:
    """What is wrong with the dates of the certificate that is shown, which the check of it does not tell."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    writer = None
    try:
        async with asyncio.timeout(_PATIENCE):
            _, writer = await _dial(address)
            await writer.start_tls(context)
            shown = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    except (OSError, TimeoutError, ValueError, Unreachable):
        return ""
    finally:
        if writer is not None:
            writer.transport.abort()
    wrong = out_of_date(shown)
    return f": {wrong}" if wrong else ""


def _advice(error: ssl.SSLCertVerificationError, host: str) -> str:
    if error.verify_code in _OUT_OF_DATE:
        return "set this machine's clock if it is wrong; else ask the coordinator's operator to renew the certificate"
    if error.verify_code in _OTHER_HOST:
        return (
            f"{_ADDRESS}; where it is right, the coordinator needs {host} among enrolment.hosts, or sets made by "
            f"gptfl credentials with --host {host}"
        )
    return f"{_ADDRESS}, and that coordinator.authority is of the sets that the coordinator's operator made last"


def _what_happened(error: OSError) -> str:
    # asyncio tells of every address that it tried, each by its number; the first says enough.
    number = re.search(r"\[Errno (\d+)\]", str(error))
    # What asyncio raises where the other side closes in mid-handshake has none; a reset is the same with other timing.
    if number is None or int(number[1]) == errno.ECONNRESET:
        return "hangs up during the TLS handshake"
    return f"does not answer: {os.strerror(int(number[1]))}"
