"""The watch: each rank knows at once when the job has to end, whatever the launcher does about it.

Every rank holds a TCP connection to rank 0 that carries one line at its end: the exit code. When a process is killed,
the kernel ends its connections, so a connection that ends without that line tells of a rank that is gone, and one that
tells of an error ends the job with that rank's exit code. Nothing else travels here, and nothing is sent while all is
well; whoever does not know the token, which the ranks get from rank 0 through the collective, is not listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from typing import Any

from gptfl_dist.errors import GptflError, LaunchError
from gptfl_dist.exchange.collective.base import Collective

_log = logging.getLogger(__name__)

_TIME_TO_SAY_SO = 3.0  # seconds for a line of this kind
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, and how many: of a node that is down


class RankEnded(GptflError):
    """Another rank ended with an error that it has told itself."""


class Watch:
    """This rank's part. `lost` is done, with what is to be raised, once another rank ended before its time."""

    def __init__(self, collective: Collective) -> None:
        self.lost: asyncio.Future[GptflError] = asyncio.get_running_loop().create_future()
        self._collective = collective
        self._host = socket.gethostname()
        self._token = ""
        self._lines: dict[int, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._listening: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Rank 0 tells the others where it is, and they connect."""
        if self._collective.rank == 0:
            await self._serve()
        else:
            await self._connect()

    async def end(self, exit_code: int) -> None:
        """Tells the other side how this rank ends."""
        for writer in self._lines.values():
            with contextlib.suppress(OSError, TimeoutError):
                writer.write(_line({"end": exit_code}))
                await asyncio.wait_for(writer.drain(), _TIME_TO_SAY_SO)
                writer.close()
        for task in self._listening:
            task.cancel()
        if self._server is not None:
            self._server.close()

    async def _serve(self) -> None:
        self._token = secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self._server = await asyncio.start_server(self._admit, sock=listener)
        told = {"type": "watch", "host": self._host, "port": listener.getsockname()[1], "token": self._token}
        for rank in range(1, self._collective.size):
            await self._collective.say(rank, told)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), _TIME_TO_SAY_SO))
            if not secrets.compare_digest(str(hello["token"]), self._token):
                raise ValueError
            rank, host = int(hello["rank"]), str(hello["host"])
            writer.write(_line({"token": self._token}))
        except (ValueError, TypeError, KeyError, OSError, TimeoutError):
            writer.close()
            return
        self._hold(rank, host, reader, writer)

    async def _connect(self) -> None:
        _, told = await self._collective.hear()
        hosts = ["127.0.0.1"] if told["host"] == self._host else []
        for host in [*hosts, told["host"]]:
            with contextlib.suppress(OSError, ValueError, KeyError, TimeoutError):
                async with asyncio.timeout(_TIME_TO_SAY_SO):
                    reader, writer = await asyncio.open_connection(host, told["port"])
                    hello = {"token": told["token"], "rank": self._collective.rank, "host": self._host}
                    writer.write(_line(hello))
                    if json.loads(await reader.readline())["token"] == told["token"]:
                        self._hold(0, told["host"], reader, writer)
                        return
        await asyncio.sleep(_TIME_TO_SAY_SO)  # where rank 0 has ended at once, this rank ends with it meanwhile
        _log.warning(
            "rank %d on %s cannot reach rank 0 at %s:%d; if a rank is killed, the launcher alone can end the job",
            *(self._collective.rank, self._host, told["host"], told["port"]),
        )

    def _hold(self, rank: int, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line: socket.socket = writer.get_extra_info("socket")
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._lines[rank] = writer
        task = asyncio.create_task(self._listen(rank, host, reader))
        self._listening.add(task)

    async def _listen(self, rank: int, host: str, reader: asyncio.StreamReader) -> None:
        said = b""
        with contextlib.suppress(OSError):
            said = await reader.readline()
        if self.lost.done():
            return
        if not said:
            self.lost.set_result(
                LaunchError(
                    f"rank {rank} on {host} is gone: it was killed, or its node is down",
                    hint="the same command goes on from the round that the run is in",
                )
            )
        elif code := int(json.loads(said)["end"]):
            ended = RankEnded(
                f"rank {rank} on {host} ended with exit code {code}", hint="the output of the job has its message"
            )
            ended.exit_code = code
            self.lost.set_result(ended)


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
