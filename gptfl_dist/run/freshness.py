"""A silo's memory of how far each run has come, on its own disk, asked before every order.

What counts as going back is decided in `federation.freshness`; here it is kept, so that a silo that was restarted, or
whose coordinator was, knows it too. It is on the disk before the order is carried out. A new epoch is taken only with
the statement of the federation's authority (`security.epoch`), and nothing of an older one ever after.

A silo that loses its work folder believes the next coordinator that its authority vouches for, as at the first time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptfl_dist.errors import IdentityError, StorageError
from gptfl_dist.exchange.base import Welcome
from gptfl_dist.federation.freshness import Memory, Reached, rollback
from gptfl_dist.federation.orders import Order
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.security.epoch import terms_of

SEEN = "seen.json"
"""The file in a silo's work folder."""

_log = logging.getLogger(__name__)


class Freshness:
    """Keeps the memory of one silo."""

    def __init__(self, folder: Path, federation: str, roots: Callable[[], bytes]) -> None:
        """`folder` is the silo's work folder, `federation` that of its certificate, `roots` gives what it trusts now.

        Raises StorageError where the memory is damaged.
        """
        self._path = folder / SEEN
        self._federation = federation
        self._roots = roots
        self._runs = _read(self._path)

    def check(self, welcome: Welcome, order: Order) -> None:
        """Raises PolicyError where the order goes back; else remembers it. Blocking."""
        known = self._runs.get(welcome.run)
        if order.epoch != welcome.epoch.number:
            raise rollback(f"an order of epoch {order.epoch} came in epoch {welcome.epoch.number}")
        memory = self._now(known, welcome).after(order)
        if memory != known:
            runs = {**self._runs, welcome.run: memory}
            write_file(self._path, json.dumps({run: asdict(one) for run, one in runs.items()}))
            self._runs = runs

    def _now(self, known: Memory | None, welcome: Welcome) -> Memory:
        """The memory of the run in the epoch that the coordinator is in. Raises PolicyError."""
        epoch = welcome.epoch
        if known is None:
            return Memory(epoch.number, epoch.statement, epoch.kept)
        if epoch.number < known.epoch:
            raise rollback(f"the coordinator is in epoch {epoch.number}, and epoch {known.epoch} was seen")
        if epoch.number == known.epoch:
            if epoch.statement != known.statement:
                raise rollback(f"this epoch {epoch.number} was begun otherwise than the one that was seen")
            return known
        kept = known.kept or epoch.kept
        try:
            terms = terms_of(epoch, federation=self._federation, run=welcome.run, roots=self._roots(), kept=kept)
        except IdentityError as error:
            raise rollback(f"epoch {epoch.number} does not count: {error.message}") from None
        back = {arm: round_ for arm, round_ in terms.rounds.items() if round_ < known.arms.get(arm, Reached(0)).round}
        _log.warning(
            "the coordinator's operator began epoch %d at %s, reason %s; rounds that are asked for again: %s",
            *(epoch.number, ascii(terms.at), ascii(terms.reason)),
            ", ".join(f"from {round_} of {arm}" for arm, round_ in sorted(back.items())) or "none",
        )
        reached = {arm: Reached(round_) for arm, round_ in terms.rounds.items()}
        return Memory(epoch.number, epoch.statement, kept, reached)


def _read(path: Path) -> dict[str, Memory]:
    try:
        runs: dict[str, Any] = json.loads(path.read_bytes())
        return {run: _memory(**fields) for run, fields in runs.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise storage_error(error, path) from None
    except (ValueError, TypeError, AttributeError):
        raise StorageError(
            f"{path} is damaged: it holds how far each run has come",
            hint="delete it if you trust the coordinator as it is now; this silo then remembers anew",
        ) from None


def _memory(arms: dict[str, dict[str, Any]], **fields: Any) -> Memory:
    return Memory(**fields, arms={arm: Reached(**reached) for arm, reached in arms.items()})
