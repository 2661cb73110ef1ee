"""What each role may ask of a coordinator over the network, in one table, which `require` alone reads.

The certificate says the role. Whoever works on the coordinator's machine needs none: they hold the federation file, the
run folder and the authority's keys, so what stands here for nobody is theirs alone. To let somebody in who may
themselves let others in would hand the keys on: whoever stole an operator's key could leave a second one behind.
"""

from __future__ import annotations

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.identity import Identity, Role

NOBODY: frozenset[Role] = frozenset()
SILO: frozenset[Role] = frozenset({"silo"})
OPERATOR: frozenset[Role] = frozenset({"operator"})
LOOKING: frozenset[Role] = frozenset({"operator", "observer"})
ANYBODY: frozenset[Role] = frozenset({"silo", "operator", "observer"})

MAY: dict[str, frozenset[Role]] = {
    "take part": SILO,  # the methods of Exchange: orders, weights, updates
    "ask for health": ANYBODY,
    "renew": LOOKING,  # their own certificate; a silo's is renewed as it takes part
    "status": LOOKING,
    "silos": LOOKING,
    "operators": LOOKING,
    "requests": LOOKING,
    "pause": OPERATOR,
    "resume": OPERATOR,
    "abort": OPERATOR,
    "revoke": OPERATOR,
    "invite": OPERATOR,  # a silo or an observer
    "approve": OPERATOR,
    "invite an operator": NOBODY,
    "approve an operator": NOBODY,
}
"""The roles that may, of each thing that can be asked."""

LOOKS = frozenset(action for action, roles in MAY.items() if roles >= LOOKING)
"""What changes nothing but the certificate of who asks."""


def require(identity: Identity, action: str) -> None:
    """Raises IdentityError where this identity may not do this; it says what that would take."""
    roles = MAY[action]
    if identity.role in roles:
        return
    takes = f"takes a certificate of the role {' or '.join(sorted(roles))}" if roles else "is done on its machine alone"
    raise IdentityError(f"{_who(identity)} may not {_in_words(action)} at this coordinator: that {takes}")


def _who(identity: Identity) -> str:
    return identity.uri if identity.role == "coordinator" else f"the {identity.role} {identity.name}"


def _in_words(action: str) -> str:
    return f"ask for {action}" if action in ("status", "silos", "operators", "requests") else action
