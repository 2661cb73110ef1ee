"""How a run stands, found out from outside: its ledger, its lock, and what the coordinator at work wrote last.

Nothing here disturbs a coordinator: the ledger is read as of one instant, the lock is only looked at. A run that has
ended, was killed or never began is told of as well. Neither torch nor grpc is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from gptfl_dist.config.federation import Arm
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError
from gptfl_dist.federation.orders import RECALLED, REFUSED
from gptfl_dist.ledger.lock import at_work
from gptfl_dist.ledger.reader import LedgerReader, read
from gptfl_dist.ledger.records import ArmRecord, RoundRecord
from gptfl_dist.ledger.requests import Abort, abort_asked, paused_since
from gptfl_dist.observe.live import Live, LiveSilo, now, read_live
from gptfl_dist.observe.status import ArmStatus, RoundStatus, SiloStatus, State, Status, Work, ago
from gptfl_dist.run.arm import best_round, score_of, stopped_name
from gptfl_dist.run.folder import ENDED, run_folder_of

_TRIES = 5


@dataclass(frozen=True, slots=True)
class _Found:
    """What the ledger holds. `ended` is None while a coordinator is at work, or where it was killed."""

    request: dict[str, Any]
    finished: str | None
    ended: dict[str, str] | None
    pause: str | None
    abort: Abort | None
    seconds: dict[str, float]
    arms: list[ArmRecord]
    stopped: dict[str, str | None]


def status_of(path: Path, *, file: str = "") -> Status:
    """How the run stands whose federation file, or run folder, is at `path`; `file` is what who asks calls it.

    Raises ConfigError, StorageError.
    """
    folder = run_folder_of(path)
    for _ in range(_TRIES):
        life = at_work(folder)
        found, live = read(folder, _find), read_live(folder)
        if at_work(folder) == life:
            break
    if found is None:
        if path.is_dir():
            raise ConfigError(f"{path}: no run was started here", hint="name a run folder, or a federation file")
        settings = load_federation(path)
        start = "run" if settings.enrolment is None else "coordinator"
        next_ = [f"gptfl check {path}, then gptfl {start} {path}"]
        silos = [SiloStatus(entry.name, None, "idle", "", None, 0, None) for entry in settings.silos]
        return Status(settings.name, str(folder), "not started", now(), silos=silos, next=next_)
    return _Telling(file or str(path), path.is_dir(), folder, found, live, life).status()


def _find(ledger: LedgerReader) -> _Found:
    arms = [record for name in ledger.arms() if (record := ledger.arm(name)) is not None]
    ended = ledger.fact(ENDED)
    return _Found(
        request=json.loads(ledger.fact("request") or "{}"),
        finished=ledger.fact("finished"),
        ended=json.loads(ended) if ended else None,
        pause=paused_since(ledger),
        abort=abort_asked(ledger),
        seconds=ledger.seconds(),
        arms=arms,
        stopped={record.arm: ledger.fact(stopped_name(record.arm)) for record in arms},
    )


class _Telling:
    """One status in the making."""

    def __init__(
        self, path: str, is_folder: bool, folder: Path, found: _Found, live: Live | None, life: str | None
    ) -> None:
        self._path = path
        self._is_folder = is_folder
        self._folder = folder
        self._found = found
        self._live = live
        self._working = life is not None
        self._at_work = live if live is not None and live.life == life else None  # else an earlier coordinator wrote it
        self._at = now()
        self._arm = found.arms[-1] if found.arms else None
        last = self._arm.rounds[-1] if self._arm is not None and self._arm.rounds else None
        over = self._arm is None or self._arm.finished or last is None or last.weights is not None
        self._open: RoundRecord | None = None if over else last

    def status(self) -> Status:
        state, since, message = self._state()
        silos = [self._silo(str(entry["name"])) for entry in self._found.request["silos"]]
        round_ = self._round()
        return Status(
            run=str(self._found.request["name"]),
            folder=str(self._folder),
            state=state,
            at=self._at,
            since=since,
            pid=None if self._at_work is None else self._at_work.pid,
            stage=None if self._at_work is None else self._at_work.stage,
            message=message,
            round=round_,
            silos=silos,
            arms=[self._arm_status(record) for record in self._found.arms],
            seconds=self._found.seconds,
            next=self._next(state, round_, silos),
        )

    def _state(self) -> tuple[State, str | None, str]:
        found, live = self._found, self._at_work
        waits = "" if found.pause is None else "a pause is asked for, and holds when the run goes on"
        if found.finished is not None:
            return "finished", found.finished, ""
        if found.abort is not None:
            state: State = "aborting" if self._working else "aborted"
            return state, found.abort.at, found.abort.reason
        if self._working and found.pause is not None:
            if live is not None and live.state == "paused":
                return "paused", found.pause, "no round is begun; the silos stay connected"
            return "pausing", found.pause, "what is in progress is finished, then no round is begun"
        if self._working:
            return "running", None if live is None else live.started, ""
        if found.ended is None:
            gone = (
                "the coordinator, or under mpiexec a rank of its job, was killed, or its machine went down: it noted "
                "no end"
            )
            return "killed", None, "; ".join(filter(None, [gone, waits]))
        stopped = found.ended["error"] in ("", "Interrupted")
        told = "; ".join(filter(None, [found.ended["message"], waits]))
        return "stopped" if stopped else "failed", found.ended["at"], told

    def _round(self) -> RoundStatus | None:
        if self._arm is None or self._found.finished is not None:
            return None
        planned, record, live = self._planned(self._arm.arm), self._open, self._at_work
        newest = self._arm.rounds[-1].round if self._arm.rounds else 0
        if live is not None and live.arm == self._arm.arm and live.round is not None and live.round >= newest:
            begun = live.state in ("train", "evaluate") and live.since is not None
            seconds = max(0.0, -_until(live.since, self._at)) if begun and live.since is not None else None
            left = None if live.deadline is None else _until(live.deadline, self._at)
            return RoundStatus(self._arm.arm, live.round, planned, str(live.state), seconds, left)
        if record is not None:
            return RoundStatus(self._arm.arm, record.round, planned, "broken off", record.seconds, None)
        return RoundStatus(self._arm.arm, newest, planned, "done", None, None) if newest and not self._working else None

    def _silo(self, name: str) -> SiloStatus:
        known = LiveSilo() if self._live is None else self._live.silos.get(name, LiveSilo())
        work, reason = self._work(name)
        progress = None
        if work == "awaited" and self._at_work is not None and known.done is not None and known.total:
            work, progress = "training", known.done / known.total
        elif work == "awaited" and self._at_work is not None:
            reason = known.note
        connected = known.connected if self._at_work is not None else None
        return SiloStatus(
            name=name,
            connected=connected,
            work=work,
            reason=reason,
            progress=progress,
            behind=self._behind(name),
            seen=known.seen,
            refused=self._refused(name),
            revoked=self._at_work is not None and known.revoked,
        )

    def _work(self, name: str) -> tuple[Work, str]:
        given = [] if self._open is None else list(self._open.orders)
        if self._arm is not None and not self._arm.finished:
            given += [order for _, order in self._arm.pending]  # an order may outlive its round
        order = next((order for order in given if order.silo == name), None)
        if order is None:
            return ("idle" if self._open is None else "not called on"), ""
        if order.failure is None:
            return ("awaited" if order.samples is None else "delivered"), ""
        if order.failure.startswith(REFUSED):
            return "refused", order.failure.removeprefix(REFUSED)
        if order.failure.startswith(RECALLED):
            return "recalled", order.failure.removeprefix(RECALLED)
        return "failed", order.failure

    def _behind(self, name: str) -> int:
        """Closed rounds of the arm in progress that went without the silo's update since its last one."""
        behind = 0
        for record in reversed(() if self._arm is None else self._arm.rounds):
            if record.weights is None:
                continue
            if any(update.silo == name for update in record.updates):
                break
            behind += name in record.cohort
        return behind

    def _refused(self, name: str) -> int:
        orders = (order for arm in self._found.arms for record in arm.rounds for order in record.orders)
        return sum(order.silo == name and (order.failure or "").startswith(REFUSED) for order in orders)

    def _planned(self, arm: str) -> int:
        if arm in get_args(Arm):
            return int(self._found.request["federation"]["rounds"])
        return int(self._found.request["tuning"]["rounds"]) if arm.startswith("tuning/") else 0

    def _arm_status(self, record: ArmRecord) -> ArmStatus:
        best = best_round(record)
        score = score_of(record, best)
        return ArmStatus(
            arm=record.arm,
            done=record.finished_rounds,
            rounds=self._planned(record.arm),
            finished=record.finished,
            stopped_by=self._found.stopped[record.arm],
            validation_accuracy=None if score is None else score[0],
            best_round=None if score is None else best,
            seconds=sum(r.seconds or 0.0 for r in record.rounds),
            bytes_down=sum(r.bytes_down or 0 for r in record.rounds),
            bytes_up=sum(r.bytes_up or 0 for r in record.rounds),
        )

    def _next(self, state: State, round_: RoundStatus | None, silos: list[SiloStatus]) -> list[str]:
        path, folder = self._path, self._folder
        file = "FEDERATION_FILE" if self._is_folder else path
        if state == "finished":
            return [f"read {folder / 'report.html'}", f"gptfl export {file} --out MODEL.safetensors"]
        if state == "aborted":
            return [
                f"gptfl export {file} --out MODEL.safetensors takes a model from what it came to",
                "the command that started it makes the run anew, with --fresh",
            ]
        steps = []
        if state == "paused":
            steps.append(f"gptfl resume {path} lets it go on")
        if state in ("stopped", "failed", "killed"):
            hint = "" if self._found.ended is None else self._found.ended["hint"]
            steps += [hint] if hint else []
            where = "" if round_ is None or self._open is None else f", in round {round_.round} of {round_.arm}"
            first = "mend what stopped it, then " if state == "failed" else ""
            steps.append(f"{first}start it again with the command that started it: it goes on{where}")
        if state == "aborting":
            steps.append("wait: it ends within seconds")
        for silo in silos:
            steps += self._step(silo, round_)
        return steps

    def _step(self, silo: SiloStatus, round_: RoundStatus | None) -> list[str]:
        waited_for = round_ is not None and (round_.state == "gather" or silo.work in ("awaited", "training"))
        if silo.revoked:
            return [f"{silo.name} was revoked: gptfl invite lets it in again, with a new key"]
        if silo.connected is False and waited_for:
            since = "never connected" if silo.seen is None else f"last heard {ago(silo.seen, self._at)} ago"
            return [f"{silo.name} is missing ({since}): does gptfl silo run there? Its agent.jsonl says what it meets"]
        if silo.work == "refused":
            return [
                f"{silo.name} was refused ({silo.reason}): its operator mends that; it is called on again next round"
            ]
        if silo.work == "failed":
            return [
                f"{silo.name} failed ({silo.reason}): its agent.jsonl and trainer.log, in its work folder, say more"
            ]
        return []


def _until(time: str, at: str) -> float:
    """Seconds from `at` to `time`, both in UTC, ISO 8601."""
    return (datetime.fromisoformat(time).astimezone(UTC) - datetime.fromisoformat(at).astimezone(UTC)).total_seconds()
