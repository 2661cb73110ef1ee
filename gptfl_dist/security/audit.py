"""The audit log's format, and how it is verified. Nothing here touches a file; `audit_log` does.

A line is one entry, a JSON object: `number` from 1, `time` (UTC), `event`, the event's own fields, `previous` and
`hash`. `hash` is the BLAKE3 of the entry without it, as JSON with sorted keys, no spaces and ASCII alone; `previous` is
the hash of the line before. So no entry can be changed, left out or moved without a trace in its own line or the next.
An entry has one spelling, and a line that spells it otherwise counts as changed: no byte of the file is free.

Whoever can write the file could write the whole chain anew. Therefore an entry `checkpoint` signs number and hash of
the entry before it (ECDSA P-256). The first entry holds the public key; whoever noted its fingerprint finds out a log
that was written anew with another key.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

BEGUN, CHECKPOINT, BROKEN = "log begun", "checkpoint", "log broken"
"""The first entry; a signature; what a writer found missing or altered, which stays a fault."""

_FIRST, _LAST = ("number", "time", "event"), ("previous", "hash")
_ENOUGH = 100  # faults: a file that is no log at all has one a line

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry of a chain; number 0 is that of an empty one."""

    number: int = 0
    hash: str = "0" * 64


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line, counted from 1 in the file."""

    line: int
    found: str
    expected: str


@dataclass
class Verification:
    """What a log came to. `entries` are those that can be read, by line; `signed` is the newest entry that a valid
    signature covers; `half_written` are the bytes of a last line whose writer was killed, which is no fault."""

    head: Head = Head()
    fingerprint: str = ""
    signed: int = 0
    half_written: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def chained(head: Head, time: str, event: str, fields: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The line that follows `head`, with its end, and the head that it makes."""
    entry = {"number": head.number + 1, "time": time, "event": event, **fields, "previous": head.hash}
    assert len(entry) == len(fields) + 4, "an event's field has the name of one of the chain's"
    entry["hash"] = hash_of(entry)
    return spelled(entry) + b"\n", Head(head.number + 1, entry["hash"])


