"""An inbox, and what it committed. Whatever a test module imports first, grpc is loaded with our list of TLS suites."""

from __future__ import annotations

import pytest
from inbox_world import LAYOUT, ORDER

import gptfl_dist.exchange.grpc  # noqa: F401  (imported for what that does)
from gptfl_dist.exchange.inbox import Inbox


@pytest.fixture
def commits():
    return []


@pytest.fixture
def inbox(tmp_path, commits):
    inbox = Inbox(tmp_path / "spools", LAYOUT, {"alice": 100, "bob": 5}, lambda *commit: commits.append(commit))
    inbox.expect("alice", ORDER)
    yield inbox
    inbox.close()
