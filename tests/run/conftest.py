"""For the federations in one event loop."""

from __future__ import annotations

import pytest

from gptfl_dist.run import silo as silo_module


@pytest.fixture(autouse=True)
def _silos_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silo_module, "FIRST_PAUSE", 0.001)
