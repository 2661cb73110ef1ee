"""Keeps a silo's certificate valid: asks for the next one in time, over the connection that the present one opened.

The new key is made here and never leaves this machine. Where somebody else replaces the files, as a tool of the
institution's own authority does, they are read anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from gptfl_dist.errors import GptflError
from gptfl_dist.exchange.base import Disconnected
from gptfl_dist.exchange.grpc.client import GrpcSiloExchange
from gptfl_dist.security.authority import Credentials, new_key
from gptfl_dist.security.credentials import credentials_for, load_credentials, replace_credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.request import make_request
from gptfl_dist.security.trust import FileTrust, due

_log = logging.getLogger(__name__)

_LOOK_EVERY = 10.0  # seconds between two looks at the files, and at the clock, which may be set meanwhile
_PAUSE = timedelta(seconds=2)  # after a try that did not get through; grows to an hour
_LONGEST_PAUSE = timedelta(hours=1)


async def keep_valid(exchange: GrpcSiloExchange, own: Identity, files: tuple[Path, Path, Path]) -> None:
    """Renews the exchange's credentials whenever that is due, and saves them in `files`: authority, certificate, key.

    Never returns.
    """
    pause, next_try = _PAUSE, datetime.min.replace(tzinfo=UTC)
    files_of = FileTrust(files[1], lambda: load_credentials(*files)[0])
    while True:
        if (found := files_of.credentials()).certificate != exchange.credentials.certificate:
            _log.info("the certificate was replaced%s", _until(found))
            await exchange.show(found)
        wait = (max(due(exchange.credentials.certificate), next_try) - datetime.now(UTC)).total_seconds()
        if wait > 0:
            await asyncio.sleep(min(wait, _LOOK_EVERY))
            continue
        try:
            renewed = await _renewed(exchange, own)
        except (Disconnected, GptflError) as error:
            if isinstance(error, GptflError):
                _log.warning("the certificate is not renewed: %s%s", error.message, _until(exchange.credentials))
            next_try = datetime.now(UTC) + pause * random.uniform(0.5, 1.0)
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        pause = _PAUSE
        replace_credentials(renewed, *files)
        files_of.credentials()
        _log.info("the certificate was renewed%s", _until(renewed))
        await exchange.show(renewed)


async def _renewed(exchange: GrpcSiloExchange, own: Identity) -> Credentials:
    key = new_key()
    certificate, authority = await exchange.renew(make_request(own, key))
    return credentials_for(key, certificate, authority)


def _until(credentials: Credentials) -> str:
    end = x509.load_pem_x509_certificate(credentials.certificate).not_valid_after_utc
    return f"; it holds until {end:%F %T} UTC"
