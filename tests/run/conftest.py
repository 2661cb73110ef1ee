"""For the federations in one event loop. Whatever is imported first, grpc is loaded with our list of TLS suites."""

from __future__ import annotations

import pytest

import gptfl_dist.exchange.grpc  # noqa: F401  (imported for what that does)
from gptfl_dist.run import silo as silo_module


@pytest.fixture(autouse=True)
def _silos_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silo_module, "FIRST_PAUSE", 0.001)
