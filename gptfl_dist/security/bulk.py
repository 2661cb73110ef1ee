"""Sealing of weights and updates on their way, under keys that the two ends told one another in a TLS session.

TLS cuts what it seals into records of 16 KiB, and Python's memory BIOs copy every byte some times more. Here a message
of up to a MiB is sealed in one call, from where it lies to where it is sent from: AES-256-GCM, with a key for each
sender.

The nonce is the number of the message under its key, which both ends count and nobody sends. So a message that was
changed or repeated, or comes out of its turn because others were dropped or swapped, does not open. A key seals
MESSAGES of them (16 GiB) and is then followed by one that is derived from it (HKDF-Expand, RFC 5869); AES-GCM is good
for more than twenty times as much (RFC 8446, section 5.5).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from gptfl_dist.errors import ProtocolError

KEY_BYTES = 32
TAG_BYTES = 16
"""A sealed message is so much longer."""

MESSAGES = 1 << 14
"""How many messages a key seals."""

_NONCE_BYTES = 12


class Bulk:
    """The messages of one sender: `seal` at its end, or `open` where they arrive, called for each in turn."""

    def __init__(self, key: bytes, peer: str) -> None:
        """`key` seals the messages of this sender alone. Error messages call it `peer`."""
        self._key = key
        self._peer = peer
        self._cipher = AESGCM(key)
        self._count = 0

    def seal(self, data: memoryview, sealed: memoryview) -> None:
        """Fills `sealed`, which is TAG_BYTES longer than `data`."""
        cipher, nonce = self._next()
        cipher.encrypt_into(nonce, data, None, sealed)

    def open(self, sealed: memoryview, data: memoryview) -> None:
        """Fills `data`. Raises ProtocolError where `sealed` is not the next message, whole and as it was sealed."""
        if len(sealed) != len(data) + TAG_BYTES:
            raise ProtocolError(f"{self._peer} sent {len(sealed)} bytes, expected {len(data) + TAG_BYTES}")
        cipher, nonce = self._next()
        try:
            cipher.decrypt_into(nonce, sealed, None, data)
        except InvalidTag:
            raise ProtocolError(
                f"what came from {self._peer} is not what it sent",
                hint="messages were changed, lost or repeated on their way",
            ) from None

    def _next(self) -> tuple[AESGCM, bytes]:
        """The cipher and the nonce of the next message."""
        if self._count == MESSAGES:
            self._key = HKDFExpand(SHA256(), KEY_BYTES, b"gptfl bulk: the next key").derive(self._key)
            self._cipher = AESGCM(self._key)
            self._count = 0
        self._count += 1
        return self._cipher, self._count.to_bytes(_NONCE_BYTES)
