"""A TLS 1.3 session without a wire: it makes records of messages and messages of records; others carry the records.

For wires that are no sockets, such as MPI. Both sides show their certificates, and OpenSSL does the cryptography,
through memory BIOs. What `step` and `seal` return must reach the peer's `step` and `open` whole and in order: records
that are cut short, changed, swapped or sent twice are refused. No renegotiation, no resumption, no early data.

The cipher suite is OpenSSL's first, AES-256-GCM. What is large passes beside the session, see `bulk`.
"""

from __future__ import annotations

import ssl
import struct

from gptfl_dist.errors import IdentityError, ProtocolError
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.credentials import ONE_AUTHORITY, identity_in, tls_context
from gptfl_dist.security.identity import Identity

LONGEST = 1 << 20
"""The most bytes of one message."""

_HEAD = struct.Struct(">BI")  # a message's kind and size, in a record before those of its bytes
_RECORD = 1 << 14  # bytes that a record holds at most
_HEADER = 5  # bytes before a record's content: type, version, length
_EXPANSION = 256  # bytes by which a record's content may be longer than what it holds (RFC 8446, section 5.2)

LONGEST_SEALED = LONGEST + (LONGEST // _RECORD + 2) * (_HEADER + _EXPANSION)
"""The most bytes of records that `step` and `open` take: more need not be received."""


class Session:
    """One end of a session, for one thread."""

    def __init__(self, credentials: Credentials, peer: Identity, name: str) -> None:
        """`peer` is who the other end must be; the coordinator is the server. Error messages call it `name`."""
        self._peer = peer
        self._name = name
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = peer.role == "silo"
        context = tls_context(credentials, server=server)
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self.established = False

    def step(self, records: bytes | bytearray | memoryview = b"") -> bytes:
        """One step of the handshake: takes what the peer sent, returns what to send to it, if anything.

        The silo takes the first step, with nothing from its peer. Raises IdentityError where the peer is not who it
        must be, ProtocolError where it speaks no TLS 1.3; then nothing more is to be sent to it.
        """
        self._take(records)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return self._outgoing.read()
        except ssl.SSLCertVerificationError as error:
            raise self._refusal(f"is not one to trust ({error.verify_message})") from None
        except ssl.SSLError as error:
            raise ProtocolError(f"no TLS 1.3 session with {self._name}: {error.reason or error}") from None
        certificate = self._ssl.getpeercert(binary_form=True) or b""
        found = identity_in(ssl.DER_cert_to_PEM_cert(certificate).encode(), f"the certificate of {self._name}")
        if found != self._peer:
            raise self._refusal(f"is that of {found.uri}")
        self.established = True
        return self._outgoing.read()

    def _refusal(self, reason: str) -> IdentityError:
        return IdentityError(
            f"the certificate of {self._name} {reason}, expected a valid one of {self._peer.uri} from our authority",
            hint=f"{ONE_AUTHORITY}; `gptfl check FEDERATION_FILE` compares them",
        )

    def seal(self, kind: int, data: bytes | bytearray | memoryview) -> bytes:
        """The records of a message: its kind, from 0 to 255, and 1 to LONGEST bytes."""
        assert self.established
        assert 0 < len(data) <= LONGEST
        self._ssl.write(_HEAD.pack(kind, len(data)))
        self._ssl.write(data)
        return self._outgoing.read()

    def open(self, records: bytes | bytearray | memoryview) -> tuple[int, bytearray]:
        """The kind and the bytes of a message.

        Raises ProtocolError for records that are not the whole next message of the peer.
        """
        assert self.established
        self._take(records)
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head))
        kind, size = _HEAD.unpack(head)
        if not 0 < size <= LONGEST:
            raise ProtocolError(f"{self._name} sent a message of {size} bytes, expected 1 to {LONGEST}")
        content = bytearray(size)
        self._fill(memoryview(content))
        if self._incoming.pending or self._ssl.pending():
            raise ProtocolError(f"{self._name} sent more than the message of {size} bytes that it announced")
        return kind, content

    def _fill(self, buffer: memoryview) -> None:
        filled = 0
        while filled < len(buffer):
            try:
                count: int = self._ssl.read(len(buffer) - filled, buffer[filled:])  # type: ignore[assignment]  # into a buffer, of which the stubs know no count
            except ssl.SSLWantReadError:
                raise ProtocolError(f"{self._name} sent less than a whole message") from None
            except ssl.SSLError as error:
                raise ProtocolError(
                    f"what came from {self._name} is not what it sent: {error.reason or error}",
                    hint="messages were changed, lost or repeated on their way",
                ) from None
            if not count:
                raise ProtocolError(f"{self._name} has ended the TLS session")
            filled += count

    def _take(self, records: bytes | bytearray | memoryview) -> None:
        """Refuses what is not whole, for the rest of which OpenSSL would wait."""
        if len(records) > LONGEST_SEALED:
            raise ProtocolError(f"{self._name} sent {len(records)} bytes, expected at most {LONGEST_SEALED}")
        end = 0
        while end + _HEADER <= len(records):
            end += _HEADER + int.from_bytes(records[end + 3 : end + _HEADER])
        if end != len(records):
            raise ProtocolError(f"{self._name} sent {len(records)} bytes that are not whole TLS records")
        self._incoming.write(records)
