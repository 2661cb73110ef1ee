"""What trust costs a silo in a round, in CPU time of both sides together, beside the encryption and the digests.

    python benchmarks/trust.py --params 100000000 --json runs/trust/result.json

A TLS 1.3 handshake with the certificates of both sides, which happens once a connection and not once a round; the
signature over an update and its check; the question whether the silo's certificate still counts, asked with each of
the messages that carry weights down and an update up; and what the audit log takes for the update. Medians of
`--times`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from gptfl_dist.config.wire import Exchange
from gptfl_dist.exchange.base import UpdateHeader
from gptfl_dist.federation.orders import Report
from gptfl_dist.security.audit_log import AuditLog
from gptfl_dist.security.authority import Credentials, key_bytes, new_key
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.request import make_request
from gptfl_dist.security.session import Session
from gptfl_dist.security.signing import require_signed, sign
from gptfl_dist.security.trust import KeptTrust, certify
from gptfl_dist.security.vault import Vault

COORDINATOR, SILO = Identity("fed", "coordinator", "coordinator"), Identity("fed", "silo", "silo-1")
HEADER = UpdateHeader(Report("n" * 32, 100, {"accuracy": 0.5, "loss": 1.0}), "ab" * 32, "cd" * 32, "ef" * 32, 1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=100_000_000, help="parameters of the model, float32")
    parser.add_argument("--times", type=int, default=50, help="how often each is measured")
    parser.add_argument("--json", type=Path, default=None, help="also written to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), options.params, options.times)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measured(folder: Path, parameters: int, times: int) -> dict[str, float]:
    """Milliseconds of each part, and of all of them together."""
    vault = Vault(folder / "authority", "fed")
    vault.create()
    registry, log = Registry(vault.folder), AuditLog(folder, durable=False)
    registry.create()
    authority = vault.open(timedelta(days=7))
    trust = KeptTrust(vault, timedelta(days=7), registry, ("localhost",), log.append)
    key = new_key()
    certificate, roots = certify(authority, registry, SILO, make_request(SILO, key), log.append, "silo enrolled")
    own, other = trust.credentials(), Credentials(roots, certificate, key_bytes(key))
    (issued,) = registry.certificates()
    serial, expires = int(issued.serial, 16), datetime.fromisoformat(issued.expires).timestamp()
    messages = 2 * -(-4 * parameters // Exchange().chunk)
    text = HEADER.statement(SILO, "run")
    signature = sign(text, other.key)

    def checks() -> None:
        for _ in range(messages):
            assert time.time() < expires
            assert not trust.refusal(serial)

    parts: dict[str, Callable[[], object]] = {
        "handshake_ms": lambda: shake_hands(own, other),
        "sign_ms": lambda: sign(HEADER.statement(SILO, "run"), other.key),
        "verify_ms": lambda: require_signed(HEADER.statement(SILO, "run"), signature, certificate),
        "checks_ms": checks,
        "audit_ms": lambda: log.append("update accepted", statement=text, signature=signature.hex()),
    }
    result = {name: 1000 * median(part, times) for name, part in parts.items()}
    trust.close()
    return {"parameters": parameters, "messages": messages, **result, "all_ms": sum(result.values())}


def shake_hands(coordinator: Credentials, silo: Credentials) -> None:
    server, client = Session(coordinator, SILO, "the silo"), Session(silo, COORDINATOR, "the coordinator")
    words = client.step()
    while not (server.established and client.established):
        words = server.step(words)
        if not client.established:
            words = client.step(words)


def median(part: Callable[[], object], times: int) -> float:
    """CPU seconds."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        part()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
