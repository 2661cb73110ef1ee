"""Says in a side's log what of its certificates ends soon, for as long as it is at work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gptfl_dist.errors import GptflError
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.expiry import ending

_log = logging.getLogger(__name__)

_EVERY = 6 * 3600.0  # seconds


async def warn(credentials: Callable[[], Credentials], *, renewed: bool) -> None:
    """`credentials` gives those that are shown now, which may be `renewed` by themselves. Never returns."""
    while True:
        try:
            for told in ending(credentials(), renewed=renewed):
                _log.warning(told)
        except GptflError as error:
            _log.warning("it is not known when the certificates end: %s", error.message)
        await asyncio.sleep(_EVERY)
