"""Stands between silos and a port of the coordinator with certificates of both, and keeps what passes inside TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable

from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.credentials import serving_context, tls_context

_AT_A_TIME = 1 << 16


class OpenedLine:
    """Takes connections as the coordinator does, and dials it as who came; a context manager.

    `shown` is the coordinator's; `of` gives the credentials of a silo by its name, None where nobody shows any.
    """

    def __init__(self, target: int, shown: Credentials, of: Callable[[str], Credentials] | None) -> None:
        self.passed: list[bytearray] = []
        """All that was said on each connection, one way."""
        self._target = target
        self._shown = shown
        self._of = of
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> OpenedLine:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        context = serving_context(self._shown) if self._of is None else tls_context(self._shown, server=True)
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._speaking(context))

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _speaking(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self._of is not None:
            context.set_alpn_protocols(["h2"])
        return context

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            away, back = await self._dial(writer.get_extra_info("peercert"))
            await asyncio.gather(self._carry(reader, back), self._carry(away, writer))
        writer.close()

    async def _dial(
        self, peer: dict[str, tuple[tuple[str, str], ...]]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._of is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(cadata=self._shown.authority.decode())
        else:
            (uri,) = (value for kind, value in peer["subjectAltName"] if kind == "URI")
            context = tls_context(self._of(uri.rpartition("/")[2]), server=False)
        return await asyncio.open_connection("127.0.0.1", self._target, ssl=self._speaking(context))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = bytearray()
        self.passed.append(said)
        with contextlib.suppress(OSError):
            while piece := await reader.read(_AT_A_TIME):
                said += piece
                writer.write(piece)
                await writer.drain()
        writer.close()
