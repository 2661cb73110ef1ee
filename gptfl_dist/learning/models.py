"""The downstream model: three built-in networks, any image classifier of `transformers`, or a function of the user's.

Normalisation layers are group norms: batch statistics of a skewed silo would travel with the weights and hurt every
other silo. (A `transformers` ResNet brings its batch norms along; its buffers are weights like the rest.)
Code is run only where `function` names it; a checkpoint is read from safetensors only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from gptfl_dist.config.task import Model, Task
from gptfl_dist.errors import ModelError, first_line
from gptfl_dist.learning.code import import_function
from gptfl_dist.synthesis.source import quiet_transformers

_log = logging.getLogger(__name__)


def build_model(
    model: Model, task: Task, label_count: int, seed: int, tell: Callable[[str], None] = _log.info
) -> nn.Module:
    """A network on the CPU from float32 (N, *task.shape) to (N, label_count), its random weights fixed by `seed`.

    What of it comes from a public checkpoint, and what does not, is said to `tell`. The global generator is left as it
    was. Raises ModelError where the model cannot be built or does not fit the task.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model.name == "cnn":
            return _cnn(task, label_count)
        if model.name == "convnet":
            return _convnet(task, label_count)
        if model.name == "conv1d-gru":
            return Conv1dGru(task, label_count)
        assert model.source is not None  # the config demands it for the two kinds below
        if model.name == "transformers":
            network = _transformers(model.source, model.pretrained, task, label_count, tell)
        else:
            network = _from_function(model.source, task, label_count)
        _check_output(network, model.source, task, label_count)
        return network


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's output (N, labels) for float32 images, whether it returns a tensor or a `transformers` output."""
    output = model(images)
    scores = getattr(output, "logits", output)
    if not isinstance(scores, torch.Tensor):
        raise ModelError(
            f"the model returned {type(output).__name__}, expected a tensor (N, labels) or an output with .logits",
            hint="return the class scores from the model's forward",
        )
    return scores


def head_of(model: nn.Module) -> nn.Module:
    """The last layer: what a `transformers` model has behind its backbone, else the last module with parameters.

    Raises ModelError where the model has no parameters.
    """
    children = dict(model.named_children())
    backbone = getattr(model, "base_model_prefix", None)
    if backbone in children:
        return nn.ModuleList(child for name, child in children.items() if name != backbone)
    layers = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
    if not layers:
        raise ModelError("the model has no parameters to train", hint="give a network with at least one layer")
    return layers[-1]


def _cnn(task: Task, label_count: int) -> nn.Module:
    """Two convolutions and two linear layers, for small images on a CPU. Average pooling costs half of max pooling."""
    return nn.Sequential(
        nn.Conv2d(task.shape[0], 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * _after(task, "cnn", 2), 64),
        nn.ReLU(),
        nn.Linear(64, label_count),
    )


def _convnet(task: Task, label_count: int) -> nn.Module:
    """The ConvNet of the GPT-FL paper: 3 x [Conv3x3 128 - GroupNorm - ReLU - AvgPool2] - Linear."""
    layers: list[nn.Module] = []
    for channels in (task.shape[0], 128, 128):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(4, 128), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * _after(task, "convnet", 3), label_count))


def _after(task: Task, model: str, halvings: int) -> int:
    """How many places an image has left after it was halved so often. Raises ModelError where none is left."""
    _, height, width = task.shape
    places = (height >> halvings) * (width >> halvings)
    if places == 0:
        found = f"task.size is {task.size}" if task.kind == "image" else f"a spectrogram has {height} x {width} values"
        least = 2**halvings
        hint = f"use task.size {least} or more" if task.kind == "image" else "use more bins, or a smaller hop"
        raise ModelError(f"{found}, too small for the model {model}", hint=hint)
    return places


