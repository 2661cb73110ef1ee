"""Error feedback on disk: what the encoding of an update lost, kept until the next update takes it along.

A file for each update, named by its nonce, says what was lost up to it. Which one counts: see `weights.kept`. So a
refused update, or either side killed at any instant, leads to the same sums as if nothing had happened. Formula and
sources: see `weights.codec`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from gptfl_dist.errors import ModelError
from gptfl_dist.files import replacing
from gptfl_dist.weights.codec import Codec
from gptfl_dist.weights.file import WeightsFile, header_of, overwrite_weights
from gptfl_dist.weights.kept import KeptFolder
from gptfl_dist.weights.layout import Layout
from gptfl_dist.weights.sealed import writer

_log = logging.getLogger(__name__)


class Residuals:
    """The residuals of one silo, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._kept = KeptFolder(folder)

    def encode(self, codec: Codec, update: WeightsFile, encoded: Path, *, nonce: str, follows: str) -> str:
        """Encodes an update into the weights file `encoded`; returns the BLAKE3 of its flat buffer.

        `nonce` names the update, `follows` the one whose residual it takes along ("": none); all others are deleted.
        Raises StorageError where the disk refuses.
        """
        self._kept.keep_only(follows)
        shape = codec.lost_layout(update.layout)
        with ExitStack() as stack:
            before = self._opened(follows, shape)
            if before is not None:
                stack.enter_context(before)
            after = stack.enter_context(replacing(self._kept.path(nonce)))
            header = memoryview(header_of(shape))
            out = writer(len(header) + shape.nbytes)
            out.write(after, 0, header)

            def blocks() -> Iterator[bytes]:
                place = len(header)
                for block, lost in codec.encode_with(update.layout, update, before):
                    out.write(after, place, memoryview(lost).cast("B"))
                    place += len(lost)
                    yield block
                out.finish(after)

            return overwrite_weights(encoded, codec.layout(update.layout), blocks())

    def _opened(self, nonce: str, shape: Layout) -> WeightsFile | None:
        """The residual of an update; None, for nothing, where it is lost."""
        if not nonce:
            return None
        try:
            file = WeightsFile(self._kept.path(nonce))
        except ModelError as error:
            _log.warning("what the last update lost in its encoding is not here and is left out: %s", error)
            return None
        if file.layout == shape:
            return file
        file.close()
        _log.warning("%s is of another model or codec and is left out", file.path)
        return None
