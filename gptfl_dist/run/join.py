"""How an existing PyTorch loop becomes a silo: `gptfl_dist.join`.

    silo = gptfl_dist.join(model, evaluate=accuracy)     # once the model is built and on its device
    while silo.receive():                                # a round's weights are in the model; False: it is over
        ...                                              # train as before
        silo.deliver(samples=len(train_set))             # hands the update to the agent

A loop over epochs stays as it is with `if not silo.receive(): break` as its first lines. The optimiser and the model's
train or eval mode are the script's own, from round to round.

The script is named under `code.script` of the silo file and started by `gptfl silo`. It needs no certificate and opens
no connection: the agent that started it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfl_dist.errors import LaunchError, TrainerError
from gptfl_dist.launch.channel import TrainerEnd, error_to_message

if TYPE_CHECKING:
    from torch import nn

Metrics = float | Mapping[str, float]


class Silo:
    """A training script's place in the federation. Made by `join`."""

    def __init__(self, model: nn.Module, evaluate: Callable[[], Metrics] | None) -> None:
        from gptfl_dist.learning.group import place
        from gptfl_dist.weights.flat import FlatModel

        rank, size = place()
        if rank > 0:
            raise LaunchError(
                f"rank {rank} of {size} called gptfl_dist.join: rank 0 alone may",
                hint="call it in rank 0 and pass the weights on to the other ranks, or launch one process",
            )
        self._channel = TrainerEnd()
        self._evaluate = evaluate
        self._flat = FlatModel(model)
        self._order: dict[str, Any] | None = None
        self._received: dict[str, float] = {}
        self._samples = 1  # of the last update: the weight of what an evaluation finds
        self.round = 0
        """The number of the round in progress, from 1."""

    def receive(self) -> bool:
        """Waits for the next round and loads its weights into the model. False once the federation is over.

        Raises TrainerError where the model was moved since `join`.
        """
        while True:
            message = self._channel.receive()
            if message["type"] == "setup":
                self._use_at_rest(message["silo"])
                self._channel.send({"type": "ready", "layout": self._flat.layout.to_json()})
            elif message["type"] == "finish":
                return False
            else:
                self._check_bound()
                self._flat.load(Path(message["weights"]))
                self._received = self._metrics()
                if message["type"] == "train":
                    self._order, self.round = message, message["round"]
                    return True
                samples = self._samples if self._received else 0
                self._channel.send({"type": "result", "digest": "", "samples": samples, "metrics": self._received})

    def deliver(self, samples: int, **metrics: float) -> None:
        """Hands over the update: the model's weights minus the received ones, trained on so many samples.

        `metrics` are numbers that the coordinator may see, as far as the silo's policy lets them out.
        Raises TrainerError where no round is open, or the model was moved since `join`.
        """
        if self._order is None:
            raise TrainerError("deliver() without a round", hint="call receive() first, once for each deliver()")
        self._check_bound()
        update = Path(self._order["update"])
        digest = self._flat.save_update(Path(self._order["weights"]), update)
        told = {name: float(value) for name, value in metrics.items()}
        self._order, self._samples = None, int(samples)
        self._channel.send(
            {"type": "result", "digest": digest, "samples": self._samples, "metrics": {**told, **self._received}}
        )

    @staticmethod
    def _use_at_rest(silo: dict[str, Any]) -> None:
        """Reads and writes weights as the silo file says that they are kept."""
        from gptfl_dist.config.silo import SiloFile
        from gptfl_dist.run.at_rest import use_at_rest

        use_at_rest(SiloFile.model_validate(silo).at_rest)

    def _check_bound(self) -> None:
        """Weights loaded into a model that was moved would not reach it, and its update would be zero."""
        if not self._flat.bound:
            error = TrainerError(
                "the model was moved or converted after gptfl_dist.join",
                hint="call join once the model is on its device and has its dtype: model.to(device) comes first",
            )
            self._channel.send(error_to_message(error))
            raise error

    def _metrics(self) -> dict[str, float]:
        """The script's own evaluation of the received weights; a bare number is the accuracy."""
        if self._evaluate is None:
            return {}
        result = self._evaluate()
        if isinstance(result, Mapping):
            return {name: float(value) for name, value in result.items()}
        return {"accuracy": float(result)}


def join(model: nn.Module, *, evaluate: Callable[[], Metrics] | None = None) -> Silo:
    """Makes this script the trainer of the silo that started it.

    `evaluate` is called with the received weights in the model and returns the accuracy on the silo's own validation
    data, or a mapping of metrics. Raises LaunchError where the script was not started by `gptfl silo`, or this is not
    rank 0 of several that were.
    """
    return Silo(model, evaluate)
