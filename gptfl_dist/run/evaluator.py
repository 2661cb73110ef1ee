"""What the coordinator needs torch for, as a process of its own: random start weights and central evaluation.

    python -m gptfl_dist.run.evaluator    (started by the coordinator, never by hand)

So the coordinator itself stays small, whatever the model.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.silo import Data
from gptfl_dist.errors import GptflError
from gptfl_dist.launch.channel import TrainerEnd, error_to_message
from gptfl_dist.learning.data import ImageSet, load_images
from gptfl_dist.learning.evaluate import Evaluation, evaluate
from gptfl_dist.learning.means import head_from_sums, last_weight, require_means
from gptfl_dist.learning.mixing import write_samples
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.seeding import deterministic
from gptfl_dist.observe.logs import to_stderr
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.run.synthetic import samples_for_silos, synthetic_parts
from gptfl_dist.weights.flat import FlatModel

_log = logging.getLogger("gptfl_dist.run.evaluator")  # of which __name__ is __main__ in its own process
_DEVICE, _THREADS = "cpu", 1


class Tester:
    """The federation's model, which takes weights from files, and the test data."""

    def __init__(self, file: FederationFile, folder: Path) -> None:
        """`folder` is where the federation file lies. Raises DataError or ModelError."""
        deterministic(0, _THREADS)
        self._file = file
        self._folder = folder
        self.notes: list[str] = []  # on the start weights, for the operator
        self._flat = FlatModel(build_model(file.model, file.task, len(file.labels), file.seed, self.notes.append))
        if file.training.first_round == "means":
            require_means(self._flat.model, file.task, len(file.labels))  # or it would be found out in the round
        self._held_out: ImageSet | None = None  # read when it is asked for
        self._test: ImageSet | None = None
        if file.test_data is not None:
            self._test = load_images(Data(path=file.test_data), file.task, file.labels)
        what = "makes the random start weights alone" if self._test is None else f"tests on {len(self._test)} samples"
        _log.info("%s: device %s, threads %d", what, _DEVICE, _THREADS)

    @property
    def parameters(self) -> frozenset[str]:
        """The names of what is trained; all other tensors are buffers."""
        return self._flat.parameters

    def save(self, random_weights: Path) -> None:
        """Writes the weights that the model was built with, unless some were written before: arms began with those.

        Another release of torch might draw others. Raises ModelError where those are of another model.
        """
        if random_weights.exists():
            self._flat.load(random_weights)
        else:
            self._flat.save(random_weights)

    def save_samples(self, path: Path) -> None:
        """Writes the synthetic samples that silos are given. Raises DataError where there is no synthetic set."""
        write_samples(path, samples_for_silos(self._file, self._folder))

    def judge(self, weights: Path) -> Evaluation:
        """How good these weights are on the synthetic data that pre-training holds out. Raises as `test`, DataError."""
        if self._held_out is None:
            _, self._held_out = synthetic_parts(self._file, self._folder)
        return self._evaluate(weights, self._held_out)

    def make_head(self, base: Path, summed: Path, made: Path) -> None:
        """Writes the weights of `base` with a last layer of the sums that were added to its own in `summed`."""
        self._flat.load(summed)
        weight = last_weight(self._flat.model, len(self._file.labels))
        self._flat.load(base)
        head_from_sums(self._flat.model, weight, len(self._file.labels))
        self._flat.save(made)

    def test(self, weights: Path) -> Evaluation:
        """How good these weights are on the test data. Raises ModelError or StorageError."""
        assert self._test is not None
        return self._evaluate(weights, self._test)

    def _evaluate(self, weights: Path, data: ImageSet) -> Evaluation:
        deterministic(0, _THREADS)
        self._flat.load(weights)
        return evaluate(self._flat.model, data, self._file.task, device=_DEVICE)


def main() -> None:
    """Serves until the coordinator is gone. What it logs is the run's `evaluator.log`."""
    to_stderr()
    channel = TrainerEnd()
    tester: Tester | None = None
    while True:
        message = channel.receive()
        try:
            if message["type"] == "setup":
                file = FederationFile.model_validate(message["file"])
                use_at_rest(file.at_rest)
                tester = Tester(file, Path(message["folder"]))
                tester.save(Path(message["random_weights"]))
                if "samples" in message:
                    tester.save_samples(Path(message["samples"]))
                channel.send({"type": "ready", "parameters": sorted(tester.parameters), "notes": tester.notes})
            elif message["type"] == "head":
                assert tester is not None
                tester.make_head(*(Path(message[name]) for name in ("base", "summed", "made")))
                channel.send({"type": "made"})
            elif message["type"] == "judge":
                assert tester is not None
                result = tester.judge(Path(message["weights"]))
                channel.send({"type": "judged", "accuracy": result.accuracy, "loss": result.loss})
            else:
                assert tester is not None
                result = tester.test(Path(message["weights"]))
                told = {"measures": asdict(result.measures), "confusion": result.confusion.tolist()}
                channel.send({"type": "evaluated", **told})
        except GptflError as error:
            _log.error("%s: %s", type(error).__name__, error)
            channel.send(error_to_message(error))


if __name__ == "__main__":
    main()
