"""A silo's trainer without torch, whose training costs nothing: the `code.script` of every null silo.

It does what a real one does around the training: reads the received weights into memory, changes them (silo number k
adds k to every parameter), and writes the update. It notes when each order came and its own memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from marks import mark
from processes import peak_memory, resident_memory

from gptfl_dist.launch.channel import TrainerEnd
from gptfl_dist.weights import BLOCK, Layout, WeightsFile, overwrite_weights


def main() -> None:
    channel = TrainerEnd()
    layout = Layout.from_json(Path(os.environ["NULL_LAYOUT"]).read_text())
    number = 0
    idle = resident_memory(os.getpid())
    model = memoryview(bytearray(layout.nbytes))
    received = np.empty(BLOCK // 4, np.float32)
    difference = np.empty(BLOCK // 4, np.float32)
    while True:
        message = channel.receive()
        if message["type"] == "finish":
            return
        if message["type"] == "setup":
            number = int(message["silo"]["name"].removeprefix("silo-"))
            channel.send({"type": "ready", "layout": layout.to_json()})
            continue
        mark(what=message["type"], round=message.get("round"), silo=number)
        if message["type"] == "evaluate":
            memory = peak_memory(os.getpid()) - idle, peak_memory(os.getppid())
            mark(what="memory", silo=number, trainer=memory[0], agent=memory[1], agent_pid=os.getppid())
            channel.send({"type": "result", "digest": "", "samples": 100 * number, "metrics": {}})
            continue
        with WeightsFile(Path(message["weights"])) as weights:
            weights.read_into(0, model)
            local = np.frombuffer(model, np.float32)
            local += np.float32(number)

            def update(weights: WeightsFile = weights, local: Any = local) -> Iterator[memoryview]:
                for start in range(0, len(local), len(received)):
                    block = local[start : start + len(received)]
                    base = received[: len(block)]
                    weights.read_into(4 * start, base.data.cast("B"))
                    yield np.subtract(block, base, out=difference[: len(block)]).data

            digest = overwrite_weights(Path(message["update"]), layout, update())
        channel.send({"type": "result", "digest": digest, "samples": 100 * number, "metrics": {}})


if __name__ == "__main__":
    main()
