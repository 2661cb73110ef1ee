"""What commands print: files as JSON where asked for, paths as people find them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import Commands

from gptfl_dist.cli.main import where


@pytest.mark.parametrize("kind", ["federation", "silo"])
def test_init_and_schema_print_json_where_asked_for(kind: str, gptfl: Commands) -> None:
    told = json.loads(gptfl.run("init", kind, "--format", "json").stdout)
    assert told == {"kind": kind, "text": gptfl.run("init", kind).stdout}
    compact, indented = gptfl.run("schema", kind, "--format", "json").stdout, gptfl.run("schema", kind).stdout
    assert json.loads(compact) == json.loads(indented)
    assert compact.count("\n") == 1


def test_a_result_outside_the_current_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert where(tmp_path / "here" / "run" / "report.html") == where(Path("run/report.html")) == "run/report.html"
    outside = str(tmp_path / "there" / "report.html")
    assert where(tmp_path / "there" / "report.html") == where(Path("../there/report.html")) == outside