def beginning(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """The fields of the first entry, which says who signs."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return {"key": pem.decode(), "fingerprint": fingerprint(key)}


def checkpoint(head: Head, key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The fields of the entry that signs everything up to `head`."""
    return {"signature": b64encode(key.sign(_signed(head), ec.ECDSA(hashes.SHA256()))).decode()}


def hash_of(entry: Mapping[str, Any]) -> str:
    """The hash that belongs in an entry."""
    return blake3(_json({name: value for name, value in entry.items() if name != "hash"}).encode()).hexdigest()


def spelled(entry: Mapping[str, Any]) -> bytes:
    """An entry as its line, without the end. Raises ValueError where it is none."""
    inner = sorted(entry.keys() - {*_FIRST, *_LAST})
    if len(entry) != len(inner) + 5:
        raise ValueError("an entry has number, time, event, previous and hash")
    names = (*_FIRST, *inner, *_LAST)
    return ("{" + ",".join(f"{_json(name)}:{_json(entry[name])}" for name in names) + "}").encode()


def parsed(line: bytes) -> Entry:
    """The entry in a line. Raises ValueError where it holds none, or spells it otherwise than `spelled`."""
    try:
        entry = json.loads(line.decode("ascii"))
        if not isinstance(entry, dict) or spelled(entry) != line:
            raise ValueError
        if type(entry["number"]) is not int or any(type(entry[name]) is not str for name in (*_FIRST[1:], *_LAST)):
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError("no entry as this log spells them") from None
    return entry


def half_written(rest: bytes, number: int) -> bool:
    """Whether this is what a kill leaves of the line of entry `number`: its beginning, and no whole entry."""
    begins = f'{{"number":{number},'.encode()
    if not rest.isascii() or not (rest.startswith(begins) or begins.startswith(rest)):
        return False
    try:
        json.JSONDecoder().raw_decode(rest.decode("ascii"))
    except (ValueError, RecursionError):
        return True
    return False


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key (DER, SubjectPublicKeyInfo), in hex."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key in a PEM text, public or private. Raises ValueError where it is none of this log's kind."""
    try:
        if b"PRIVATE KEY" in pem:
            private = serialization.load_pem_private_key(pem, password=None)
            key: object = private.public_key()
        else:
            key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ValueError("no key of ECDSA P-256 in PEM")
    return key


def verify(content: bytes, pinned: str = "") -> Verification:
    """Looks at every byte of a log. `pinned` is the fingerprint that its key must have; "" takes any key."""
    *lines, rest = content.split(b"\n")
    verifier = _Verifier(pinned)
    for line in lines:
        verifier.take(line)
        if len(verifier.result.faults) >= _ENOUGH:
            return verifier.result
    if rest:
        verifier.take_unfinished(rest)
    return verifier.result


class _Verifier:
    """Takes line after line. After a fault it goes on from what the line says of itself, so that one change is told
    once and not at every line that follows."""

    def __init__(self, pinned: str) -> None:
        self.result = Verification()
        self._pinned = pinned
        self._key: ec.EllipticCurvePublicKey | None = None
        self._line = 0
        self._previous: str | None = Head().hash  # None after a line that cannot be read

    def take(self, line: bytes) -> None:
        self._line += 1
        result = self.result
        try:
            entry = parsed(line)
        except ValueError as error:
            self._fault(_shown(line), f"entry {result.head.number + 1}: this is {error}")
            result.head, self._previous = Head(result.head.number + 1), None
            return
        result.entries[self._line] = entry
        if entry["number"] != result.head.number + 1:
            self._fault(
                f"entry {entry['number']}", f"entry {result.head.number + 1}: entries are missing here, or moved"
            )
        if self._previous is not None and entry["previous"] != self._previous:
            self._fault(f"previous {entry['previous']}", f"{self._previous}, the hash of the line before")
        if (known := hash_of(entry)) != entry["hash"]:
            self._fault(f"hash {entry['hash']}", f"{known}, the hash of this entry: it was changed")
        if self._line == 1 or (self._key is None and entry["event"] == BEGUN):
            self._begin(entry)
        elif entry["event"] == CHECKPOINT:
            self._check_signature(entry)
        elif entry["event"] == BROKEN:
            self._fault(str(entry.get("found")), str(entry.get("expected")))
        result.head, self._previous = Head(entry["number"], entry["hash"]), entry["hash"]

    def take_unfinished(self, rest: bytes) -> None:
        """A last line without its end: that of a killed writer, whole or in part, or else changed."""
        result, before = self.result, len(self.result.faults)
        if not half_written(rest, result.head.number + 1):
            self.take(rest)
        if len(result.faults) == before:
            result.half_written = len(rest)

    def _begin(self, entry: Entry) -> None:
        result = self.result
        try:
            if entry["event"] != BEGUN:
                raise ValueError(f"the event {entry['event']!r}")
            self._key = public_key(str(entry.get("key")).encode())
        except ValueError as error:
            self._fault(str(error), f"the event {BEGUN!r} with a public key")
            return
        result.fingerprint = fingerprint(self._key)
        if entry.get("fingerprint") != result.fingerprint:
            self._fault(f"fingerprint {entry.get('fingerprint')}", f"{result.fingerprint}, that of the key")
        if self._pinned not in ("", result.fingerprint):
            self._fault(f"the key {result.fingerprint}", f"the key {self._pinned}: the log was written with another")

    def _check_signature(self, entry: Entry) -> None:
        signs = Head(entry["number"] - 1, entry["previous"])
        try:
            if self._key is None:  # told of the first line
                return
            signature = b64decode(str(entry.get("signature")), validate=True)
            self._key.verify(signature, _signed(signs), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            self._fault("a signature by another key, or of something else", f"one of entry {signs.number} by this key")
        else:
            self.result.signed = entry["number"]

    def _fault(self, found: str, expected: str) -> None:
        self.result.faults.append(Fault(self._line, found, expected))


def _signed(head: Head) -> bytes:
    return f"audit.jsonl, entry {head.number}, {head.hash}".encode()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _shown(line: bytes) -> str:
    return ascii(line[:60].decode("ascii", errors="replace")) + ("..." if len(line) > 60 else "")
