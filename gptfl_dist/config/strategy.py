"""The section `strategy`: what a round's updates come to, and what the server makes of that."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from gptfl_dist.config.base import Section

Momentum = Annotated[float, Field(ge=0, lt=1)]

ROBUST = {"median": 0, "trimmed_mean": 0, "krum": 2, "multi_krum": 2, "geometric_median": 0}
"""The rules that bear f malicious silos of n, each with c where it needs n > 2f + c; see `aggregation.robust`."""
PLAIN = ("mean", "fednova", "scaffold")
"""The rules that are means of all updates, and bear no malicious silo."""
RULES = (*PLAIN, *ROBUST)
GROUP = "gptfl_dist.strategies"
"""The entry points under which packages offer rules of their own."""


class Strategy(Section):
    """How the updates of a round become the next weights: a rule makes one update of them, the server steps by that.

    The server's optimiser is that of FedOpt (arXiv:2003.00295, algorithm 2).
    """

    rule: str = Field(default="mean", json_schema_extra={"examples": [*RULES, "package.module:function"]})
    malicious: NonNegativeInt | None = None
    clip_norm: PositiveFloat | None = None
    optimizer: Literal["sgd", "adam", "yogi", "adagrad"] = "sgd"
    learning_rate: PositiveFloat | None = None
    momentum: Momentum | None = None
    second_momentum: Momentum = 0.99
    adaptivity: PositiveFloat = 1e-3

    @field_validator("rule")
    @classmethod
    def _known(cls, rule: str) -> str:
        """Code is not imported here: whoever reads the file need not have it."""
        if rule in RULES or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", rule):
            return rule
        installed = sorted(entry_points(group=GROUP).names)
        if rule not in installed:
            known = ", ".join([*RULES, *installed])
            raise ValueError(f"expected one of {known}, or a function of your own as package.module:function")
        return rule

    @model_validator(mode="after")
    def _malicious_where_borne(self) -> Self:
        if self.malicious is not None and self.rule in PLAIN:
            raise ValueError(
                f"malicious is {self.malicious}, but rule is {self.rule}, which bears no malicious silo: "
                f"take {', '.join(ROBUST)}, or leave malicious out"
            )
        return self

    @property
    def borne(self) -> int:
        """How many malicious silos the rule is to bear in a round."""
        return 1 if self.malicious is None else self.malicious

    @property
    def fewest(self) -> int:
        """How many updates the rule needs to bear them; 1 where it bears none."""
        return 2 * self.borne + ROBUST[self.rule] + 1 if self.rule in ROBUST else 1

    @property
    def step(self) -> float:
        """The learning rate; where it is left out, that of plain averaging, or a small one for adaptive optimisers."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == "sgd" else 0.01

    @property
    def first_momentum(self) -> float:
        """The momentum; where it is left out, what is usual with the optimiser."""
        if self.momentum is not None:
            return self.momentum
        return 0.9 if self.optimizer in ("adam", "yogi") else 0.0
