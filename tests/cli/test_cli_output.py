"""`--format json` of the commands that print a file."""

from __future__ import annotations

import json

import pytest
from support import Commands


@pytest.mark.parametrize("kind", ["federation", "silo"])
def test_init_and_schema_print_json_where_asked_for(kind: str, gptfl: Commands) -> None:
    told = json.loads(gptfl.run("init", kind, "--format", "json").stdout)
    assert told == {"kind": kind, "text": gptfl.run("init", kind).stdout}
    compact, indented = gptfl.run("schema", kind, "--format", "json").stdout, gptfl.run("schema", kind).stdout
    assert json.loads(compact) == json.loads(indented)
    assert compact.count("\n") == 1
