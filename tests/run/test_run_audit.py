"""What a federation does stands in its audit log, each thing once, whoever is killed when; tampering is found."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from audited import each_once, events
from federated import ARM, World, failing, in_loop
from support import Commands, Federation

from gptfl_dist.errors import ConfigError, StorageError
from gptfl_dist.ledger.lock import locked
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.audit import EVENTS, audit_of
from gptfl_dist.run.auditor import Auditor
from gptfl_dist.run.folder import delete_run
from gptfl_dist.security.audit_log import KEY, LOG, AuditLog, Event, read_log

# In one event loop


@in_loop
async def test_a_federation_tells_who_came_what_was_accepted_and_what_each_round_came_to(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", script=failing("b", 1)) as world:
        await world.federate()
        with closing(world.ledger()) as ledger:
            Auditor(ledger)
    audit = audit_of(world.file.run_folder)
    assert audit.faults == []
    each_once(audit)
    (failed,) = events(audit, "order failed")
    assert (failed["silo"], failed["round"], failed["reason"]) == ("b", 1, "TrainerError: out of memory")
    assert {entry["silo"] for entry in events(audit, "silo connected")} == {"a", "b", "c"}
    assert {entry["silo"] for entry in events(audit, "silo disconnected")} <= {"a", "b", "c"}
    first = events(audit, "round committed")[0]
    accepted = [entry for entry in events(audit, "update accepted") if entry["round"] == 1]
    assert first["updates"] == {entry["silo"]: entry["nonce"] for entry in accepted}
    assert [entry["event"] for entry in audit.verification.entries.values()].count("arm finished") == 1
    assert events(audit, "arm begun")[0]["arm"] == ARM


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path, "{}")) as ledger:
        ledger.begin_arm(ARM, 0.5, "start")
        ledger.open_round(ARM, 1, "train", "start", ["a", "b"], {"a": "na", "b": "nb"})
        ledger.commit(ARM, 1, "a", 1, {}, "da")
        ledger.commit(ARM, 1, "b", 2, {}, "db")
        ledger.close_round(ARM, 1, "w1", {"a": 1, "b": 1})
        yield ledger


def test_a_coordinator_that_is_killed_while_it_writes_the_log_leaves_nothing_out_and_repeats_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(Ledger, "audit", die)  # after the log is written, before the ledger knows
        Auditor(ledger)
    whole = read_log(ledger.folder)
    assert len(ledger.waiting()) == 5
    for size in range(0, len(whole) + 1, 7):  # killed at any byte of the log
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            (ledger.folder / LOG).write_bytes(whole[:size])
            patched.setattr(Ledger, "audit", die)
            Auditor(ledger)
        audit = audit_of(ledger.folder)
        assert audit.faults == []
        each_once(audit)
    Auditor(ledger)
    assert ledger.waiting() == []
    each_once(audit_of(ledger.folder))


def test_what_waits_in_the_ledger_is_no_fault_and_is_told(ledger: Ledger) -> None:
    AuditLog(ledger.folder).append("certificate revoked", silo="c")
    audit = audit_of(ledger.folder)
    assert audit.faults == []
    assert any("5 events stand in the ledger" in note for note in audit.notes)


def test_a_tail_that_was_cut_off_is_found_by_the_ledger_and_stays_a_fault(ledger: Ledger) -> None:
    Auditor(ledger)
    lines = read_log(ledger.folder).splitlines(keepends=True)
    (ledger.folder / LOG).write_bytes(b"".join(lines[:4]))
    faults = audit_of(ledger.folder).faults
    assert {fault.line for fault in faults} == {5}
    assert faults[0].found.startswith("no entry 7 with the hash")
    assert any("no entry of the update of b in round 1" in fault.found for fault in faults)
    assert any("no entry of round 1" in fault.found for fault in faults)

    ledger.note("silo connected", {"silo": "a"})
    Auditor(ledger)  # a start does not make it good
    audit = audit_of(ledger.folder)
    assert (audit.faults[0].line, audit.faults[0].found) == (5, faults[0].found)
    assert audit.verification.entries[5]["event"] == "log broken"


def test_a_log_that_is_gone_is_found_by_the_ledger(ledger: Ledger) -> None:
    Auditor(ledger)
    (ledger.folder / LOG).unlink()
    fault = audit_of(ledger.folder).faults[0]
    assert (fault.line, fault.found[:10]) == (1, "no entry 7")


def test_a_ledger_that_was_changed_is_found_by_the_log(ledger: Ledger) -> None:
    Auditor(ledger)
    ledger._database.execute("UPDATE orders SET samples = 9 WHERE silo = 'a'")
    ledger._database.execute("UPDATE rounds SET weights = 'w2'")
    ledger._database.execute("DELETE FROM outbox")
    faults = audit_of(ledger.folder).faults
    assert [json.loads(fault.found.partition(" with ")[2]) for fault in faults] == [
        {"silo": "a", "digest": "da", "samples": 1},
        {"weights": "w1"},
    ]


def test_an_end_that_was_rewritten_before_it_was_signed_is_found_at_the_next_start(ledger: Ledger) -> None:
    Auditor(ledger)
    ledger.commit(ARM, 1, "b", 2, {}, "another")
    Auditor(ledger)
    known = ledger.audited
    lines = read_log(ledger.folder).splitlines(keepends=True)
    (ledger.folder / LOG).write_bytes(b"".join(lines[:-1]))
    AuditLog(ledger.folder).write([Event("nothing", {}, signed=False)])
    assert known is not None
    found = f"no entry {known[0]} with the hash {known[1]}"
    assert (len(lines), found) in [(fault.line, fault.found) for fault in audit_of(ledger.folder).faults]
    Auditor(ledger)
    (broken,) = events(audit_of(ledger.folder), "log broken")
    assert broken["found"] == found


def test_a_run_that_is_made_anew_keeps_the_log_and_what_the_last_one_had_not_told(ledger: Ledger) -> None:
    ledger.close()
    with locked(ledger.folder):
        delete_run(ledger.folder)
    assert {path.name for path in ledger.folder.iterdir()} == {LOG, KEY, "ledger.lock"}
    with closing(Ledger(ledger.folder, "{}")) as again:
        again.begin_arm(ARM, 0.5, "start")
        Auditor(again)
    audit = audit_of(ledger.folder)
    assert audit.faults == []
    assert len(events(audit, "update accepted")) == 2
    assert len(events(audit, "run deleted")) == 1
    assert len(events(audit, "arm begun")) == 2


@in_loop
async def test_a_log_that_cannot_be_written_any_more_ends_the_work(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path, "{}")) as ledger:
        auditor = Auditor(ledger)
        ledger.note("run started", {})
        auditor.write()
        ledger.note("silo connected", {"silo": "a"})
        (tmp_path / KEY).unlink()
        auditor._log = AuditLog(tmp_path)  # which has not read the key yet
        with pytest.raises(StorageError, match=r"audit\.key is missing"):
            await auditor.beside(asyncio.Event().wait())
        assert len(ledger.waiting()) == 1


# Real processes


@pytest.fixture(scope="module")
def finished(undisturbed: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a run left that the audit looks at."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("ledger.sqlite", LOG):
        shutil.copy(undisturbed.run_folder / name, folder / name)
    return folder


def test_a_run_tells_its_settings_its_silos_with_their_certificates_and_its_end(undisturbed: Federation) -> None:
    audit = audit_of(undisturbed.path)
    assert audit.faults == []
    assert {entry["event"] for entry in audit.verification.entries.values()} <= EVENTS
    each_once(audit)
    (started,), (ended,) = events(audit, "run started"), events(audit, "run ended")
    assert started["configuration"] == ended["configuration"]
    assert (ended["error"], ended["message"]) == ("", "")
    assert audit.verification.signed == audit.verification.head.number == ended["number"] + 1
    for silo in undisturbed.silos:
        (connected,) = [entry for entry in events(audit, "silo connected") if entry["silo"] == silo]
        assert connected["identity"] == f"gptfl://tiny/silo/{silo}"
        assert connected["address"].startswith("ipv4:127.0.0.1:")
        assert len(connected["fingerprint"]) == 64
        assert int(connected["serial"], 16)
        (left,) = [entry for entry in events(audit, "silo disconnected") if entry["silo"] == silo]
        assert left["serial"] == connected["serial"]


def test_what_a_silo_signed_cannot_be_rewritten_by_who_keeps_the_log(undisturbed: Federation, tmp_path: Path) -> None:
    """The coordinator's operator has the log's key and can chain any story; what the silos signed does not fit it."""
    entries = list(audit_of(undisturbed.run_folder).verification.entries.values())
    own = ("number", "time", "event", "previous", "hash")
    told = [
        Event(entry["event"], {name: value for name, value in entry.items() if name not in own}, entry["time"])
        for entry in entries
        if entry["event"] not in ("checkpoint", "log begun")
    ]

    def faults(events: list[Event]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        shutil.copy(undisturbed.run_folder / KEY, folder / KEY)
        AuditLog(folder).write(events)
        return [fault.found for fault in audit_of(folder).faults]

    assert faults(told) == []
    updates = [number for number, event in enumerate(told) if event.event == "update accepted"]
    assert len(updates) == 6
    other = told[updates[-1]].fields
    for changed in (
        {"samples": 1}, {"digest": "00" * 32}, {"silo": "silo-9"}, {"statement": other["statement"]},
        {"signature": other["signature"]}, {"signature": "!"}, {"signer": "00" * 32},
    ):  # fmt: skip
        event = told[updates[0]]
        story = [*told]
        story[updates[0]] = Event(event.event, {**event.fields, **changed}, event.time)
        (found,) = faults(story)
        assert "that it did not sign as it stands" in found


def test_the_command_verifies_a_log_with_its_pinned_key(gptfl: Commands, undisturbed: Federation) -> None:
    fingerprint = audit_of(undisturbed.path).verification.fingerprint
    told = json.loads(gptfl.run("audit", "verify", undisturbed.path, "--key", fingerprint, "--format", "json").stdout)
    assert (told["whole"], told["key"], told["faults"], told["notes"]) == (True, fingerprint, [], [])
    said = gptfl.run("audit", "verify", undisturbed.path, "--key", undisturbed.run_folder / KEY).stdout
    assert said.splitlines()[0].endswith("nothing was changed, moved or left out")


def test_the_commands_find_show_and_export_a_change(gptfl: Commands, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shown = gptfl.run("audit", "show", folder, "--silo", "silo-2", "--round", "2").stdout
    assert "update accepted" in shown
    assert "silo=silo-2" in shown
    assert "silo-1" not in shown
    last = gptfl.run("audit", "show", folder, "--event", "update accepted", "--last", "1", "--format", "json").stdout
    entry = json.loads(last)
    assert entry in audit_of(folder).verification.entries.values()
    whole = gptfl.run("audit", "show", folder).stdout
    assert f" signature={entry['signature'][:12]}" in whole
    assert "BEGIN" not in whole
    assert max(map(len, whole.splitlines())) < 400

    nothing = gptfl.run("audit", "show", folder, "--silo", "silo-9")
    assert (nothing.stdout, "entries of" in nothing.stderr, "fits" in nothing.stderr) == ("", True, True)
    unknown = gptfl.start("audit", "show", folder, "--event", "update acepted")
    assert unknown.wait() == 2
    assert "there is no such kind of entry" in unknown.stderr
    assert "update accepted" in unknown.stderr

    line = entry["number"]
    content = read_log(folder)
    (folder / LOG).write_bytes(content.replace(b'"samples":%d' % entry["samples"], b'"samples":999'))
    found = gptfl.start("audit", "verify", folder)
    assert found.wait() == 13
    assert f"line {line}: found hash {entry['hash']}, expected" in found.stdout
    seen = gptfl.start("audit", "show", folder, "--last", "1")
    assert seen.wait() == 13
    assert "does not verify: line" in seen.stderr

    table, lines = tmp_path / "audit.csv", tmp_path / "audit.jsonl"
    for out in (table, lines):
        assert gptfl.start("audit", "export", folder, "--out", out).wait() == 13
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    judged = [json.loads(text) for text in lines.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == [one["verdict"] for one in judged]
    assert rows[line - 1]["verdict"].startswith("found hash")
    assert rows[0]["verdict"] == "signed"
    assert (rows[line - 1]["silo"], json.loads(rows[line - 1]["details"])["samples"]) == (entry["silo"], 999)
    again = gptfl.start("audit", "export", folder, "--out", table)
    assert again.wait() == 2
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("key", "said"), [("abc", "neither a file nor a fingerprint"), (__file__, "no key of ECDSA P-256")]
)
def test_a_key_that_is_none_is_refused(finished: Path, key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        audit_of(finished, key)


def test_another_key_than_the_pinned_one_is_found_and_a_log_alone_can_be_verified(
    finished: Path, tmp_path: Path
) -> None:
    assert audit_of(finished, "00" * 32).faults[0].line == 1
    shutil.copy(finished / LOG, tmp_path)
    alone = audit_of(tmp_path)
    assert alone.faults == []
    assert "there is no ledger beside it to compare it with" in alone.notes
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="there is no audit log here"):
        audit_of(tmp_path / "empty")
