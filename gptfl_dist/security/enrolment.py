"""Where whoever is invited gets a first certificate: a port of its own, since the other asks everybody for theirs.

HTTP over TLS 1.3, two requests. `GET /v1/authority` answers with the root certificate, which the other side
compares with the fingerprint of its invitation before it says anything. `POST /v1/enrol` takes the token, the identity
that it is for and a certificate request, and answers with the certificate, or with 202 while the operator has yet to
approve. The port is open only while there are invitations that can be used or wait for approval, and for a few seconds
after the last was used: its answer may have been lost.

Whoever can reach the port can talk to it, so a connection gets little: a few seconds, a few kilobytes, one of a few
places; and an address that guessed wrong several times gets nothing for a while. All of a network's /64 count as one
IPv6 address, for one host can take any of them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gptfl_dist.config.base import host_to_bind, port_of
from gptfl_dist.errors import GptflError, IdentityError, LaunchError
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.security.credentials import serving_context
from gptfl_dist.security.identity import Identity, called
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.request import LONGEST, fingerprint_of
from gptfl_dist.security.trust import certify, requested_key

_log = logging.getLogger(__name__)

AUTHORITY, ENROL = "/v1/authority", "/v1/enrol"

_PATIENCE = 10.0  # seconds that a connection may take, all in all
_PLACES, _PLACES_OF_ONE = 64, 4  # connections at a time, of all addresses and of one
_LONGEST_BODY = 2 * LONGEST
_GUESSES = 5  # that an address has
_FORGOTTEN = 60.0  # seconds after which a wrong guess is
_ADDRESSES = 4096  # whose wrong guesses are remembered
_LOOK_EVERY = 1.0  # seconds between two looks whether there are invitations


@dataclass(frozen=True)
class Desk:
    """What enrols: the authority, its registry, and the address that is to be dialled afterwards."""

    authority: Callable[[], Authority]
    registry: Registry
    credentials: Callable[[], Credentials]  # that the listener shows
    approval: bool
    address: str
    note: Callable[..., None]  # called with an event and its fields

    def enrol(self, who: Identity, token: str, request: bytes) -> dict[str, str] | None:
        """The answer to who enrols, None where they have to wait for approval. Raises IdentityError."""
        authority = self.authority()
        key = fingerprint_of(requested_key(authority.federation, who, request))
        name = called(who.role, who.name)
        if not self.registry.redeem(token, who, key, approval=self.approval):
            _log.info("%s asks to enrol with the key %s: gptfl approve lets it in", name, key)
            return None
        certificate, roots = certify(authority, self.registry, who, request, self.note, f"{who.role} enrolled")
        _log.info("%s enrolled with the key %s", name, key)
        return {"certificate": certificate.decode(), "authority": roots.decode(), "address": self.address}


class Enrolment:
    """Keeps the port open while it is needed. A context manager."""

    def __init__(self, listen: str, desk: Desk) -> None:
        self._listen = listen
        self._desk = desk
        self._server: _Server | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="enrolment", daemon=True)

    def __enter__(self) -> Enrolment:
        """Raises LaunchError where the port cannot be had."""
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._close()

    def _watch(self) -> None:
        said = ""
        while not self._ending.wait(_LOOK_EVERY):
            try:
                self._look()
                said = ""
            except GptflError as error:
                if str(error) != said:
                    _log.error("enrolment: %s", error)
                said = str(error)

    def _look(self) -> None:
        wanted = self._desk.registry.is_open()
        if wanted and self._server is None:
            self._server = _Server(self._listen, self._desk)
            threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        elif not wanted:
            self._close()

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, listen: str, desk: Desk) -> None:
        self.desk = desk
        self.guesses = _Guesses()
        self._shown: tuple[Credentials, ssl.SSLContext] | None = None
        self._lock = threading.Lock()
        self._places: Counter[str] = Counter()
        host = host_to_bind(listen)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port_of(listen)), _Request)
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {listen}: {error.strerror}", hint="set enrolment.listen to a free port"
            ) from None

    def server_bind(self) -> None:
        if self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[Any, Any]:
        request, (host, *more) = super().get_request()
        return request, (_as_ipv4(host), *more)

    def process_request(self, request: Any, client_address: Any) -> None:
        who = counted_as(client_address[0])
        with self._lock:
            full = self._places.total() >= _PLACES or self._places[who] >= _PLACES_OF_ONE
            if not full:
                self._places[who] += 1
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        request.settimeout(_PATIENCE)
        secured = self._context().wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        end = threading.Timer(_PATIENCE, _hang_up, (secured,))
        end.start()
        try:
            secured.do_handshake()
            self.finish_request(secured, client_address)
        except OSError as error:  # ssl.SSLError among them: who speaks no TLS 1.3 is not answered
            _log.debug("enrolment: %s hung up: %s", client_address[0], error)
        except Exception:  # a fault of ours in one request is logged, and ends neither the port nor the coordinator
            self.handle_error(secured, client_address)
        finally:
            end.cancel()
            self.shutdown_request(secured)
            with self._lock:
                self._places[counted_as(client_address[0])] -= 1
                self._places += Counter()  # drops those that have none any more

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.exception("enrolment: a request from %s failed", client_address[0])

    def _context(self) -> ssl.SSLContext:
        credentials = self.desk.credentials()
        if self._shown is None or self._shown[0] is not credentials:
            self._shown = credentials, serving_context(credentials)
        return self._shown[1]


class _Request(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "gptfl", ""

    def do_GET(self) -> None:
        if self.path == AUTHORITY:
            self._answer(200, {"authority": self.server.desk.authority().roots.decode()})
        else:
            self._answer(404, {"error": "there is nothing here"})

    def do_POST(self) -> None:
        if self.path != ENROL:
            self._answer(404, {"error": "there is nothing here"})
            return
        where = str(self.client_address[0])
        who = counted_as(where)
        if not self.server.guesses.allowed(who):
            _log.warning("enrolment: %s guessed wrong too often and is not heard", where)
            self._answer(429, {"error": "too many wrong tries from this address", "hint": "wait a minute"})
            return
        try:
            answer = self.server.desk.enrol(*self._asked())
        except IdentityError as error:
            self.server.guesses.wrong(who)
            _log.warning("enrolment: %s is refused: %s", where, error.message)
            self._answer(403, {"error": error.message, "hint": error.hint})
        else:
            self._answer(202 if answer is None else 200, answer or {})

    def _asked(self) -> tuple[Identity, str, bytes]:
        """As `asked_in`."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LONGEST_BODY:
            raise IdentityError(f"a request of {length[:20] or 'unknown'} bytes, expected at most {_LONGEST_BODY}")
        return asked_in(self.rfile.read(int(length)))

    def _answer(self, status: int, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("enrolment: %s: %s", self.client_address[0], format % args)


def asked_in(body: bytes) -> tuple[Identity, str, bytes]:
    """Who wants to be whom, the token and the certificate request in a body. Raises IdentityError."""
    try:
        asked = json.loads(body)
        uri, token, request = asked["identity"], asked["token"], asked["request"].encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise IdentityError("the request cannot be read") from None
    if not isinstance(uri, str) or not isinstance(token, str):
        raise IdentityError("the request cannot be read")
    return Identity.from_uri(uri), token, request


def counted_as(host: str) -> str:
    """What the connections and the guesses of an address count for: itself, or of IPv6 its network of 64 bits."""
    address = ipaddress.ip_address(_as_ipv4(host))
    if address.version == 4:
        return str(address)
    return str(ipaddress.IPv6Network((address.packed[:8] + bytes(8), 64)))


def _as_ipv4(host: str) -> str:
    """An IPv4 address that came over an IPv6 socket by its own name; any other as it is."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return host if mapped is None else str(mapped)


class _Guesses:
    """Counts the wrong tries of each address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: dict[str, deque[float]] = {}

    def allowed(self, who: str) -> bool:
        with self._lock:
            times = self._times.get(who, deque())
            while times and times[0] < time.monotonic() - _FORGOTTEN:
                times.popleft()
            return len(times) < _GUESSES

    def wrong(self, who: str) -> None:
        with self._lock:
            if who not in self._times and len(self._times) >= _ADDRESSES:
                del self._times[next(iter(self._times))]
            self._times.setdefault(who, deque(maxlen=_GUESSES)).append(time.monotonic())


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
