"""What the silos get of a round's weights: the weights' own file, or with a codec their encoded form.

The encoded form is written once, under its digest, and kept while an order may need it. Made again from the same
weights, after a restart, it is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

from gptfl_dist.weights import Codec, Layout, WeightsFile, write_weights


class HandOut:
    """`path_of` leads from the digest of weights to their file; encoded forms lie in `folder`."""

    def __init__(self, folder: Path, path_of: Callable[[str], Path], layout: Layout, codec: Codec) -> None:
        self._folder = folder
        self._path_of = path_of
        self._layout = layout
        self._codec = codec
        self._made: dict[str, str] = {}  # digest of what is handed out, by that of the weights

    async def prepare(self, weights: str) -> str:
        """The digest under which the weights of a digest are handed out. Raises StorageError."""
        if self._codec.name == "none":
            return weights
        if weights not in self._made:
            self._made[weights] = await asyncio.to_thread(self._encode, weights)
        return self._made[weights]

    def path(self, digest: str) -> Path:
        """Where that lies which is handed out under a digest."""
        if self._codec.name == "none":
            return self._path_of(digest)
        return self._folder / f"{digest}.safetensors"

    def keep_only(self, digests: Collection[str]) -> None:
        """Deletes the encoded forms that nobody is to get any more."""
        self._made = {weights: given for weights, given in self._made.items() if given in digests}
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in digests:
                path.unlink(missing_ok=True)

    def _encode(self, digest: str) -> str:
        incoming = self._folder / "incoming.safetensors"
        with WeightsFile(self._path_of(digest)) as weights:
            encoded = self._codec.encode(self._layout, weights)
            given = write_weights(incoming, self._codec.layout(self._layout), encoded, durable=False)
        incoming.replace(self.path(given))
        return given
