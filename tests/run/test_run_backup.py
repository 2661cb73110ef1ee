"""Backup and restore: nothing of a backup can be changed unseen, and a restored coordinator's run comes to its end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import Commands, Federation, wait_for
from test_run_enrolment import Invited
from test_run_sides import Sides

from gptfl_dist.errors import ConfigError, GptflError, StorageError
from gptfl_dist.run.archive import MANIFEST, Manifest, digested, manifest_of, pack, unpack
from gptfl_dist.run.audit import audit_of
from gptfl_dist.run.backup import HELD, back_up
from gptfl_dist.run.restore import restore


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small archive of three files, one of which is empty."""
    sources = []
    for name, content in (("one", b"1" * 700), ("two", b""), ("three", b"3")):
        sources.append(tmp_path / name)
        sources[-1].write_bytes(content)
    places = {"file": "federation.yaml", "run": "run"}
    files = tuple(digested(f"run/{path.name}", path) for path in sources)
    pack(tmp_path / "a.tar", Manifest("fed", "federation.yaml", "1", 1_700_000_000, places, {}, files), sources, quiet)
    return tmp_path / "a.tar"


def test_an_archive_is_a_tar_that_others_can_list_and_its_owner_alone_can_read(archive: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["tar", "-tf", archive], check=True, capture_output=True, text=True).stdout.split()
    assert listed == [MANIFEST, "run/one", "run/two", "run/three"]
    assert archive.stat().st_mode & 0o777 == 0o600
    unpack(archive, tmp_path / "out", quiet)
    assert (tmp_path / "out" / "run" / "one").read_bytes() == b"1" * 700
    assert (tmp_path / "out" / "run" / "one").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "run").stat().st_mode & 0o777 == 0o700


def test_any_changed_byte_is_found(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        archive.write_bytes(changed)
        with pytest.raises(StorageError, match=r"a\.tar"):
            unpack(archive, tmp_path / "out", quiet)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_an_archive_that_is_cut_short_or_goes_on_is_refused_with_the_file_it_ends_in(
    archive: Path, tmp_path: Path
) -> None:
    whole = archive.read_bytes()
    for length in range(0, len(whole), 97):
        archive.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"cut short|no backup|cannot be read"):
            unpack(archive, tmp_path / "out", quiet)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    archive.write_bytes(whole[: whole.index(b"1" * 700) + 10])
    with pytest.raises(StorageError, match="is cut short: it ends in run/one"):
        unpack(archive, tmp_path / "out", quiet)
    archive.write_bytes(whole + b"\0")
    with pytest.raises(StorageError, match="bytes follow its end"):
        unpack(archive, tmp_path / "other", quiet)