class Conv1dGru(nn.Module):
    """The speech model of the GPT-FL paper: Conv1d bins - 64 - 128 over time, BiGRU 128, mean over time, Linear.

    Each convolution is followed by a group norm, ReLU and a halving of the time steps.
    """

    def __init__(self, task: Task, label_count: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((task.bins, 64), (64, 128)):
            layers += [nn.Conv1d(before, after, 5, padding=2), nn.GroupNorm(4, after), nn.ReLU()]
            layers += [nn.AvgPool1d(2, ceil_mode=True)]
        self.convolutions = nn.Sequential(*layers)
        self.recurrence = _Gru(128, 128, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, label_count)

    def forward(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """Logits (N, labels) of normalised spectrograms (N, 1, bins, windows)."""
        steps, _ = self.recurrence(self.convolutions(spectrograms.squeeze(1)).transpose(1, 2))
        scores: torch.Tensor = self.head(steps.mean(dim=1))
        return scores


class _Gru(nn.GRU):
    def flatten_parameters(self) -> None:
        """Does not: cuDNN's own copy in one piece would take the parameters out of the buffer that we exchange."""


def _transformers(
    source: str, pretrained: bool, task: Task, label_count: int, tell: Callable[[str], None]
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    quiet_transformers()
    if (Path(source).is_absolute() or source.startswith(".")) and not Path(source).exists():
        raise ModelError(
            f"model.source is {source}, but no such folder exists",
            hint="give a folder that holds a config.json, or a hub id such as microsoft/resnet-18",
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        names = [str(name) for name in config.id2label.values()]  # of the outputs that the checkpoint has
        config.num_labels = label_count
        if hasattr(config, "num_channels"):
            config.num_channels = task.shape[0]
        if hasattr(config, "image_size"):
            config.image_size = task.size if task.kind == "image" else task.shape[1:]
        if not pretrained:
            network: nn.Module = AutoModelForImageClassification.from_config(  # type: ignore[no-untyped-call]  # transformers leaves it out
                config, dtype=torch.float32, trust_remote_code=False
            )
            return network
        network, report = AutoModelForImageClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.source {source} cannot be loaded as an image classifier: {first_line(error)}",
            hint="give a folder or hub id of a transformers image classifier"
            + (" with safetensors weights (pickled .bin files are not read)" if pretrained else " (its config.json)"),
        ) from error
    # Only the head may be drawn anew. A backbone that lost a layer to another shape would train, badly and unseen.
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    lost = sorted({entry[0] for entry in report["mismatched_keys"]} | set(report["missing_keys"]))
    backbone = [key for key in lost if key.startswith(prefix)]
    if backbone:
        raise ModelError(
            f"the weights of model.source {source} do not fit the task: {len(backbone)} tensors of its backbone are "
            f"absent or of another shape, the first {backbone[0]}",
            hint=f"it is given images of {' x '.join(map(str, task.shape))} (channels, height, width): make the task "
            "what the checkpoint was trained with, or set model.pretrained to false",
        )
    if lost:
        tell(
            f"the weights are those of {source} but for {', '.join(lost)}, drawn anew: it has {len(names)} labels, the "
            f"federation {label_count}"
        )
    else:
        tell(f"the weights are those of {source}, with its head, whose outputs it calls {', '.join(names)}")
    return network


def _from_function(source: str, task: Task, label_count: int) -> nn.Module:
    function = import_function(source, "model.source")
    try:
        network = function(label_count=label_count, task=task)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"model.source {source} failed: {type(error).__name__}: {first_line(error)}",
            hint="it is called with the keywords label_count (int) and task (config.Task), and returns an nn.Module",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"model.source {source} returned {type(network).__name__}, expected a torch.nn.Module",
            hint="return the network itself",
        )
    return network


def _check_output(network: nn.Module, source: str, task: Task, label_count: int) -> None:
    """One blank batch through a foreign model, so that a misfit shows here and not at a silo in its first round."""
    images = torch.zeros(2, *task.shape)
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            shape = tuple(logits(network, images).shape)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"model.source {source} cannot take images of shape {tuple(images.shape)}: {first_line(error)}",
            hint="make the task fit the model",
        ) from error
    finally:
        network.train(training)
    if shape != (2, label_count):
        raise ModelError(
            f"model.source {source} returns shape {shape} for 2 images, expected (2, {label_count})",
            hint="give it one output for each label of the federation",
        )
