"""What an audit log tells, held against the ledger."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gptfl_dist.ledger.reader import read
from gptfl_dist.run.audit import Audit


def events(audit: Audit, event: str) -> list[dict[str, Any]]:
    return [entry for entry in audit.verification.entries.values() if entry["event"] == event]


def each_once(audit: Audit) -> None:
    """Every update and round that the ledger holds stands in the log once, and no other does."""
    folder = audit.file.parent
    arms = read(folder, lambda ledger: [ledger.arm(name) for name in ledger.arms()])
    assert arms
    rounds = [(arm, r) for arm in arms if arm is not None for r in arm.rounds]
    committed = Counter(o.nonce for _, r in rounds if r.kind == "train" for o in r.orders if o.samples is not None)
    assert Counter(entry["nonce"] for entry in events(audit, "update accepted")) == committed
    closed = Counter((arm.arm, r.round, r.weights) for arm, r in rounds if r.weights is not None)
    told = events(audit, "round committed")
    assert Counter((entry["arm"], entry["round"], entry["weights"]) for entry in told) == closed
    assert set(committed.values()) == set(closed.values()) == {1}
