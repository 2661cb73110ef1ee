"""One federation of real processes, which is struck while it runs, and what must be true of it in the end.

`gptfl coordinator`, and three `gptfl silo`, each behind a TCP proxy of its own, with trainers that need no torch
(`null_trainer.py`) and tell where they stand. A blow waits for its moment, strikes, and the side that it killed is
started again, as an operator would. Of a run is expected that it ends, that its weights are bit by bit those of the
undisturbed run, that no committed update is trained again, and that it leaves nothing half-written behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_plan import FULL_DISK, KILLS, ROUNDS, SILOS, STATES, Blow, unmount
from chaos_world import ARM, GPTFL, Ledger, World, free_port, write_federation

from gptfl_dist.run.audit import audit_of
from gptfl_dist.testing.proxy import TcpProxy
from gptfl_dist.weights import WeightsFile

LONGEST = 300.0  # seconds of a run
_WORDS = 16 << 10  # bytes that come down with a handshake and an order; more are of weights
_STARTING = 1.5  # seconds from the start of a coordinator until it takes silos, about
_TRAINING = 0.35  # seconds of the longest training


@dataclass
class Process:
    """A side: its process, started again by the driver whenever it was killed."""

    arguments: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None
    killed: bool = False
    blow: Blow | None = None  # that killed it last

    def kill(self, blow: Blow | None = None) -> bool:
        """False where it does not run now."""
        if self.process is None or self.process.returncode is not None:
            return False
        self.killed, self.blow = True, blow
        self.process.kill()
        return True


class Run:
    """One federation and what strikes it."""

    def __init__(self, world: World, folder: Path, blows: list[Blow], **settings: Any) -> None:
        """`settings` replace sections of the federation file."""
        self.world = world
        self._settings = settings
        self.folder = folder
        self.run_folder = folder / "run"
        self.blows = blows
        self._socket = f"gptfl-chaos-{uuid.uuid4().hex}"
        self.struck: list[tuple[str, str]] = []  # what, and the state that it met
        self.wrong: list[str] = []
        self.given_up = 0  # how often the coordinator ended with the error that says so, and was started again
        self.full = 0  # how often it ended with a full disk, and went on once there was room
        self.asked_again = 0  # how often for a committed update that was corrupted on disk
        self._at: dict[str, tuple[int, str]] = {}  # what each trainer said last: its round, and what of it
        self._pids: dict[str, int] = {}
        self._mark: dict[str, tuple[int, int]] = {}  # bytes up and down of each silo when its trainer spoke last
        self._corrupted: set[tuple[str, int]] = set()  # committed updates that were corrupted on disk
        self._news = asyncio.Event()
        self._proxies: dict[str, TcpProxy] = {}
        self._sides: dict[str, Process] = {}
        with WeightsFile(world.start) as weights:
            self._size = weights.nbytes

    async def play(self) -> str:
        """Runs it to its end; returns the digest of the final weights."""
        port = free_port()
        async with AsyncExitStack() as stack:
            for silo in SILOS:
                self._proxies[silo] = await stack.enter_async_context(TcpProxy(port))
            ports = {silo: proxy.port for silo, proxy in self._proxies.items()}
            credentials = self.world.folder / "credentials"
            path = write_federation(self.folder, f"127.0.0.1:{port}", ports, credentials, **self._settings)
            self.run_folder.mkdir()
            if any(blow.what == FULL_DISK for blow in self.blows):
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(self.run_folder)], check=True)
                stack.callback(unmount, self.run_folder)
            shutil.copy(self.world.start, self.run_folder / "random.safetensors")
            listener, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Listener(self._hear), local_addr=f"\0{self._socket}", family=socket.AF_UNIX
            )
            stack.callback(listener.close)
            self._sides["coordinator"] = Process(["coordinator", str(path)], self.folder / "coordinator.log")
            for silo in SILOS:
                self._sides[silo] = Process(["silo", str(self.folder / f"{silo}.yaml")], self.folder / f"{silo}.log")
            tasks = {name: asyncio.create_task(self._keep_up(name)) for name in self._sides}
            striking = asyncio.create_task(self._strike())
            try:
                async with asyncio.timeout(LONGEST):
                    await asyncio.wait([tasks["coordinator"]])
                    # A silo that was down when the federation ended is never told of it.
                    await asyncio.wait([tasks[silo] for silo in SILOS], timeout=3)
            except TimeoutError:
                self.wrong.append(f"not at its end after {LONGEST:g} s: {Ledger.read(self.run_folder)}")
            finally:
                for task in (striking, *tasks.values()):
                    task.cancel()
                ended = await asyncio.gather(striking, *tasks.values(), return_exceptions=True)
                for side in self._sides.values():
                    if side.kill():
                        assert side.process is not None
                        await side.process.wait()
                errors = [one for one in ended if isinstance(one, Exception) and not isinstance(one, TimeoutError)]
                self.wrong += [f"{type(error).__name__}: {error}" for error in errors]
            return self.check()

    def environment_of(self, side: str) -> dict[str, str]:
        """Variables of one side alone."""
        return {}

    def while_down(self, blow: Blow) -> None:
        """Called between the death and the new start of a side that a blow killed."""
        if blow.what == "corrupt spool":
            self._corrupt_spool(blow)
        elif blow.what == "corrupt work folder":
            self._corrupt_work_folder(blow)

    def holds(self, silo: str, round_: int) -> bool:
        """Whether a silo's update of a round is committed."""
        return Ledger.read(self.run_folder).holds(silo, round_)

    def delivered(self) -> dict[str, Counter[int]]:
        """By silo, in which rounds it was told that its update is committed, and how often."""
        pattern = rf"round (\d+) of {ARM}: update delivered"
        return {silo: Counter(map(int, re.findall(pattern, self.log_of(silo)))) for silo in SILOS}

    def log_of(self, side: str) -> str:
        """All that a side has said."""
        log = self._sides[side].log
        return log.read_text(errors="replace") if log.exists() else ""

    async def _keep_up(self, name: str) -> None:
        """Starts a side, again wherever it was killed."""
        side = self._sides[name]
        environment = {
            "GPTFL_CHAOS_SOCKET": self._socket,
            "GPTFL_CHAOS_LAYOUT": str(self.world.layout),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OPENBLAS_NUM_THREADS": "1",
        }
        while True:
            with side.log.open("ab") as log:
                side.killed = False
                side.process = await asyncio.create_subprocess_exec(
                    *(*GPTFL, *side.arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **environment, **self.environment_of(name)},
                    start_new_session=True,
                )
            code = await side.process.wait()
            if not side.killed:
                if code == 0:
                    return
                if code == 10 and self._ballast.exists() and "the disk is full" in self.log_of(name)[-500:]:
                    self._ballast.unlink()
                    self.full += 1
                    continue
                if code != 8:
                    raise RuntimeError(f"{name} ended with exit code {code}: {self.log_of(name)[-1500:]}")
                self.given_up += 1  # a trainer was killed so often that its silo failed in the round
                continue
            if side.blow is not None:
                self.while_down(side.blow)
                await asyncio.sleep(side.blow.seconds)

    def _hear(self, silo: str, pid: int, what: str, round_: int) -> None:
        """What a trainer tells of itself."""
        self._pids[silo] = pid
        if what == "setup":
            return
        if what == "train" and (silo, round_) not in self._corrupted and self.holds(silo, round_):
            self.wrong.append(f"{silo} was asked again for its committed update of round {round_}")
        proxy = self._proxies[silo]
        self._at[silo], self._mark[silo] = (round_ or ROUNDS + 1, what), (proxy.up, proxy.down)
        self._news.set()

    async def _until(self, round_: int, what: str, silo: str | None) -> None:
        """Waits until a trainer (None: each) is so far, or further."""
        order = ("train", "evaluate", "done")

        def there(name: str) -> bool:
            at = self._at.get(name, (0, "done"))
            return at[0] > round_ or (at[0] == round_ and order.index(at[1]) >= order.index(what))

        while not all(there(name) for name in ([silo] if silo else SILOS)):
            self._news.clear()
            await self._news.wait()

    async def _reached(self, blow: Blow) -> None:
        """Waits for the moment of a blow; where the run is further than that already, it strikes at once."""
        silo = blow.silo
        if blow.phase == "start":
            await asyncio.sleep(blow.fraction * 2 * _STARTING)
        elif blow.phase == "evaluate":
            await self._until(ROUNDS + 1, "evaluate", None)
            await asyncio.sleep(blow.fraction * 0.2)
        elif blow.phase == "training":
            await self._until(blow.round, "train", silo)
            await asyncio.sleep(blow.fraction * _TRAINING)
        elif blow.phase == "download":
            await self._until(blow.round - 1, "done", silo)
            await self._passed("down", silo, blow.fraction, blow.round)
        elif blow.phase == "upload":
            await self._until(blow.round, "done", silo)
            await self._passed("up", silo, blow.fraction, blow.round)
        elif blow.phase == "check":
            await self._until(blow.round, "done", silo)
            await self._passed("up", silo, 1.0, blow.round)
            await asyncio.sleep(0.03 * blow.fraction)
        elif blow.phase == "committed":
            # One silo's update is committed, and others are awaited.
            await self._until(blow.round, "train", silo)
            while (ledger := Ledger.read(self.run_folder)).round <= blow.round and not ledger.committed:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05 * blow.fraction)
        else:
            await self._until(blow.round, "done", None)
            await asyncio.gather(*(self._passed("up", name, 1.0, blow.round) for name in SILOS))
            await asyncio.sleep(0.05 * blow.fraction)

    async def _passed(self, way: Any, silo: str, share: float, round_: int) -> None:
        """Waits until a share of the model has passed a silo's proxy, or until the silo is in another round."""
        mark = self._mark.get(silo, (0, 0))[way == "down"]
        until = self._until(round_ + (way == "up"), "train", silo)
        passed = self._proxies[silo].reached(way, mark + int(share * self._size))
        tasks = [asyncio.create_task(until), asyncio.create_task(passed)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _strike(self) -> None:
        for blow in self.blows:
            await self._reached(blow)
            if blow.phase == "start" and blow.what in ("kill trainer", "corrupt spool", "corrupt work folder"):
                await self._until(1, "train", blow.silo)  # there is none before
            while not self._do(blow):  # it is down at the moment
                await asyncio.sleep(0.02)

    def _do(self, blow: Blow) -> bool:
        silo, proxy, what = blow.silo, self._proxies[blow.silo], blow.what
        state = self._state_of(silo)
        if what in ("kill coordinator", "corrupt spool"):
            if not self._sides["coordinator"].kill(blow):
                return False
            state = self._state()
        elif what in ("kill agent", "corrupt work folder"):
            if not self._sides[silo].kill(blow):
                return False
        elif what == "kill trainer":
            try:
                os.kill(self._pids[silo], signal.SIGKILL)
            except (ProcessLookupError, KeyError):
                return False
            del self._pids[silo]
        elif what == FULL_DISK:
            if self._ballast.exists():  # of the blow before
                return False
            self._fill()
            state = self._state()
        elif what == "cut":
            proxy.cut()
        elif what == "cut all":
            for each in self._proxies.values():
                each.cut()
            state = self._state()
        elif what == "stall":
            proxy.stall()
            asyncio.get_running_loop().call_later(blow.seconds, proxy.resume)
        elif what == "delay":
            proxy.delay = 0.02 * blow.fraction
            asyncio.get_running_loop().call_later(4 * blow.seconds, setattr, proxy, "delay", 0.0)
        elif what == "freeze":
            proxy.freeze()
        self.struck.append((what, state))
        return True

    def _state(self) -> str:
        """The state of the coordinator: of its round where all are alike, else that of the silo that is furthest."""
        ledger = Ledger.read(self.run_folder)
        if ledger.finished:
            return "report"
        if ledger.kind == "evaluate":
            return "evaluate"
        if ledger.round == 0:
            return "gather" if ledger.there else "start"
        if ledger.closed:
            return "gather"
        if ledger.committed == set(SILOS):
            written = {path.stem for path in (self.run_folder / "weights").glob("*.safetensors")}
            return "close" if written - ledger.weights - {"incoming"} else "aggregate"
        return max((self._state_of(silo, ledger) for silo in SILOS), key=STATES.index)

    def _state_of(self, silo: str, ledger: Ledger | None = None) -> str:
        """The state of a silo."""
        ledger = ledger or Ledger.read(self.run_folder)
        round_, what = self._at.get(silo, (0, "done"))
        if ledger.kind == "evaluate" or what == "evaluate":
            return "evaluate"
        if ledger.round == 0:
            return "start"
        if round_ == ledger.round and what == "train":
            return "training"
        if ledger.holds(silo, ledger.round):
            return "gather"  # it has delivered, and waits
        if round_ == ledger.round:
            # The end of an upload is not seen from here to the byte: TLS adds to it.
            return "check" if self._proxies[silo].up - self._mark[silo][0] >= self._size else "upload"
        received = self._proxies[silo].down - self._mark.get(silo, (0, 0))[1]
        return "download" if _WORDS < received < self._size else "gather"

    @property
    def _ballast(self) -> Path:
        return self.run_folder / "ballast"

    def _fill(self) -> None:
        """Leaves no room on the disk of the run folder."""
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    def _corrupt_spool(self, blow: Blow) -> None:
        ledger = Ledger.read(self.run_folder)
        committed = ledger.committed if ledger.kind == "train" and not ledger.closed else set()
        silo = min(committed, default=blow.silo)
        spool = self.run_folder / "spools" / f"{silo}.spool"
        if not spool.exists():
            return
        _corrupt(spool, blow)
        if silo in committed:
            self._corrupted.add((silo, ledger.round))
        for name in ("incoming.safetensors", ".incoming.safetensors.1.part"):
            (self.run_folder / "weights" / name).write_bytes(b"half of a file")

    def _corrupt_work_folder(self, blow: Blow) -> None:
        folder = self.folder / f"{blow.silo}-work"
        for name in ("weights.safetensors", "weights.safetensors.next", "update.safetensors"):
            if (folder / name).exists():
                _corrupt(folder / name, blow)

    def check(self) -> str:
        """Notes in `wrong` what is not as it must be; returns the digest of the final weights."""
        if self._sides["coordinator"].process is None or self._sides["coordinator"].process.returncode != 0:
            return ""
        final: str = json.loads((self.run_folder / "summary.json").read_text())["weights"][ARM]["final"]
        with WeightsFile(self.run_folder / "models" / f"{ARM}-final.safetensors") as weights:
            if weights.digest() != final:
                self.wrong.append("the published model is not that of the summary")
        if self.world.final and final != self.world.final:
            self.wrong.append(f"the final weights are {final[:12]}, of the undisturbed run {self.world.final[:12]}")
        kills = sum(what in KILLS for what, _ in self.struck)
        if self.blows and kills < 3:
            self.wrong.append(f"only {kills} kills or cuts came about before its end")
        self.wrong += [
            f"a traceback in {side.log}" for name, side in self._sides.items() if "Traceback" in self.log_of(name)
        ]
        audit = audit_of(self.run_folder)
        self.wrong += [f"audit log, line {one.line}: {one.found}, expected {one.expected}" for one in audit.faults]
        entries = audit.verification.entries.values()
        accepted = Counter((one["silo"], one["round"]) for one in entries if one["event"] == "update accepted")
        twice = {update for update, count in accepted.items() if count > 1} - self._corrupted
        if twice:
            self.wrong.append(f"accepted twice, by the audit log: {sorted(twice)}")
        left = [*self.run_folder.rglob("*.part"), *self.run_folder.rglob("incoming.safetensors")]
        if left:
            self.wrong.append(f"left behind: {', '.join(map(str, left))}")
        for silo, rounds in self.delivered().items():
            for round_, count in rounds.items():
                # A silo that is asked again need not train again: it has its update still.
                if count > 1 and (silo, round_) not in self._corrupted:
                    self.wrong.append(f"{silo} delivered its update of round {round_} {count} times")
        self.asked_again = self.log_of("coordinator").count("is damaged on disk and is asked for again")
        if self.asked_again < len(self._corrupted) or (self.asked_again and not self._corrupted):
            self.wrong.append(
                f"{len(self._corrupted)} committed updates were corrupted, {self.asked_again} were told of"
            )
        return final


class _Listener(asyncio.DatagramProtocol):
    def __init__(self, hear: Callable[[str, int, str, int], None]) -> None:
        self._hear = hear

    def datagram_received(self, data: bytes, _: Any) -> None:
        silo, pid, what, round_ = data.decode().split()
        self._hear(silo, int(pid), what, int(round_))


def _corrupt(path: Path, blow: Blow) -> None:
    """Turns a byte over, cuts the file short, writes rubbish, or deletes it."""
    size = path.stat().st_size
    kind = int(blow.seconds * 1000) % 4
    if kind == 0 or not size:
        path.unlink()
    elif kind == 1:
        os.truncate(path, int(blow.fraction * size))
    else:
        with path.open("r+b") as file:
            file.seek(int(blow.fraction * (size - 1)))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x40]) if kind == 2 else b"rubbish")
        if kind == 3:
            os.truncate(path, size)