@pytest.mark.parametrize("name", ["../evil", "/evil", "run/../../evil", "run//evil", "run/.hidden", "", "run/a b"])
@pytest.mark.parametrize("where", ["file", "place"])
def test_no_archive_writes_outside_of_its_folder(archive: Path, tmp_path: Path, name: str, where: str) -> None:
    manifest = manifest_of(archive)
    source = tmp_path / "one"
    if where == "file":
        forged = replace(manifest, files=(digested(name, source),))
    else:
        forged = replace(manifest, places={**manifest.places, "run": name}, files=(digested("run/one", source),))
    archive.unlink()
    pack(archive, forged, [source], quiet)
    with pytest.raises(StorageError, match="cannot be read: names"):
        unpack(archive, tmp_path / "out" / "deep", quiet)
    assert not (tmp_path / "out" / "evil").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(StorageError, match="is no backup"):
        restore(tmp_path / "x.tar", tmp_path / "out", "")
    with tarfile.open(tmp_path / "y.tar", "w") as other:
        other.add(tmp_path / "x.tar", "x")
    with pytest.raises(StorageError, match=r"manifest\.json cannot be read"):
        restore(tmp_path / "y.tar", tmp_path / "out", "")
    with pytest.raises(StorageError, match="No such file"):
        restore(tmp_path / "z.tar", tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_a_restore_overwrites_nothing_and_leaves_nothing_of_a_damaged_archive(
    undisturbed: Federation, tmp_path: Path
) -> None:
    done = back_up(undisturbed.path, tmp_path / "a.tar")
    assert {Path(each).name for each in done.left_out} == {"test.npz", "silo-1.yaml", "silo-2.yaml"}
    assert list((undisturbed.run_folder / HELD).iterdir()) == []
    with pytest.raises(ConfigError, match="exists"):
        back_up(undisturbed.path, tmp_path / "a.tar")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        restore(tmp_path / "a.tar", tmp_path / "full", "")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b.tar").write_bytes(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"b\.tar is damaged: run/"):
        restore(tmp_path / "b.tar", tmp_path / "new", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_with_missing_weights_is_not_backed_up(undisturbed: Federation, tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    shutil.copytree(undisturbed.folder, folder)
    weights = folder / "run" / "weights" / f"{undisturbed.summary()['weights']['fedavg_random']['final']}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(GptflError, match="is missing or damaged"):
        back_up(folder / "federation.yaml", tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_a_backup_beside_a_coordinator_at_work_is_restored_elsewhere_and_the_run_comes_to_its_end(
    federation: Callable[..., Federation], gptfl: Commands, tmp_path: Path, undisturbed: Federation
) -> None:
    """The whole folder is lost with the machine; the silos have an address and certificates, which stay."""
    world = Invited(federation(), gptfl, tmp_path).begin()
    lines = {name: world.invitation(name) for name in world.names}
    coordinator = world.coordinator()
    for name, line in lines.items():
        assert world.join(name, line).wait() == 0
    silos = [world.silo(name) for name in world.names]
    (tmp_path / "backups").mkdir()
    wait_for(lambda: world.federation.owed(1))
    told = json.loads(
        gptfl.run("backup", world.federation.path, "--to", tmp_path / "backups", "--format", "json").stdout
    )
    os.kill(coordinator.process.pid, signal.SIGKILL)
    coordinator.wait_until_gone()

    new = tmp_path / "new"
    done = gptfl.run("restore", told["archive"], "--into", new, "--reason", "the machine burnt down")
    assert "epoch 2 begins with the next start, from round" in done.stdout
    assert "revoke again whom you revoked after" in done.stdout
    shutil.copy(world.federation.folder / "test.npz", new)
    shutil.rmtree(world.federation.folder / "run")
    shutil.rmtree(world.federation.folder / "authority")
    again = gptfl.start("coordinator", new / "federation.yaml")
    for command in (again, *silos):
        assert command.wait() == 0, command.stderr
    summary = json.loads((new / "run" / "summary.json").read_text())["weights"]["fedavg_random"]["final"]
    assert summary == undisturbed.result()[0]
    for silo in silos:
        assert "began epoch 2" in silo.stderr
        assert "the machine burnt down" in silo.stderr
    audit = audit_of(new / "run")
    assert audit.faults == []
    (begun,) = [entry for entry in audit.verification.entries.values() if entry["event"] == "epoch begun"]
    assert begun["epoch"] == 2
    assert f"from round {begun['rounds']['fedavg_random']} of fedavg_random" in done.stdout
    accepted = [entry for entry in audit.verification.entries.values() if entry["event"] == "update accepted"]
    later = [entry for entry in accepted if entry["number"] > begun["number"]]
    assert {json.loads(entry["statement"])["epoch"] for entry in later if entry["round"] > 1} == {2}


def test_a_copy_of_the_folder_that_is_put_back_is_refused_until_an_epoch_is_begun(
    federation: Callable[..., Federation], gptfl: Commands, tmp_path: Path, undisturbed: Federation
) -> None:
    sides = Sides(federation(), gptfl)
    coordinator = sides.coordinator()
    silos = [sides.silo(name) for name in sides.federation.silos]
    run, copy = sides.federation.run_folder, tmp_path / "copy"

    wait_for(lambda: sides.federation.owed(2))
    os.kill(coordinator.process.pid, signal.SIGKILL)
    coordinator.wait_until_gone()
    shutil.copytree(run, copy)
    coordinator = sides.coordinator()
    wait_for(lambda: len(sides.federation.owed(3)) == 2)
    wait_for(lambda: all('"round": 3' in seen(sides, name) for name in sides.federation.silos))
    os.kill(coordinator.process.pid, signal.SIGKILL)
    coordinator.wait_until_gone()
    shutil.rmtree(run)
    copy.rename(run)

    refused = sides.coordinator()
    assert refused.wait() == 8
    said = "rollback: round 2 of fedavg_random is asked for, and round 3 was seen in epoch 1"
    assert said in refused.stderr
    audit = audit_of(run)
    assert audit.faults == []
    failed = [entry for entry in audit.verification.entries.values() if entry["event"] == "order failed"]
    assert {entry["silo"] for entry in failed} == set(sides.federation.silos)
    assert all(said in entry["reason"] for entry in failed)
    assert all(said in silo.stderr for silo in silos)

    assert "epoch 2 begins" in gptfl.run("epoch", sides.federation.path, "--reason", "copied").stdout
    again = sides.coordinator()
    for command in (again, *silos):
        assert command.wait() == 0, command.stderr
    assert sides.federation.result() == undisturbed.result()


def seen(sides: Sides, silo: str) -> str:
    path = sides.federation.folder / f"{silo}-work" / "seen.json"
    return path.read_text() if path.exists() else ""


def test_an_epoch_needs_a_run_and_no_coordinator_at_work(
    federation: Callable[..., Federation], gptfl: Commands
) -> None:
    sides = Sides(federation(), gptfl)
    none = gptfl.start("epoch", sides.federation.path)
    assert none.wait() == 2
    assert "no run was started here" in none.stderr
    coordinator = sides.coordinator()
    wait_for(lambda: "taking silos" in coordinator.stderr)
    busy = gptfl.start("epoch", sides.federation.path)
    assert busy.wait() == 10
    assert "another coordinator is at work on this run" in busy.stderr
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.wait() == 130


def test_what_a_run_keeps_is_its_owners_alone(undisturbed: Federation) -> None:
    kept = [path for path in undisturbed.run_folder.rglob("*") if path.suffix in (".safetensors", ".spool", ".sqlite")]
    kept += [undisturbed.run_folder / name for name in ("audit.jsonl", "audit.key", "silos/silo-1/seen.json")]
    assert len(kept) > 12
    assert {oct(path.stat().st_mode & 0o777) for path in kept} == {"0o600"}
    for name in ("weights", "spools", "silos/silo-1"):
        assert (undisturbed.run_folder / name).stat().st_mode & 0o777 == 0o700


def test_settings_that_named_places_elsewhere_are_told(undisturbed: Federation, tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    shutil.copytree(undisturbed.folder, folder)
    (folder / "run").rename(tmp_path / "elsewhere")
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "run_folder": str(tmp_path / "elsewhere")}))
    back_up(path, tmp_path / "a.tar")
    done = restore(tmp_path / "a.tar", tmp_path / "new", "")
    assert done.next[0] == f"in {tmp_path / 'new' / 'federation.yaml'} set run_folder: run"
    assert (tmp_path / "new" / "run" / "ledger.sqlite").exists()
    assert done.epoch is not None
    assert not done.epoch.signed
