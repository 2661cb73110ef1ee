"""The least that a round can cost: one gRPC stream a silo with mutual TLS, raw bytes, nothing written, nothing checked.

    python floor.py FOLDER      (started by exchange.py; FOLDER holds a set of certificates a process)

Each round every client receives the whole model in chunks of 2 MiB and sends it all back; the server multiplies each
chunk by the client's weight and adds it in place into one float32 buffer. NULL_PARAMETERS, NULL_SILOS and NULL_ROUNDS
say how much of it. The server notes the end of each round in NULL_MARKS.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from marks import mark

CHUNK = 2 << 20
PARAMETERS, SILOS, ROUNDS = (int(os.environ[name]) for name in ("NULL_PARAMETERS", "NULL_SILOS", "NULL_ROUNDS"))
OPTIONS = [("grpc.max_send_message_length", CHUNK + 4096), ("grpc.max_receive_message_length", CHUNK + 4096)]


def read(folder: Path, who: str) -> tuple[bytes, bytes, bytes]:
    """(authority, key, certificate) of a process, as PEM."""
    authority, key, certificate = ((folder / who / f"{name}.pem") for name in ("authority", "key", "certificate"))
    return authority.read_bytes(), key.read_bytes(), certificate.read_bytes()


class Server:
    def __init__(self) -> None:
        self.model = np.random.default_rng(7).standard_normal(PARAMETERS, dtype=np.float32)
        self.sum = np.zeros(PARAMETERS, np.float32)
        self.joined = self.arrived = self.round = 0
        self.changed = asyncio.Condition()

    async def train(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        number = int(await anext(aiter(requests)))
        async with self.changed:
            self.joined += 1
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.joined == SILOS)
        weight = np.float32(100 * number)
        view = memoryview(self.model).cast("B")
        for round_ in range(1, ROUNDS + 1):
            for start in range(0, len(view), CHUNK):
                yield bytes(view[start : start + CHUNK])
            place = 0
            async for message in requests:
                block = np.frombuffer(message, np.float32)
                self.sum[place : place + block.size] += block * weight
                place += block.size
                if place == PARAMETERS:
                    break
            async with self.changed:
                self.arrived += 1
                if self.arrived == SILOS:
                    np.divide(self.sum, np.float32(100 * SILOS * (SILOS + 1) / 2), out=self.model)
                    self.sum[:] = 0
                    self.arrived, self.round = 0, round_
                    mark(what="round", round=round_)
                    self.changed.notify_all()
                else:
                    await self.changed.wait_for(lambda r=round_: self.round >= r)


async def serve(folder: Path) -> None:
    handler = grpc.stream_stream_rpc_method_handler(Server().train)
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor.Floor", {"Train": handler}),))
    authority, key, certificate = read(folder, "coordinator")
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    (folder / "port").write_text(str(port))
    await server.wait_for_termination()


async def join(folder: Path, number: int) -> None:
    authority, key, certificate = read(folder, f"silo-{number}")
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    buffer = np.empty(PARAMETERS, np.float32)
    while not (folder / "port").exists() or not (folder / "port").read_text():
        await asyncio.sleep(0.05)
    async with grpc.aio.secure_channel(f"localhost:{(folder / 'port').read_text()}", credentials, OPTIONS) as channel:
        call = channel.stream_stream("/floor.Floor/Train")()
        await call.write(str(number).encode())
        view = memoryview(buffer).cast("B")
        for _ in range(ROUNDS):
            place = 0
            while place < len(view):
                message = await call.read()
                view[place : place + len(message)] = message
                place += len(message)
            buffer += np.float32(number)
            for start in range(0, len(view), CHUNK):
                await call.write(bytes(view[start : start + CHUNK]))
        await call.done_writing()
        await call.read()  # until the server ended the stream


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) == 3:
        number = int(sys.argv[2])
        asyncio.run(join(folder, number) if number else serve(folder))
        return
    command = [sys.executable, __file__, str(folder)]
    server = subprocess.Popen([*command, "0"])
    try:
        clients = [subprocess.Popen([*command, str(number)]) for number in range(1, SILOS + 1)]
        sys.exit(max(client.wait() for client in clients))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
