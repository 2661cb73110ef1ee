"""What the coordinator needs torch for, as a process of its own: random start weights and central evaluation.

    python -m gptfl_dist.run.evaluator    (started by the coordinator, never by hand)

So the coordinator itself stays small, whatever the model.
"""

from __future__ import annotations

import logging
from pathlib import Path

from gptfl_dist.config.at_rest import AtRest
from gptfl_dist.config.plan import Plan
from gptfl_dist.config.silo import Data
from gptfl_dist.errors import GptflError
from gptfl_dist.launch.channel import TrainerEnd, error_to_message
from gptfl_dist.learning.data import ImageSet, load_images
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.seeding import deterministic
from gptfl_dist.observe.logs import to_stderr
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.weights.flat import FlatModel

_log = logging.getLogger("gptfl_dist.run.evaluator")  # of which __name__ is __main__ in its own process
_DEVICE, _THREADS = "cpu", 1


def main() -> None:
    """Serves until the coordinator is gone. What it logs is the run's `evaluator.log`."""
    to_stderr()
    channel = TrainerEnd()
    flat: FlatModel | None = None
    plan: Plan | None = None
    test: ImageSet | None = None
    while True:
        message = channel.receive()
        try:
            deterministic(0, _THREADS)
            if message["type"] == "setup":
                use_at_rest(None if message["at_rest"] is None else AtRest.model_validate(message["at_rest"]))
                plan = Plan.model_validate(message["plan"])
                flat = FlatModel(build_model(plan.model, plan.task, len(plan.labels), plan.seed))
                if message["test_data"] is not None:
                    test = load_images(Data(path=Path(message["test_data"])), plan.task, plan.labels)
                flat.save(Path(message["random_weights"]))
                what = "makes the random start weights alone" if test is None else f"tests on {len(test)} samples"
                _log.info("%s: device %s, threads %d", what, _DEVICE, _THREADS)
                channel.send({"type": "ready"})
            else:
                assert flat is not None
                assert plan is not None
                assert test is not None
                flat.load(Path(message["weights"]))
                result = evaluate(flat.model, test, plan.task, device=_DEVICE)
                channel.send({"type": "evaluated", "accuracy": result.accuracy, "confusion": result.confusion.tolist()})
        except GptflError as error:
            _log.error("%s: %s", type(error).__name__, error)
            channel.send(error_to_message(error))


if __name__ == "__main__":
    main()
