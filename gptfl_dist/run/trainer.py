"""The silo's training: what a silo does with its data, as an object and as the program that an agent starts.

    python -m gptfl_dist.run.trainer      (started by the agent, never by hand)

`Trainer` holds model and data for the whole run. The program serves it over the channel. Nothing but the weights goes
from one round to the next, and what the strategy keeps at the silo (`kept` of the plan): that lies in a file, which the
agent names with the order.

Started as several processes (see `gptfl_dist.learning.group`), they train data-parallel. Rank 0 alone has the channel,
reads the weights and writes the update; each rank reads the data. Rank 0 passes every message on, and while the agent
is silent says so every few seconds, so that a rank that died is missed by then at the latest. What one rank alone may
find wrong, with its data or a file, is raised at all and answered; anything else ends it with its traceback, and the
group with it.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from blake3 import blake3

from gptfl_dist.config.mixing import HandedOut
from gptfl_dist.config.plan import LocalTraining, Plan, batch_count
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.config.task import Model
from gptfl_dist.errors import DataError, GptflError, ModelError, PolicyError, RankLost, TrainerError
from gptfl_dist.launch.channel import ENV, TrainerEnd, encode, error_from_message, error_to_message
from gptfl_dist.launch.folder import Message
from gptfl_dist.learning.code import import_function
from gptfl_dist.learning.data import ImageSet, load_images, split
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.group import ALONE, RENDEZVOUS, Group, open_group, told_by_launcher
from gptfl_dist.learning.keeping import Keeping, bind
from gptfl_dist.learning.local import train
from gptfl_dist.learning.means import add_sums
from gptfl_dist.learning.mixing import blank_samples, mixed, read_samples
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.seeding import derive_seed, deterministic
from gptfl_dist.observe.logs import to_stderr
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.weights import Layout

_log = logging.getLogger("gptfl_dist.run.trainer")  # of which __name__ is __main__ in its own process
_PATIENCE = timedelta(minutes=10)  # that a rank has for another in one step of the training
_SILENCE = 5.0  # seconds until rank 0 tells the others that there is no message


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training returned: BLAKE3 of the update file, training samples, metrics of received and new weights, and
    BLAKE3 of the file of what is kept of it."""

    digest: str
    samples: int
    metrics: Mapping[str, float]
    kept: str = ""


