"""What was on the wire, and whether a private key was in it, in any spelling.

`python secrets_on_the_wire.py FILE` writes every frame of every interface of its network namespace to a file until it
is interrupted, and then says how many there were and how many it missed.
"""

from __future__ import annotations

import signal
import socket
import struct
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

_ALL, _SOL_PACKET, _STATISTICS, _RCVBUFFORCE = 3, 263, 6, 33  # of Linux's headers, which Python does not name
_LARGEST = 1 << 18  # bytes of a frame
_LINK, _IPV4, _TCP = 14, 0x0800, 6


def scalar(pem: bytes) -> bytes:
    """The number that is all the secret of a private key."""
    key = serialization.load_pem_private_key(pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value.to_bytes(32, "big")


def spellings(secret: bytes) -> Iterator[bytes]:
    """What shows that a secret was told: each half of it raw, in hex, and in base64 wherever it begins there.

    Every container has one of these in it: DER, PEM (without its line ends, as `found` reads it), JSON.
    """
    for half in (secret[: len(secret) // 2], secret[len(secret) // 2 :]):
        yield half
        yield half.hex().encode()
        yield half.hex().upper().encode()
        for before in range(3):
            whole = (8 * before + 5) // 6  # characters that what stands before it has a part in
            sure = 8 * (before + len(half)) // 6
            for encode in (b64encode, urlsafe_b64encode):
                yield encode(b"\0" * before + half + b"\0\0")[whole:sure]


def found(secrets: list[bytes], where: list[bytes]) -> list[bytes]:
    """Which secrets are told in any of these, line ends left out or not."""
    places = [*where, *(each.replace(b"\\n", b"").translate(None, b"\r\n") for each in where)]
    return [secret for secret in secrets if any(word in place for word in spellings(secret) for place in places)]


def frames(capture: Path) -> Iterator[bytes]:
    content, place = capture.read_bytes(), 0
    while place < len(content):
        (size,) = struct.unpack_from("!I", content, place)
        yield content[place + 4 : place + 4 + size]
        place += 4 + size


def told(capture: Path) -> list[bytes]:
    """All that a capture holds: each frame, and each TCP stream put together again, one way."""
    streams: dict[bytes, dict[int, bytes]] = {}
    everything = list(frames(capture))
    for frame in everything:
        if len(frame) < _LINK + 40 or struct.unpack_from("!H", frame, 12)[0] != _IPV4 or frame[_LINK + 9] != _TCP:
            continue
        tcp = _LINK + 4 * (frame[_LINK] & 15)
        end = _LINK + struct.unpack_from("!H", frame, _LINK + 2)[0]
        (sequence,) = struct.unpack_from("!I", frame, tcp + 4)
        data = frame[tcp + 4 * (frame[tcp + 12] >> 4) : end]
        way = frame[_LINK + 12 : _LINK + 20] + frame[tcp : tcp + 4]  # both addresses and ports
        pieces = streams.setdefault(way, {})
        if len(data) > len(pieces.get(sequence, b"")):
            pieces[sequence] = data
    return [*everything, *map(_whole, streams.values())]


def _whole(pieces: dict[int, bytes]) -> bytes:
    stream, end = bytearray(), None
    for sequence in sorted(pieces):
        data = pieces[sequence]
        if end is not None and sequence < end:  # some of it was sent before
            data = data[end - sequence :]
        stream += data
        end = sequence + len(pieces[sequence]) if end is None else max(end, sequence + len(pieces[sequence]))
    return bytes(stream)


def _capture(path: Path) -> None:
    stopping = []
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)) as line, path.open("wb") as out:
        line.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 256 << 20)
        line.settimeout(0.2)
        print("capturing", flush=True)
        count = 0
        while True:
            try:
                frame = line.recv(_LARGEST)
            except TimeoutError:
                if stopping:
                    break
                continue
            out.write(struct.pack("!I", len(frame)) + frame)
            count += 1
        _, missed = struct.unpack("II", line.getsockopt(_SOL_PACKET, _STATISTICS, 8))
        print(f"{count} frames, {missed} missed", flush=True)


if __name__ == "__main__":
    _capture(Path(sys.argv[1]))
