"""Where updates arrive, whatever the wire: spooled at their offset, checked, then committed in one step or refused.

Each silo has one spool file, preallocated and used again every round. What a silo announces is checked before any
byte is taken (the order it answers, the weights it started from, layout, size, samples, metrics); what it sent is
checked before it counts (digest, finite values, norm). Only then is `commit` called, which writes the ledger.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from gptfl_dist.aggregation.norm import RunningNorm, norm
from gptfl_dist.errors import ProtocolError, StorageError
from gptfl_dist.exchange.base import UpdateHeader
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.files import storage_error, sync_folder
from gptfl_dist.ledger.records import Signed
from gptfl_dist.weights import Codec, FlatReader, Layout, digest_of
from gptfl_dist.weights.sealed import SealedFile, Writer, in_use, sealed_in, stored, writer

_METRIC = re.compile(r"[a-z][a-z0-9_]{0,62}")
_MAX_METRICS = 64
_LARGEST_METRIC = 1e30  # sums of such numbers are still finite


class Refused(Exception):
    """The update is not taken; the text says why, for the silo's operator."""


class Superseded(Exception):
    """A newer connection of the same silo writes to this spool now."""


class Busy(Exception):
    """This update arrived whole and is being checked; asked again in a moment, the answer will be there."""


class Overtaken(Exception):
    """What is followed will not count as it was read: the upload began anew, or it is followed no more."""


