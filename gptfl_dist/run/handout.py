"""What the silos get of a round's weights: the weights' own file, or what is made of it to travel.

That is their encoded form where a codec is set, with the control variate beside them where there is one. It is written
once, under its digest, and kept while an order may need it. Made again from the same weights, after a restart, it is
the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

from gptfl_dist.aggregation.server import control_of
from gptfl_dist.config.strategy import Strategy
from gptfl_dist.weights import Codec, FlatReader, Layout, WeightsFile, write_weights
from gptfl_dist.weights.beside import joined, with_control


def travelling(layout: Layout, strategy: Strategy) -> Layout:
    """The layout of what the silos get of a model, before it is encoded, and of what they return."""
    return with_control(layout) if strategy.rule == "scaffold" else layout


class HandOut:
    """`path_of` leads from the digest of weights to their file; what is made of them lies in `folder`."""

    def __init__(
        self, folder: Path, path_of: Callable[[str], Path], layout: Layout, codec: Codec, strategy: Strategy
    ) -> None:
        self._folder = folder
        self._path_of = path_of
        self._model = layout
        self._codec = codec
        self._strategy = strategy
        self.layout = travelling(layout, strategy)
        self._made: dict[str, str] = {}  # digest of what is handed out, by that of the weights

    @property
    def _as_they_are(self) -> bool:
        return self._codec.name == "none" and self.layout == self._model

    async def prepare(self, weights: str, state: Path | None) -> str:
        """The digest under which the weights of a digest are handed out. Raises StorageError.

        `state` is the strategy's that belongs to them, None for those that an arm starts from.
        """
        if self._as_they_are:
            return weights
        if weights not in self._made or self._strategy.rule == "scaffold":
            self._made[weights] = await asyncio.to_thread(self._make, weights, state)
        return self._made[weights]

    def path(self, digest: str) -> Path:
        """Where that lies which is handed out under a digest."""
        if self._as_they_are:
            return self._path_of(digest)
        return self._folder / f"{digest}.safetensors"

    def keep_only(self, digests: Collection[str]) -> None:
        """Deletes what was made that nobody is to get any more."""
        self._made = {weights: given for weights, given in self._made.items() if given in digests}
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in digests:
                path.unlink(missing_ok=True)

    def _make(self, digest: str, state: Path | None) -> str:
        incoming = self._folder / "incoming.safetensors"
        with ExitStack() as stack:
            whole: FlatReader = stack.enter_context(WeightsFile(self._path_of(digest)))
            if self._strategy.rule == "scaffold":
                control = stack.enter_context(control_of(self._strategy, self._model, state))
                whole = joined(self._model, whole, control)
            blocks = self._codec.encode(self.layout, whole)
            given = write_weights(incoming, self._codec.layout(self.layout), blocks, durable=False)
        incoming.replace(self.path(given))
        return given
