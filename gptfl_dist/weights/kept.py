"""What a silo keeps of each of its updates until its next one, in files that are named by the update's nonce.

Which update is the last that counts is for the coordinator to say, who knows what was committed; each order names it.
So a silo that missed rounds, whose update was refused, or that was killed at any instant goes on from the right file.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from gptfl_dist.files import storage_error

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptFiles:
    """`before`: what was kept of the last update that counts, None where there is none; `after`: where this one's goes,
    None where no update comes of it."""

    before: Path | None = None
    after: Path | None = None


NOTHING_KEPT = KeptFiles()


class KeptFolder:
    """The files of one silo, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, nonce: str) -> Path:
        """Where what is kept of an update lies."""
        return self._folder / f"{nonce}.safetensors"

    def keep_only(self, nonce: str) -> None:
        """Deletes the files of all other updates. Raises StorageError."""
        try:
            for path in self._folder.glob("*.safetensors"):
                if path != self.path(nonce):
                    path.unlink()
            for part in self._folder.glob(".*.part"):
                part.unlink()  # of a process that was killed while it wrote
        except OSError as error:
            raise storage_error(error, self._folder) from None

    def of(self, follows: str, nonce: str | None) -> KeptFiles:
        """The files of an order: `follows` names the last update that counts ("": none), `nonce` the one to come."""
        before = self.path(follows) if follows else None
        if before is not None and not before.exists():
            _log.warning("%s is lost, and with it what was kept of the last update: starting from nothing", before)
            before = None
        if nonce is None:
            return KeptFiles(before)
        self.keep_only(follows)
        return KeptFiles(before, self.path(nonce))
