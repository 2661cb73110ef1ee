"""The line through a shared folder, and the guard beside a trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support import wait_for

from gptfl_dist.errors import StorageError
from gptfl_dist.launch import folder as folder_module
from gptfl_dist.launch import guard
from gptfl_dist.launch.channel import ENV, TrainerEnd
from gptfl_dist.launch.folder import LEASE, Session, agent_line, trainer_line
from gptfl_dist.weights import Layout, WeightsFile, write_weights

LAYOUT = Layout.of([("w", (1000,), "F32")])


def weights(path: Path, value: float) -> str:
    return write_weights(path, LAYOUT, [np.full(1000, value, "<f4").tobytes()])


def test_messages_arrive_in_order_and_only_when_they_are_whole(tmp_path: Path) -> None:
    agent, trainer = agent_line(tmp_path), trainer_line(tmp_path)
    assert trainer.take() is None
    for number in range(3):
        agent.send({"type": "train", "round": number})
    first = tmp_path / "agent-000001.json"
    whole = first.read_bytes()
    for torn in (b"", whole[:10], whole[:-1]):  # as a file system shows it that is behind
        first.write_bytes(torn)
        assert trainer.take() is None
    first.write_bytes(whole)
    assert [trainer.take() for _ in range(4)] == [*({"type": "train", "round": n} for n in range(3)), None]
    trainer.send({"type": "ready"})
    assert agent.take() == {"type": "ready"}


def test_weights_and_updates_pass_with_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = weights(tmp_path / "weights", 1.0)
    session = Session(tmp_path / "shared")
    monkeypatch.setenv(ENV, str(session.folder))
    trainer = TrainerEnd()
    before = weights(tmp_path / "kept", 0.5)
    asked = {"type": "train", **{name: str(tmp_path / name) for name in ("weights", "update", "kept", "keep")}}
    sent = session.send(asked)
    order = trainer.receive()
    assert {Path(order[name]).parent for name in ("weights", "update", "kept", "keep")} == {session.folder}
    for name, content in (("weights", digest), ("kept", before)):
        with WeightsFile(Path(order[name])) as received:
            assert received.digest() == content

    update, keep = weights(Path(order["update"]), 2.0), weights(Path(order["keep"]), 3.0)
    trainer.send({"type": "result", "digest": update, "keep_digest": keep})
    answer = session.take()
    assert answer is not None
    session.bring(asked, sent, answer)
    for name, content in (("update", update), ("keep", keep)):
        with WeightsFile(tmp_path / name) as brought:
            assert brought.digest() == content
    session.clear(sent)
    assert not list(session.folder.glob("*.safetensors"))


def test_weights_that_are_shown_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path / "weights", 1.0)
    session = Session(tmp_path / "shared")
    monkeypatch.setenv(ENV, str(session.folder))
    sent = session.send({"type": "evaluate", "weights": str(tmp_path / "weights")})
    placed = Path(sent["weights"])
    whole = placed.read_bytes()
    placed.write_bytes(whole[:-4])
    got = []
    waiting = threading.Thread(target=lambda: got.append(TrainerEnd().receive()))
    waiting.start()
    waiting.join(0.3)
    assert got == []
    placed.write_bytes(whole)
    waiting.join(30)
    assert got[0]["type"] == "evaluate"


def test_an_update_that_is_not_what_was_said_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "VISIBLE_WITHIN", 0.2)
    session = Session(tmp_path / "shared")
    asked = {"type": "train", "update": str(tmp_path / "update")}
    sent = {"type": "train", "update": str(session.folder / "update-1.safetensors")}
    with pytest.raises(StorageError, match="is not there"):
        session.bring(asked, sent, {"digest": "0" * 64})
    weights(Path(sent["update"]), 3.0)
    with pytest.raises(StorageError, match="another digest"):
        session.bring(asked, sent, {"digest": "0" * 64})


def guarded(session: Path, limit: float, code: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-IS", guard.__file__, str(session), str(limit), sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


DEAF = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("how", ["lease", "term", "kill", "launcher"])
def test_a_deaf_trainer_and_what_it_started_end_with_agent_launcher_or_guard(tmp_path: Path, how: str) -> None:
    session = Session(tmp_path)
    limit = 1.0 if how == "lease" else 600.0
    if how == "launcher":
        start = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
        command = [sys.executable, "-IS", guard.__file__, str(session.folder), str(limit), sys.executable, "-c", DEAF]
        process = subprocess.Popen([sys.executable, "-c", start, *command], stdout=subprocess.PIPE, text=True)
    else:
        process = guarded(session.folder, limit, DEAF)
    assert process.stdout is not None
    trainer, child = map(int, process.stdout.readline().split())
    if how == "term":
        process.terminate()
    elif how != "lease":
        process.kill()
    wait_for(lambda: gone(trainer))
    if how != "kill":  # its supervisor is no more; the session's end is the launcher's to see
        wait_for(lambda: gone(child))
        wait_for(lambda: session.exits() == {0: -signal.SIGTERM})
    else:
        os.kill(child, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()


def test_a_trainer_whose_lease_is_renewed_goes_on_and_its_exit_code_is_told(tmp_path: Path) -> None:
    session = Session(tmp_path)
    process = guarded(session.folder, 1.0, "import time; time.sleep(3); raise SystemExit(7)", PMI_RANK="2")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.2):
            session.renew()

    renewing = threading.Thread(target=renew)
    renewing.start()
    assert process.wait(60) == 7
    ended.set()
    renewing.join()
    assert session.exits() == {2: 7}
    assert process.stdout is not None
    process.stdout.close()


def test_nothing_is_started_for_a_session_that_is_over_or_a_job_that_was_requeued(tmp_path: Path) -> None:
    session = Session(tmp_path)
    requeued = guarded(session.folder, 60.0, "print('started')", SLURM_RESTART_COUNT="1")
    session_gone = guarded(tmp_path / "gone", 60.0, "print('started')")
    for process in (requeued, session_gone):
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
    assert (session.folder / LEASE).exists()
