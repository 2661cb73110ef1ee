"""A trainer without torch: `code.script` of the silos under chaos.

Its update follows from the round, its own name and the weights that it received, so the weights after every round are
known bit by bit, however often it was killed on the way. It tells the driver what it does, by datagrams to the socket
that the environment names.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import time
from pathlib import Path

import numpy as np

from gptfl_dist.launch.channel import TrainerEnd
from gptfl_dist.weights import WeightsFile, write_weights

SOCKET = "GPTFL_CHAOS_SOCKET"
SECONDS = (0.05, 0.35)  # of a training; an evaluation takes the least


def main() -> None:
    line = TrainerEnd()
    driver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    driver.connect("\0" + os.environ[SOCKET])  # in Linux's abstract name space: no path that may be too long
    name, layout = "", Path(os.environ["GPTFL_CHAOS_LAYOUT"]).read_text()

    def tell(what: str, round_: int) -> None:
        driver.send(f"{name} {os.getpid()} {what} {round_}".encode())

    while True:
        message = line.receive()
        if message["type"] == "finish":
            return
        if message["type"] == "setup":
            name = message["silo"]["name"]
            tell("setup", 0)
            line.send({"type": "ready", "layout": layout})
            continue
        digest = ""
        round_ = message.get("round", 0)
        samples = 10 + int(name.rpartition("-")[2])
        seed = f"{name}/{round_}"
        tell(message["type"], round_)
        with WeightsFile(Path(message["weights"])) as received:
            flat = np.frombuffer(received.read(0, received.nbytes), "<f4")
            if message["type"] == "train":
                time.sleep(random.Random(seed).uniform(*SECONDS))
                numbers = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
                update = 0.1 * numbers.standard_normal(len(flat), np.float32) - 0.05 * flat
                digest = write_weights(Path(message["update"]), received.layout, [update.astype("<f4").tobytes()])
            else:
                time.sleep(SECONDS[0])
        tell("done", round_)
        line.send(
            {"type": "result", "digest": digest, "samples": samples, "metrics": {"loss": float(abs(flat).mean())}}
        )


if __name__ == "__main__":
    main()
