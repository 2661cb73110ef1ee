"""What `gptfl init` prints runs as it stands, once there is data where it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from support import Commands

from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.run.check import check_file
from gptfl_dist.run.institution import make_credentials


@pytest.fixture
def folder(gptfl: Commands, tmp_path: Path) -> Path:
    """The two printed files, and three images a label in the silo's data folder."""
    (tmp_path / "federation.yaml").write_text(gptfl.run("init").stdout)
    (tmp_path / "silo-1.yaml").write_text(gptfl.run("init", "silo").stdout)
    for number, label in enumerate(load_federation(tmp_path / "federation.yaml").labels):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (32, 32), 20 * number + index).save(tmp_path / "data" / label / f"{index}.png")
    return tmp_path


def test_without_an_edit_the_pre_flight_finds_nothing_wrong(folder: Path) -> None:
    findings = check_file(folder / "federation.yaml")
    # Credentials and test data are not needed here, and say so.
    assert [f.line() for f in findings if f.status != "ok" and f.checked != "MPI"] == []
    assert {f.checked for f in findings} > {"generator", "silo file of silo-1", "training of silo-1"}


def test_the_certificates_are_named_where_gptfl_credentials_puts_them(folder: Path) -> None:
    for name in ("federation.yaml", "silo-1.yaml"):
        text = (folder / name).read_text()
        for key in ("authority", "certificate", "key"):
            assert text.count(f"# {key}: credentials/") + text.count(f"#   {key}: credentials/") == 1
            for before in ("  # ", "#   "):
                text = text.replace(f"{before}{key}: credentials/", f"  {key}: credentials/")
        text = text.replace("# coordinator:", "coordinator:").replace("#   address:", "  address:")
        (folder / name).write_text(text)
    make_credentials(folder / "federation.yaml", ["localhost"], folder / "credentials", 90)
    exchange = load_federation(folder / "federation.yaml").exchange
    side = load_silo(folder / "silo-1.yaml").coordinator
    assert side is not None
    named = [exchange.authority, exchange.certificate, exchange.key, side.authority, side.certificate, side.key]
    assert set(named) <= set(folder.glob("credentials/*/*.pem"))
    assert len(set(named)) == 6
