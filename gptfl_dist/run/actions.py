"""What an operator can have done, on the coordinator's machine by its federation file. The same for whoever asks.

`gptfl` calls it for who works there, the coordinator for who asks it over the network. By then it is settled that they
may (`exchange/grpc/operators.py`).
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gptfl_dist.errors import ConfigError
from gptfl_dist.exchange.base import Wish
from gptfl_dist.observe.status import Status
from gptfl_dist.run import admission
from gptfl_dist.run.operate import Asked, ask
from gptfl_dist.run.status import status_of
from gptfl_dist.security.registry import Invitation, Issued

_LONGEST_INVITATION = 30 * 24 * 3600.0  # seconds

RESULTS: dict[str, Any] = {
    "status": Status,
    "silos": list[admission.SiloListed],
    "operators": list[admission.OperatorListed],
    "requests": list[Invitation],
    "pause": Asked,
    "resume": Asked,
    "abort": Asked,
    "revoke": list[Issued],
    "invite": admission.Invited,
    "approve": None,
}
"""The type of what comes of each."""


def answer_of(path: Path, action: str, wish: Wish) -> str:
    """What comes of it as JSON, for who asks from afar. Raises as `carry_out`."""
    return TypeAdapter(RESULTS[action]).dump_json(carry_out(path, action, wish)).decode()


def carry_out(path: Path, action: str, wish: Wish) -> Any:
    """Does it by the federation file at `path`. Raises GptflError."""
    role = wish.role or "silo"
    match action:
        case "status":
            return status_of(path, file=wish.file)
        case "silos":
            return admission.list_silos(path)
        case "operators":
            return admission.list_operators(path)
        case "requests":
            return admission.requests(path)
        case "pause" | "resume" | "abort":
            return ask(path, action, wish.reason, file=wish.file)
        case "revoke":
            return admission.revoke(path, role=role, name=wish.name, serial=wish.serial, reason=wish.reason)
        case "invite":
            if not 0 < wish.seconds <= _LONGEST_INVITATION:
                raise ConfigError(f"an invitation for {wish.seconds} s", hint="give --days, at most 30")
            return admission.invite(path, role, wish.name, timedelta(seconds=wish.seconds))
        case "approve":
            return admission.approve(path, role, wish.name, wish.key)
    raise AssertionError(action)