class Spool:
    """A file that takes one encoded update in order. `read_into` makes it a flat buffer for the aggregation.

    What the update is checked by is taken as it arrives, for to read all of it again costs more: its digest, and where
    the codec leaves updates as they are, its norm. `arrived` tells threads of every change.
    """

    def __init__(self, path: Path, layout: Layout, codec: Codec) -> None:
        self.path = path
        self.size = codec.layout(layout).nbytes
        self._layout = layout
        self._codec = codec
        self._writer = 0
        self.arrived = threading.Condition()
        self.uploads = 0  # how often the first byte was the next
        self.restart()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if self.size:
                    os.posix_fallocate(self._fd, 0, stored(self.size))
                os.ftruncate(self._fd, stored(self.size))
            except OSError:
                os.close(self._fd)
                raise
        except OSError as error:
            raise storage_error(error, path) from None

    def claim(self) -> int:
        """A ticket for a new writer; older tickets are void from now on."""
        self._writer += 1
        return self._writer

    def restart(self) -> None:
        """The next byte is the first again."""
        with self.arrived:
            self.received = 0
            self.uploads += 1
            self.arrived.notify_all()
        self._out: Writer | None = None
        self._sealed: SealedFile | None = None
        self._hasher = blake3()
        self._norm = RunningNorm(self._layout) if self._codec.name == "none" else None

    def write(self, ticket: int, offset: int, data: memoryview) -> None:
        """Appends bytes. Raises Superseded for an old ticket, Refused for a gap or too many bytes."""
        if ticket != self._writer:
            raise Superseded
        if offset != self.received or offset + len(data) > self.size:
            raise Refused(f"bytes {offset} to {offset + len(data)} sent, expected from {self.received} of {self.size}")
        try:
            if self._out is None:
                self._out = writer(self.size)
            self._out.write(self._fd, offset, data)
            if offset + len(data) == self.size:
                self._out.finish(self._fd)
                self._sealed = None  # whoever followed an upload before this one may have opened that one's
        except OSError as error:
            raise storage_error(error, self.path) from None
        with self.arrived:
            self.received += len(data)
            self.arrived.notify_all()
        self._hasher.update(data)
        if self._norm is not None:
            self._norm.add(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`. Raises StorageError if the file was cut short under our hands."""
        if in_use():
            if self._sealed is None:
                self._sealed = sealed_in(self._fd, self.path)
            if self._sealed is None:
                raise StorageError(f"{self.path}: is not encrypted, as all updates are now")
            self._sealed.read_into(offset, buffer)
            return
        count = os.preadv(self._fd, [buffer], offset)
        if count != len(buffer):
            raise StorageError(f"{self.path}: ends at byte {offset + count}, expected {self.size} bytes")

    def received_digest(self) -> str:
        """BLAKE3 of the bytes that were received, in hex."""
        return self._hasher.hexdigest()

    def norm(self) -> float:
        """The norm of the update that was received, NaN where a number is not finite. Raises ProtocolError."""
        return norm(self._layout, self.decoded()) if self._norm is None else self._norm.value

    def decoded(self) -> FlatReader:
        """A reader of the update."""
        return self.decode(self)

    def decode(self, encoded: FlatReader) -> FlatReader:
        """A reader of the update that `encoded` reads as it was sent."""
        return self._codec.decoded(self._layout, encoded)

    def digest(self) -> str:
        """BLAKE3 of the whole file, in hex."""
        return digest_of(self, self.size)

    def sync(self) -> None:
        """What was written survives a power cut from now on. Raises StorageError."""
        try:
            os.fsync(self._fd)
            sync_folder(self.path.parent)
            sync_folder(self.path.parent.parent)
        except OSError as error:
            raise storage_error(error, self.path) from None

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1  # whoever reads on, or writes, meets an error and not another file


class Followed:
    """Reads an update that still arrives, from a thread: what is not there yet is waited for."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._upload = spool.uploads
        self._stopped = False

    @property
    def intact(self) -> bool:
        """Whether all that was read is of the upload that the spool holds."""
        return self._spool.uploads == self._upload

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As a spool does. Raises Overtaken."""
        end = self._spool.size if in_use() else offset + len(buffer)  # encrypted, its last blocks are not on the disk
        with self._spool.arrived:
            self._spool.arrived.wait_for(lambda: self._stopped or not self.intact or self._spool.received >= end)
        if self._stopped or not self.intact:
            raise Overtaken
        self._spool.read_into(offset, buffer)

    def decoded(self) -> FlatReader:
        """A reader of the update."""
        return self._spool.decode(self)

    def stop(self) -> None:
        """Whoever waits, or reads on, meets Overtaken."""
        with self._spool.arrived:
            self._stopped = True
            self._spool.arrived.notify_all()


@dataclass
class _Expected:
    """An order that was given to a silo, and how far its answer has come."""

    order: Order
    header: UpdateHeader | None = None
    signed: Signed | None = None
    checking: bool = False
    committed: bool = False


@dataclass
class Inbox:
    """`max_samples` holds the registered maximum of each silo; `commit(silo, order, report, digest)` makes it count.
    `durable`: a committed update is there after a power cut too.

    `announced` is called when an update is about to arrive.

    `digest` is "" for an answer without an update. Updates arrive encoded by `codec`; they are checked and read
    decoded. `max_norm` bounds the Euclidean norm of an update; None does not. `finish` may run in a thread beside all
    other calls: what it checks cannot be overwritten meanwhile, and an order that is withdrawn meanwhile is not
    committed.
    """

    folder: Path
    layout: Layout
    max_samples: Mapping[str, int]
    commit: Callable[[str, Order, Report, str], None]
    max_norm: float | None = None
    durable: bool = False
    codec: Codec = field(default=Codec("none"))
    announced: Callable[[], None] = lambda: None
    _expected: dict[str, _Expected] = field(default_factory=dict)
    _spools: dict[str, Spool] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # around every change of what is expected

    def __post_init__(self) -> None:
        self._encoded = self.codec.layout(self.layout)

    def expect(self, silo: str, order: Order) -> None:
        """From now on this silo may answer this order, and no other."""
        with self._lock:
            self._expected[silo] = _Expected(order)

    def expect_committed(self, silo: str, order: Order, digest: str) -> bool:
        """Takes over a committed update of an interrupted run. False if its spool does not hold it any more."""
        spool = self._spool(silo)
        try:
            if spool.digest() != digest:
                return False
        except StorageError:  # one that does not decrypt is as good as none
            return False
        with self._lock:
            self._expected[silo] = _Expected(order, committed=True)
        return True

    def withdraw(self, silo: str) -> bool:
        """This silo's answer is no longer wanted. False where it is committed already, and counts."""
        with self._lock:
            expected = self._expected.get(silo)
            if expected is not None and expected.committed:
                return False
            self._expected.pop(silo, None)
            return True

    def committed(self, silo: str, nonce: str) -> bool:
        """Whether this silo's answer to this order is committed, told or not."""
        expected = self._expected.get(silo)
        return expected is not None and expected.order.nonce == nonce and expected.committed

    def awaits(self, silo: str, nonce: str) -> bool:
        """Whether this silo still owes the answer to this order."""
        return self.owed(silo) == nonce

    def owed(self, silo: str) -> str | None:
        """The nonce of the order that this silo owes the answer to, if any."""
        expected = self._expected.get(silo)
        return None if expected is None or expected.committed else expected.order.nonce

    def fail(self, silo: str, nonce: str) -> bool:
        """The order failed for good: withdraws it. False where the silo owes no answer to it, so nothing failed."""
        with self._lock:
            if not self.awaits(silo, nonce):
                return False
            del self._expected[silo]
            return True

    def announce(self, silo: str, header: UpdateHeader, signed: Signed | None = None) -> tuple[int, bool]:
        """Checks what a silo says it will send. Returns (first byte wanted, already committed).

        `signed` shows that it was the silo which says so, where the wire has that.

        Writers from before it hold void tickets afterwards. Raises Refused, or Busy while a finished upload of this
        order is checked.
        """
        with self._lock:
            expected = self._check_report(silo, header.report, "train")
            if header.epoch != expected.order.epoch:
                raise Refused(f"answers an order of epoch {header.epoch}, and now it is epoch {expected.order.epoch}")
            if header.base != expected.order.base:
                raise Refused(f"trained from the weights {header.base[:12]}, expected {expected.order.base[:12]}")
            if header.layout != self._encoded.digest:
                raise Refused(
                    "the layout of the update is not the federation's: the model is defined or encoded differently"
                )
            if header.size != self._encoded.nbytes:
                raise Refused(f"announces {header.size} bytes, the layout has {self._encoded.nbytes}")
            if expected.committed:
                return self._encoded.nbytes, True
            if expected.checking:
                raise Busy
            spool = self._spool(silo)
            spool.claim()
            if expected.header != header:
                expected.header = header
                spool.restart()
            expected.signed = signed  # a signature is another each time; any of them will do
        self.announced()
        return spool.received, False

    def signed(self, silo: str) -> Signed | None:
        """What shows that the silo delivers what is being committed, where the wire has that."""
        return self._expected[silo].signed

    def spool(self, silo: str, nonce: str) -> Spool:
        """The spool of an announced update. Raises Refused where none was announced under this nonce."""
        expected = self._expected.get(silo)
        if expected is None or expected.header is None or expected.order.nonce != nonce or expected.committed:
            raise Refused("no such update was announced")
        return self._spools[silo]

    def finish(self, silo: str, nonce: str) -> None:
        """Checks and commits a finished upload. Blocking: reads the whole spool.

        Raises Refused, or Busy where another call checks it already.
        """
        with self._lock:
            spool = self.spool(silo, nonce)
            expected = self._expected[silo]
            header = expected.header
            assert header is not None
            if expected.checking:
                raise Busy
            if spool.received != spool.size:
                raise Refused(f"ended after {spool.received} of {spool.size} bytes")
            expected.checking = True
        try:
            wrong = self._what_is_wrong(spool, header)
            if self.durable and not wrong:
                spool.sync()
            with self._lock:
                # The spool may be another order's by now: then nothing of it is touched.
                if self._expected.get(silo) is not expected:
                    raise Refused("the order was withdrawn")
                if wrong:
                    expected.header = None
                    raise Refused(wrong)
                self.commit(silo, expected.order, header.report, header.digest)
                expected.committed = True
        finally:
            expected.checking = False

    def accept(self, silo: str, report: Report) -> None:
        """Takes the answer to an evaluation. Raises Refused."""
        self._accept(silo, report, "evaluate")

    def accept_reduced(self, silo: str, report: Report) -> None:
        """Takes the answer to any order, where updates stay with their silos until they are summed. Raises Refused."""
        expected = self._expected.get(silo)
        self._accept(silo, report, "evaluate" if expected is None else expected.order.kind)

    def _accept(self, silo: str, report: Report, kind: str) -> None:
        with self._lock:
            expected = self._check_report(silo, report, kind)
            if not expected.committed:
                self.commit(silo, expected.order, report, "")
                expected.committed = True

    def arriving(self, silos: Iterable[str]) -> dict[str, tuple[Followed, int]] | None:
        """The updates of these silos with their samples, to be read while they arrive; None if one is yet to come."""
        found = {}
        for silo in silos:
            expected = self._expected.get(silo)
            if expected is None or expected.header is None:
                return None
            found[silo] = Followed(self._spools[silo]), expected.header.report.samples
        return found

    def updates(self, silos: tuple[str, ...]) -> dict[str, FlatReader]:
        """Readers of committed updates, decoded."""
        assert all(self._expected[silo].committed for silo in silos)
        return {silo: self._spools[silo].decoded() for silo in silos}

    def close(self) -> None:
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()

    def _spool(self, silo: str) -> Spool:
        if silo not in self._spools:
            self._spools[silo] = Spool(self.folder / f"{silo}.spool", self.layout, self.codec)
        return self._spools[silo]

    def _what_is_wrong(self, spool: Spool, header: UpdateHeader) -> str:
        """Why what arrived cannot count, or ""."""
        if spool.received_digest() != header.digest:
            return "the bytes that arrived do not have the announced digest"
        try:
            length = spool.norm()
        except ProtocolError as error:
            return error.message
        if math.isnan(length):
            return "the update holds NaN or infinite values"
        if self.max_norm is not None and length > self.max_norm:
            return f"the update's norm is {length:.4g}, federation.max_update_norm allows {self.max_norm:g}"
        return ""

    def _check_report(self, silo: str, report: Report, kind: str) -> _Expected:
        expected = self._expected.get(silo)
        if expected is None or expected.order.nonce != report.nonce:
            raise Refused("answers no order that is open for this silo")
        if expected.order.kind != kind:
            raise Refused(f"the order was to {expected.order.kind}")
        smallest = 1 if kind == "train" else 0
        if not smallest <= report.samples <= self.max_samples[silo]:
            raise Refused(
                f"claims {report.samples} samples, expected {smallest} to {self.max_samples[silo]} "
                "(max_samples of this silo in the federation file)"
            )
        if len(report.metrics) > _MAX_METRICS:
            raise Refused(f"sends {len(report.metrics)} metrics, expected at most {_MAX_METRICS}")
        for name, value in report.metrics.items():
            if not _METRIC.fullmatch(name) or not math.isfinite(value) or abs(value) > _LARGEST_METRIC:
                raise Refused(f"the metric {name[:64]!r} = {value} is no plain name with a number of sensible size")
            if name == "accuracy" and not 0 <= value <= 1:
                raise Refused(f"claims an accuracy of {value}, expected 0 to 1")
        return expected
