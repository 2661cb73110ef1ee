"""What an operator can ask of a run from another process: to pause, to go on, to end for good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptfl_dist.errors import ConfigError
from gptfl_dist.ledger import requests
from gptfl_dist.ledger.lock import at_work
from gptfl_dist.ledger.reader import LedgerReader, read
from gptfl_dist.run.folder import run_folder_of

_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Asked:
    """`at_work`: whether a coordinator is there to follow at once. `told` says to the operator what happens now."""

    run_folder: Path
    at_work: bool
    told: str


def ask(path: Path, what: Literal["pause", "resume", "abort"], reason: str = "", *, file: str = "") -> Asked:
    """Asks it of the run whose federation file, or run folder, is at `path`; `file` is what who asks calls it.

    Raises ConfigError where there is no run, or one that has ended for good; StorageError where it cannot be noted.
    """
    folder = run_folder_of(path)
    before = read(folder, _before)
    if before is None:
        raise ConfigError(f"{folder}: no run was started here", hint="name the federation file of a run, or its folder")
    if before.finished:
        raise ConfigError(f"{folder}: this run is finished", hint="there is nothing to pause or to abort any more")
    if before.abort is not None and what != "abort":
        raise ConfigError(
            f"{folder}: this run was aborted", hint="the command that started it makes it anew, with --fresh"
        )
    working = at_work(folder) is not None
    if what == "pause":
        requests.ask_to_pause(folder)
        told = (
            "it finishes the round in progress and begins no other" if working else "it pauses once it is started again"
        )
        return Asked(folder, working, f"{_who(working)}: {told}; gptfl resume {file or path} lets it go on")
    if what == "resume":
        requests.ask_to_resume(folder)
        if not before.paused:
            return Asked(folder, working, f"{folder} was not paused")
        told = "it goes on" if working else "it goes on once it is started again, with the command that started it"
        return Asked(folder, working, f"{_who(working)}: {told}")
    # One line, for it is shown to the silos' operators as well.
    requests.ask_to_abort(folder, "".join(c for c in " ".join(reason.split()) if c.isprintable())[:_LONGEST_REASON])
    if before.abort is not None:
        told = f"the run was aborted before, at {before.abort.at}"
    elif working:
        told = "it recalls its orders, says goodbye to the silos and ends"
    else:
        told = "the run is aborted, and would end at once if it were started again; silos that dial are not told"
    told += f"; what it came to stays in {folder}: gptfl export takes models from there"
    return Asked(folder, working, f"{_who(working)}: {told}")


@dataclass(frozen=True, slots=True)
class _Before:
    finished: bool
    paused: bool
    abort: requests.Abort | None


def _before(ledger: LedgerReader) -> _Before:
    paused = requests.paused_since(ledger) is not None
    return _Before(ledger.fact("finished") is not None, paused, requests.abort_asked(ledger))


def _who(working: bool) -> str:
    return "the coordinator is at work" if working else "no coordinator is at work"