class Trainer:
    """Trains and evaluates one silo's model on its data."""

    def __init__(self, plan: Plan, silo: SiloFile, folder: Path, group: Group = ALONE) -> None:
        """Reads the data and builds the model; `folder` is where the silo file lies, for code of its own.

        Every rank of the group has a Trainer and calls the same methods with the same arguments.
        Raises DataError, ModelError or PolicyError.
        """
        assert silo.data is not None
        self._plan = plan
        self._name = silo.name
        self._group = group
        self._device = str(resolve_device(group.device(silo.device)))
        self._train: Callable[..., dict[str, float]] = train
        if silo.code is not None:
            sys.path.insert(0, str(folder))
            if silo.code.function is not None:
                self._train = _function_of(silo.code.function, group)
        data = load_images(silo.data, plan.task, plan.labels)
        seed = derive_seed(plan.seed, "validation", silo.name)
        self._training, self._validation = split(data, silo.data.validation_share, seed)
        self._mixture: ImageSet | None = None  # of these and the synthetic samples that the silo was given
        model = build_model(_model_of(plan, silo), plan.task, len(plan.labels), plan.seed).to(self._device)
        self.flat = bind(model, plan.kept)
        self._keeping = Keeping(self.flat, plan.kept) if plan.kept else None
        self._require_terms()
        _log.info(
            "%s: device %s, %d samples to train on, %d to validate, %s parameters",
            *(silo.name, self._device, self.samples, len(self._validation), f"{self.layout.parameters:,}"),
        )

    @property
    def layout(self) -> Layout:
        return self.flat.layout

    @property
    def samples(self) -> int:
        """How many samples of its own the silo trains on; neither the validation part nor synthetic ones are among
        them."""
        return len(self._training)

    def require_same_data(self) -> None:
        """Raises DataError at every rank where one read other data than rank 0: they could not share out a batch."""
        if self._group.size == 1:
            return
        digest = blake3(self._training.images.numpy().tobytes())
        digest.update(self._training.labels.numpy().tobytes())
        first = self._group.share(digest.digest())
        with _agreed(self._group):
            if digest.digest() != first:
                raise DataError(
                    f"the data that this rank read is not that of rank 0 ({self.samples} samples to train on)",
                    hint="name data that all ranks see alike, on a file system that they share",
                )

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
        kept: Path | None = None,
        keep: Path | None = None,
        samples: Path | None = None,
    ) -> Trained:
        """Evaluates the received weights on the validation part, trains, and writes the update.

        Seeded by (run seed, round, silo). Without `update` nothing is written: `flat` holds what was trained. `kept` is
        what the silo kept of its last update that counts, None where there is none; what it keeps of this one goes to
        `keep`. `samples` is the file of the plan's synthetic samples, which is read once. Of a group rank 0 alone reads
        files and writes; the others return no digest.
        """
        if self._plan.samples is not None and self._mixture is None:
            self._mix(self._plan.samples, samples)
        _log.info(
            "round %d: %d epochs on %d samples, threads %d", round_, settings.epochs, self.samples, settings.threads
        )
        received = self.evaluate(weights, settings.threads, kept)
        seed = derive_seed(self._plan.seed, "train", round_, self._name)
        if settings.trained == "means":
            model, device = self.flat.model, self._device
            metrics = add_sums(model, self._training, self._plan.task, device=device, threads=settings.threads)
        else:
            metrics = self._train(
                self.flat.model,
                self._training if self._mixture is None else self._mixture,
                settings,
                self._plan.task,
                seed=seed,
                device=self._device,
                progress=self._as_of_own(progress, settings),
                **({"group": self._group} if _takes("group", self._train) else {}),
                **({} if self._keeping is None else self._keeping.terms()),
            )
        if not isinstance(metrics, dict):
            raise TrainerError(
                f"the training function returned {type(metrics).__name__}, expected a dict of metrics",
                hint='return for example {"train_loss": 0.3}',
            )
        self._check_bound()
        if self._keeping is not None:
            self._keeping.note()
        digest = kept_digest = ""
        if update is not None and self._group.leader:
            assert isinstance(weights, Path)
            if keep is not None and self._keeping is not None:
                kept_digest = self._keeping.save(keep)
            digest = self.flat.save_update(weights, update)
        told = {name: float(value) for name, value in metrics.items()}
        if "samples" in told:
            told["samples"] = float(self.samples)
        return Trained(digest, self.samples, {**told, **received.metrics}, kept_digest)

    def evaluate(self, weights: Path | torch.Tensor, threads: int = 1, kept: Path | None = None) -> Trained:
        """Loads weights from a file or a flat buffer, evaluates them on the validation part. The digest is empty.

        `kept` is what the silo kept of its last update, if there is something.
        """
        deterministic(0, threads)
        self._check_bound()
        with _agreed(self._group):
            if isinstance(weights, torch.Tensor):
                self.flat.take(weights)
            elif self._group.leader:
                self.flat.load(weights)
            if self._group.leader and self._keeping is not None:
                self._keeping.read(kept)
        self._group.copy(self.flat.buffer)
        if self._keeping is not None:
            self._keeping.share(self._group)
        result = evaluate(self.flat.model, self._validation, self._plan.task, device=self._device, group=self._group)
        return Trained("", self.samples, {"accuracy": result.accuracy, "loss": result.loss})

    def _mix(self, told: HandedOut, samples: Path | None) -> None:
        """Mixes the synthetic samples into those that are trained on. Raises DataError."""
        given = blank_samples(self._plan.task, told.count, self._training.label_names)
        with _agreed(self._group):
            if self._group.leader:
                assert samples is not None
                read_samples(samples, given)
        for tensor in (given.images, given.labels):
            self._group.copy(tensor)
        self._mixture = mixed(self._training, given, told)
        _log.info("%d synthetic samples are trained on beside them", len(self._mixture) - self.samples)

    def _as_of_own(self, progress: Callable[[int, int], None], settings: LocalTraining) -> Callable[[int, int], None]:
        """Progress as if the silo trained on its own samples alone: how many it mixed in would tell what it lacks."""
        if self._mixture is None:
            return progress
        own = settings.epochs * batch_count(self.samples, settings.batch_size)
        # 0 of 0 is said where it is not known how much there is to do.
        return lambda done, total: progress(done * own // total, own) if total else progress(0, 0)

    def _require_terms(self) -> None:
        """Raises PolicyError where the silo's own training function leaves out what the strategy asks for."""
        for what in ("control", "previous"):
            if what in self._plan.kept and not _takes(what, self._train):
                raise PolicyError(
                    f"code.function takes no argument `{what}`, which the federation's strategy needs",
                    hint="take it and use it as gptfl_dist.learning.local does, or train with the built-in function",
                )

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
        source = silo.model_source or plan.model.source
        assert source is not None
        if silo.model_source is None:
            _check_folder(source)
        # The weights come from the coordinator: of a checkpoint no more than the config is needed here.
        return plan.model.model_copy(update={"source": source, "pretrained": False})
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


def _function_of(name: str, group: Group) -> Callable[..., dict[str, float]]:
    """The silo's own training function. Raises PolicyError where it does not know of the group's other ranks."""
    function = import_function(name, "code.function")
    if group.size > 1 and not _takes("group", function):
        raise PolicyError(
            f"code.function {name} takes no argument `group`, and this silo trains with {group.size} ranks",
            hint="each rank would train by itself; share out the batches as gptfl_dist.learning.parallel does and take "
            "`group`, or give the silo one rank: at most one more than there are silos under mpiexec and torchrun",
        )
    return function


def _takes(argument: str, function: Callable[..., object]) -> bool:
    return argument in inspect.signature(function).parameters


@contextmanager
def _agreed(group: Group) -> Iterator[None]:
    """What one rank may meet by itself in the block: an error of ours at one is raised at every rank.

    The block must hold no call of the group, or the other ranks would wait in it for one that is not there.
    """
    told = b""
    try:
        yield
    except GptflError as error:
        if group.size == 1:
            raise
        where = f"rank {group.rank}: " if group.rank else ""
        told = encode({**error_to_message(error), "message": f"{where}{error.message}"})
    found = [each for each in group.gather(told) if each]
    first = group.share((found or [b""])[0] if group.leader else None)
    if first:
        raise error_from_message(json.loads(first))


def _messages(group: Group, channel: TrainerEnd | None) -> Iterator[Message]:
    """The agent's messages, at every rank, until the last one. Rank 0 alone has a channel."""
    while True:
        message: Message | None = None
        if channel is not None:
            message = channel.receive_within(None if group.size == 1 else _SILENCE) or {"type": "none"}
        message = group.tell(message)
        if message["type"] == "finish":
            return
        if message["type"] != "none":
            yield message


def _serve(group: Group, channel: TrainerEnd | None) -> None:
    """Carries the agent's messages out at every rank, and answers at rank 0."""
    trainer: Trainer | None = None

    def report(done: int, total: int) -> None:
        if channel is not None:
            channel.send({"type": "progress", "done": done, "total": total})

    for message in _messages(group, channel):
        try:
            if message["type"] == "setup":
                with _agreed(group):
                    silo = SiloFile.model_validate(message["silo"])
                    use_at_rest(silo.at_rest)
                    trainer = Trainer(Plan.model_validate(message["plan"]), silo, Path(message["folder"]), group)
                trainer.require_same_data()
                answer: Message = {"type": "ready", "layout": trainer.layout.to_json()}
            else:
                assert trainer is not None
                weights = Path(message["weights"])
                kept = Path(message["kept"]) if "kept" in message else None
                if message["type"] == "train":
                    result = trainer.train(
                        round_=message["round"],
                        settings=LocalTraining.model_validate(message["training"]),
                        weights=weights,
                        update=Path(message["update"]),
                        progress=report,
                        kept=kept,
                        keep=Path(message["keep"]) if "keep" in message else None,
                        samples=Path(message["samples"]) if "samples" in message else None,
                    )
                else:
                    result = trainer.evaluate(weights, kept=kept)
                metrics = dict(result.metrics)
                answer = {"type": "result", "digest": result.digest, "samples": result.samples, "metrics": metrics}
                answer["keep_digest"] = result.kept
        except RankLost:
            raise
        except GptflError as error:
            _log.error("%s: %s", type(error).__name__, error)
            answer = error_to_message(error)
        if channel is not None:
            channel.send(answer)


def main() -> None:
    """Serves a Trainer until the federation is over or the agent is gone. What it logs is the silo's `trainer.log`."""
    to_stderr()
    try:
        channel = os.environ.get(ENV, "")
        if "/" in channel and told_by_launcher() is not None:  # a new folder, where all ranks can meet
            os.environ.setdefault(RENDEZVOUS, f"{channel}/rendezvous")
        group = open_group(_PATIENCE)
        _serve(group, TrainerEnd() if group.leader else None)
        group.close()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: Python on its way out may wait for connections to ranks that wait for this one


if __name__ == "__main__":
    main()
