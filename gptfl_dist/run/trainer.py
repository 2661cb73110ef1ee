"""The silo's training: what a silo does with its data, as an object and as the program that an agent starts.

    python -m gptfl_dist.run.trainer      (started by the agent, never by hand)

`Trainer` holds model and data for the whole run. The program serves it over the channel; under MPI the rank calls it
directly. Nothing but the weights goes from one round to the next.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfl_dist.config.federation import Model
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import GptflError, ModelError, PolicyError, TrainerError
from gptfl_dist.launch.channel import TrainerEnd, error_to_message
from gptfl_dist.learning.code import import_function
from gptfl_dist.learning.data import load_images, split
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.local import train
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.seeding import derive_seed, deterministic
from gptfl_dist.observe.logs import to_stderr
from gptfl_dist.weights import Layout
from gptfl_dist.weights.flat import FlatModel

_log = logging.getLogger("gptfl_dist.run.trainer")  # of which __name__ is __main__ in its own process


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training returned: BLAKE3 of the update file, training samples, metrics of received and new weights."""

    digest: str
    samples: int
    metrics: Mapping[str, float]


class Trainer:
    """Trains and evaluates one silo's model on its data."""

    def __init__(self, plan: Plan, silo: SiloFile, folder: Path) -> None:
        """Reads the data and builds the model; `folder` is where the silo file lies, for code of its own.

        Raises DataError, ModelError or PolicyError.
        """
        assert silo.data is not None
        self._plan = plan
        self._name = silo.name
        self._device = str(resolve_device(silo.device))
        self._train = train
        if silo.code is not None:
            sys.path.insert(0, str(folder))
            if silo.code.function is not None:
                self._train = import_function(silo.code.function, "code.function")
        data = load_images(silo.data, plan.task, plan.labels)
        seed = derive_seed(plan.seed, "validation", silo.name)
        self._training, self._validation = split(data, silo.data.validation_share, seed)
        model = build_model(_model_of(plan, silo), plan.task, len(plan.labels), plan.seed)
        self.flat = FlatModel(model.to(self._device))
        _log.info(
            "%s: device %s, %d samples to train on, %d to validate, %s parameters",
            *(silo.name, self._device, self.samples, len(self._validation), f"{self.layout.parameters:,}"),
        )

    @property
    def layout(self) -> Layout:
        return self.flat.layout

    @property
    def samples(self) -> int:
        """How many samples the silo trains on; the validation part is not among them."""
        return len(self._training)

    def label_counts(self) -> list[int]:
        """How many samples the silo has of each label, training and validation together."""
        counts = [0] * len(self._plan.labels)
        for data in (self._training, self._validation):
            for label in data.labels.tolist():
                counts[label] += 1
        return counts

    def train(
        self,
        *,
        round_: int,
        settings: LocalTraining,
        weights: Path | torch.Tensor,
        update: Path | None,
        progress: Callable[[int, int], None],
    ) -> Trained:
        """Evaluates the received weights on the validation part, trains, and writes the update.

        Seeded by (run seed, round, silo). Without `update` nothing is written: `flat` holds what was trained.
        """
        _log.info(
            "round %d: %d epochs on %d samples, threads %d", round_, settings.epochs, self.samples, settings.threads
        )
        received = self.evaluate(weights, settings.threads)
        seed = derive_seed(self._plan.seed, "train", round_, self._name)
        metrics = self._train(
            self.flat.model,
            self._training,
            settings,
            self._plan.task,
            seed=seed,
            device=self._device,
            progress=progress,
        )
        if not isinstance(metrics, dict):
            raise TrainerError(
                f"the training function returned {type(metrics).__name__}, expected a dict of metrics",
                hint='return for example {"train_loss": 0.3}',
            )
        self._check_bound()
        digest = ""
        if update is not None:
            assert isinstance(weights, Path)
            digest = self.flat.save_update(weights, update)
        told = {name: float(value) for name, value in metrics.items()}
        return Trained(digest, self.samples, {**told, **received.metrics})

    def evaluate(self, weights: Path | torch.Tensor, threads: int = 1) -> Trained:
        """Loads weights from a file or a flat buffer, evaluates them on the validation part. The digest is empty."""
        deterministic(0, threads)
        self._check_bound()
        if isinstance(weights, Path):
            self.flat.load(weights)
        else:
            self.flat.take(weights)
        result = evaluate(self.flat.model, self._validation, self._plan.task, device=self._device)
        return Trained("", self.samples, {"accuracy": result.accuracy, "loss": result.loss})

    def _check_bound(self) -> None:
        """Weights loaded into a model whose tensors were replaced would not reach it; its update would be zero."""
        if not self.flat.bound:
            raise TrainerError(
                "the training function replaced the model's tensors, so that what it trained cannot be handed over",
                hint="change them in place (an optimiser's step, load_state_dict, copy_), and train on the device that "
                "it is given: no model.to(...), no parameter.data = ..., no new nn.Parameter",
            )


def _model_of(plan: Plan, silo: SiloFile) -> Model:
    """The model to build here: the plan's, with what only the silo's operator may name filled in."""
    if plan.model.name == "function":
        if silo.code is None or silo.code.model is None:
            raise PolicyError(
                f"the federation's model is code ({plan.model.source}), and this silo file names none",
                hint="if you trust that code and have it here, name it under code.model of the silo file",
            )
        return plan.model.model_copy(update={"source": silo.code.model})
    if plan.model.name == "transformers":
        if silo.model_source is not None:
            return plan.model.model_copy(update={"source": silo.model_source})
        assert plan.model.source is not None
        _check_folder(plan.model.source)
    return plan.model


def _check_folder(source: str) -> None:
    """A hub id names the same model everywhere; a path was written for the coordinator's machine.

    Raises ModelError where it is a path and no model lies there here too.
    """
    folder = Path(source)
    if (folder.is_absolute() or source.startswith((".", "~")) or folder.is_dir()) and not (
        folder / "config.json"
    ).is_file():
        raise ModelError(
            f"the federation's model is the folder {source}, and on this machine no model lies there",
            hint="name this machine's copy of the model, or its hub id, under model_source of the silo file",
        )


def main() -> None:
    """Serves a Trainer until the federation is over or the agent is gone. What it logs is the silo's `trainer.log`."""
    to_stderr()
    channel = TrainerEnd()
    trainer: Trainer | None = None
    while True:
        message = channel.receive()
        if message["type"] == "finish":
            return
        try:
            if message["type"] == "setup":
                silo = SiloFile.model_validate(message["silo"])
                trainer = Trainer(Plan.model_validate(message["plan"]), silo, Path(message["folder"]))
                channel.send({"type": "ready", "layout": trainer.layout.to_json()})
                continue
            assert trainer is not None
            weights = Path(message["weights"])
            if message["type"] == "train":
                result = trainer.train(
                    round_=message["round"],
                    settings=LocalTraining.model_validate(message["training"]),
                    weights=weights,
                    update=Path(message["update"]),
                    progress=lambda done, total: channel.send({"type": "progress", "done": done, "total": total}),
                )
            else:
                result = trainer.evaluate(weights)
            channel.send(
                {
                    "type": "result",
                    "digest": result.digest,
                    "samples": result.samples,
                    "metrics": dict(result.metrics),
                }
            )
        except GptflError as error:
            _log.error("%s: %s", type(error).__name__, error)
            channel.send(error_to_message(error))


if __name__ == "__main__":
    main()
