"""Judges from elsewhere: a `transformers` image classifier that knows the labels by name, or a dual encoder like CLIP.

Both come as safetensors from a folder or the hub. Code that lies there is never run, and weights that are not whole
are refused: a head that was drawn at random would judge without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gptfl_dist.errors import ModelError, first_line
from gptfl_dist.synthesis.source import ModelFolder, quiet_transformers

BATCH_SIZE = 32


class Classifier:
    """The probabilities of a classifier's softmax over everything that it knows, of the federation's labels."""

    def __init__(self, found: ModelFolder, labels: Sequence[str], device: str) -> None:
        """Raises ModelError: it cannot be loaded, or its label names do not hold all of `labels`."""
        from transformers import AutoModelForImageClassification

        self._pictures = _Pictures(found, AutoModelForImageClassification, device)
        self._columns = columns_of(self._pictures.model.config.id2label, labels, found.id)

    def probabilities(self, images: np.ndarray, progress: Callable[[int, int], None]) -> np.ndarray:
        """For uint8 images (N, H, W, C) float32 (N, labels); `progress(done, total)` counts batches."""
        answers = self._pictures.each_batch(
            images, lambda model, pixels: model(pixel_values=pixels).logits.softmax(dim=1), progress
        )
        return answers[:, self._columns]


class Encoder:
    """The softmax over the labels of an image's likeness to each label's prompts, at the encoder's own temperature.

    A label is the mean of its prompts' directions (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).
    """

    def __init__(self, found: ModelFolder, prompts: Mapping[str, Sequence[str]], device: str) -> None:
        """`prompts` of each label, in the order of the labels. Raises ModelError: it cannot be loaded, or is none."""
        from transformers import AutoModel, AutoTokenizer

        self._pictures = _Pictures(found, AutoModel, device)
        model = self._pictures.model
        if not all(hasattr(model, name) for name in ("get_text_features", "get_image_features", "logit_scale")):
            raise ModelError(
                f"synthesis.filter.source {found.id} is a {type(model).__name__}, which compares no images with texts",
                hint="name a dual encoder such as CLIP or SigLIP, or set synthesis.filter.judge to classifier",
            )
        tokenizer = _loaded(AutoTokenizer, found, "tokenizer")
        length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

        def direction(texts: Sequence[str]) -> torch.Tensor:
            parts = []
            for start in range(0, len(texts), BATCH_SIZE):
                # SigLIP was trained with texts filled up to the full length; for the others it makes no difference.
                tokens = tokenizer(
                    list(texts[start : start + BATCH_SIZE]),
                    padding="max_length",
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                ).to(model.device)
                parts.append(_features(model.get_text_features(**tokens)))
            return F.normalize(torch.cat(parts).mean(dim=0), dim=0)

        with torch.inference_mode():
            self._labels = torch.stack([direction(texts) for texts in prompts.values()])

    def probabilities(self, images: np.ndarray, progress: Callable[[int, int], None]) -> np.ndarray:
        """For uint8 images (N, H, W, C) float32 (N, labels); `progress(done, total)` counts batches."""

        def compare(model: Any, pixels: torch.Tensor) -> torch.Tensor:
            likeness = _features(model.get_image_features(pixel_values=pixels)) @ self._labels.T
            scale: torch.Tensor = model.logit_scale
            return (likeness * scale.exp()).softmax(dim=1)

        return self._pictures.each_batch(images, compare, progress)


class _Pictures:
    """A model and how it wants its pictures."""

    def __init__(self, found: ModelFolder, kind: Any, device: str) -> None:
        from transformers import AutoImageProcessor

        quiet_transformers()
        model, report = _loaded(
            kind, found, "model", dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        lost = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
        if lost:
            raise ModelError(
                f"synthesis.filter.source {found.id} lacks {len(lost)} tensors of a {type(model).__name__}, "
                f"the first {lost[0]}",
                hint="name a model that was trained as what synthesis.filter.judge says",
            )
        self.model: Any = model.to(torch.device(device)).eval()
        # The variant without torchvision, which is no dependency of ours.
        self._process = _loaded(AutoImageProcessor, found, "image processor", backend="pil")

    def each_batch(
        self,
        images: np.ndarray,
        answer: Callable[[Any, torch.Tensor], torch.Tensor],
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        """What `answer` makes of the model and its pixels, batch by batch, in one array."""
        config = self.model.config
        channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
        parts = []
        total = -(-len(images) // BATCH_SIZE)
        for number in range(total):
            batch = _with_channels(images[number * BATCH_SIZE : (number + 1) * BATCH_SIZE], channels)
            pixels = self._process(images=list(batch), input_data_format="channels_last", return_tensors="pt")
            with torch.inference_mode():
                parts.append(answer(self.model, pixels["pixel_values"].to(self.model.device)).float().cpu())
            progress(number + 1, total)
        return torch.cat(parts).numpy()


def columns_of(names: Mapping[int, str], labels: Sequence[str], judge: str) -> list[int]:
    """The output of a classifier for each label, by name: whatever the case, and by one of several names with commas.

    Raises ModelError where a label has no output, or several.
    """
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for column, name in names.items():
        whole.setdefault(_plain(name), []).append(int(column))
        for part in {_plain(part) for part in name.split(",")}:
            parts.setdefault(part, []).append(int(column))
    found = {label: whole.get(_plain(label)) or parts.get(_plain(label), []) for label in labels}
    unknown = [label for label, columns in found.items() if not columns]
    if unknown:
        known = ", ".join(names.values())
        raise ModelError(
            f"the classifier {judge} of synthesis.filter has no label named {', '.join(unknown)}",
            hint=f"its {len(names)} labels are {known if len(known) <= 300 else known[:300] + '...'}; name the labels "
            "so, or use another judge",
        )
    several = [label for label, columns in found.items() if len(columns) > 1]
    if several:
        raise ModelError(
            f"the classifier {judge} of synthesis.filter has several labels named {', '.join(several)}",
            hint="use another judge, such as cross",
        )
    return [columns[0] for columns in found.values()]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _loaded(kind: Any, found: ModelFolder, what: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(str(found.folder), local_files_only=True, trust_remote_code=False, **settings)
    except Exception as error:  # transformers, its tokenizers and safetensors raise unrelated types
        raise ModelError(
            f"the {what} of synthesis.filter.source {found.id} cannot be loaded: {first_line(error)}",
            hint="name a transformers model with its preprocessor files and safetensors weights",
        ) from error


def _features(output: Any) -> torch.Tensor:
    """The unit vectors (N, D) of an encoder's output."""
    features: torch.Tensor = getattr(output, "pooler_output", output)
    return F.normalize(features, dim=1)


def _with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Grey pictures (N, H, W, 1) in colour, or coloured ones (N, H, W, 3) in grey, where a model sees them so."""
    if images.shape[-1] == channels:
        return images
    if channels == 1:
        grey: np.ndarray = np.rint(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        return grey[..., None]
    return np.repeat(images, channels, axis=-1)
