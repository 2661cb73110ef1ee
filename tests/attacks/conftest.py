"""Attacks, each of which is refused. They use the worlds that the tests of the exchange and of a run are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import gptfl_dist.exchange.grpc  # noqa: F401  (whatever is imported first, grpc is loaded with our list of TLS suites)

sys.path += [str(Path(__file__).parents[1] / room) for room in ("exchange", "run")]
