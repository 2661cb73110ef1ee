"""A TCP proxy on 127.0.0.1 that cuts connections at a byte, stalls, slows or delays them, or lets them die unseen.

async with TcpProxy(coordinator_port) as proxy:      # the silo dials 127.0.0.1:proxy.port
    proxy.cut_up = proxy.up + 100_000                # reset every connection 100,000 bytes further on
"""

from __future__ import annotations

import asyncio
from typing import Literal, Self

__all__ = ["TcpProxy"]

Way = Literal["up", "down"]


class TcpProxy:
    """`up` counts the bytes from the clients, `down` those to them, over all connections."""

    def __init__(self, target: int) -> None:
        """`target` is the port on 127.0.0.1 to which everything is carried."""
        self.port = 0
        self.up = self.down = 0
        self.cut_up: int | None = None
        """Cuts every connection once `up` has reached this; then None again."""
        self.cut_down: int | None = None
        self.cuts = 0
        self.delay = 0.0
        """Seconds by which each piece of up to 16 KiB is held back: so a connection is slow too."""
        self._target = target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._moved = asyncio.Event()
        self._frozen: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.resume()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def stall(self) -> None:
        """Nothing is carried until `resume`; the connections stay open, and what was sent arrives later."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def freeze(self) -> None:
        """The connections that are open carry nothing from now on and stay open; new ones are not touched."""
        self._frozen |= self._open

    def cut(self) -> None:
        """Resets every connection."""
        self.cuts += 1
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def reached(self, way: Way, count: int) -> None:
        """Returns once so many bytes were carried."""
        while getattr(self, way) < count:
            self._moved.clear()
            await self._moved.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()  # nobody listens there now
            return
        self._open |= {writer, far_writer}
        for task in (
            asyncio.create_task(self._pump(reader, far_writer, "up")),
            asyncio.create_task(self._pump(far_reader, writer, "down")),
        ):
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        try:
            while data := await reader.read(1 << 14):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flowing.wait()
                if writer in self._frozen:
                    continue
                setattr(self, way, getattr(self, way) + len(data))
                self._moved.set()
                limit = getattr(self, f"cut_{way}")
                if limit is not None and getattr(self, way) >= limit:
                    setattr(self, f"cut_{way}", None)
                    self.cut()
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        if writer not in self._frozen:
            self._open.discard(writer)
            writer.close()
