"""An HTTP proxy that knows CONNECT alone: `python connect_proxy.py HOST PORT`. It is slow, and stalls now and then.

Each piece of data is held up for 50 ms, and once in a while nothing moves for two seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

_DELAY, _STALL, _STALL_EVERY = 0.05, 2.0, 40  # seconds, seconds, pieces
_AT_A_TIME = 1 << 20  # bytes that are under way at most
_pieces = 0


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, address, _ = request.split(" ", 2)
        host, _, port = address.rpartition(":")
        assert method == "CONNECT"
        out_reader, out_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(carry(reader, out_writer), carry(out_reader, writer))
    writer.close()


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    global _pieces
    with contextlib.suppress(OSError):
        while piece := await reader.read(_AT_A_TIME):
            _pieces += 1
            await asyncio.sleep(_DELAY if _pieces % _STALL_EVERY else _STALL)
            writer.write(piece)
            await writer.drain()
    writer.close()


async def main(host: str, port: int) -> None:
    server = await asyncio.start_server(serve, host, port, limit=_AT_A_TIME)
    print("proxy ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
