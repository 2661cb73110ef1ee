"""The operator's commands, here or from afar: the kind of the file that they are given decides.

A federation file, or a run folder, is acted on at once (`run/actions.py`). An operator file names a coordinator, which
is asked over mutual TLS; what it answers is the same, and so are its errors. Commands that are used from time to time
keep their certificate valid: they ask for the next one where the present one is more than a day old.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from pydantic import TypeAdapter, ValidationError

from gptfl_dist.config.document import read_document
from gptfl_dist.config.load import kind_of, load_operator
from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.errors import GptflError, IdentityError, ProtocolError
from gptfl_dist.exchange.base import Wish
from gptfl_dist.run.actions import RESULTS, carry_out
from gptfl_dist.security.authority import SKEW, Credentials, new_key
from gptfl_dist.security.credentials import credentials_for, load_credentials, replace_credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.request import make_request
from gptfl_dist.security.trust import due

if TYPE_CHECKING:
    from gptfl_dist.exchange.grpc.operator_client import OperatorClient

_RENEW_AFTER = timedelta(days=1)


def do(path: Path, action: str, wish: Wish = Wish()) -> Any:  # noqa: B008  (a wish is frozen)
    """Has an action done, by a federation file, a run folder or an operator file; returns `RESULTS[action]`.

    Raises GptflError.
    """
    file = operator_file(path)
    return carry_out(path, action, wish) if file is None else asyncio.run(_ask(path, file, action, wish))


def operator_file(path: Path) -> OperatorFile | None:
    """The operator file at `path`; None where something else is there. Raises ConfigError."""
    if path.is_dir() or kind_of(read_document(path).value) is not OperatorFile:
        return None
    return load_operator(path)


async def _ask(path: Path, file: OperatorFile, action: str, wish: Wish) -> Any:
    async with connected(path, file) as client:
        answer = await client.ask(action, replace(wish, file=str(path)))
        await _keep_valid(file, client)
    return result_in(action, answer)


def connected(path: Path, file: OperatorFile) -> OperatorClient:
    """A line to the coordinator of an operator file, to be opened. Raises IdentityError."""
    from gptfl_dist.exchange.grpc.operator_client import OperatorClient

    side = file.coordinator
    credentials, own = load_credentials(side.authority, side.certificate, side.key, section="coordinator")
    if (own.role, own.name) != (file.role, file.name):
        raise IdentityError(
            f"{side.certificate} is the certificate of {own.uri}, but {path} is that of the {file.role} {file.name}",
            hint="use the set that was made for this file",
        )
    return OperatorClient(side.address, credentials, own)


def result_in(action: str, answer: str) -> Any:
    """What a coordinator answered, of the type that the action has. Raises ProtocolError."""
    try:
        return TypeAdapter(RESULTS[action]).validate_python(_legible(json.loads(answer)))
    except (ValueError, RecursionError, ValidationError):
        raise ProtocolError(
            f"the coordinator's answer to {action} cannot be understood", hint="install matching releases"
        ) from None


def _legible(value: Any) -> Any:
    """Foreign texts without what would steer a terminal."""
    from gptfl_dist.exchange.grpc.convert import legible

    if isinstance(value, str):
        return legible(value)
    if isinstance(value, list):
        return [_legible(each) for each in value]
    return {str(name): _legible(each) for name, each in value.items()} if isinstance(value, dict) else value


async def _keep_valid(file: OperatorFile, client: OperatorClient) -> None:
    """Renews the certificate where that is due. What was asked for is done by then, so a fault here ends nothing."""
    side = file.coordinator
    files = side.authority, side.certificate, side.key
    try:
        with _alone(side.key.parent) as alone:
            if not alone:
                return
            now, own = load_credentials(*files)
            made = x509.load_pem_x509_certificate(now.certificate).not_valid_before_utc + SKEW
            if min(made + _RENEW_AFTER, due(now.certificate)) <= datetime.now(UTC):
                replace_credentials(await _renewed(client, own), *files)
    except (GptflError, OSError):
        return  # the next command tries again, and `gptfl check` tells until when the certificate holds


async def _renewed(client: OperatorClient, own: Identity) -> Credentials:
    key = new_key()
    answer = await client.ask("renew", Wish(request=make_request(own, key).decode()))
    try:
        made = TypeAdapter(dict[str, str]).validate_json(answer)
        return credentials_for(key, made["certificate"].encode(), made["authority"].encode())
    except (ValidationError, KeyError):
        raise ProtocolError("the coordinator sent what is no certificate") from None


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other command renews the certificate in this folder now; it is kept so for the block."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)
