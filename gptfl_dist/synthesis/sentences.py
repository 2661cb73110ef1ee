"""Sentences from a language model of `transformers`: a causal one or a text-to-text one, from a folder or the hub.

A model whose tokenizer has a chat template is asked as in a chat; any other is given the instruction as it is, which a
plain causal model continues. Only safetensors are read and no code that lies beside them is run. Each call is seeded,
so the same model on the same kind of device gives the same sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptfl_dist.errors import GeneratorError, first_line
from gptfl_dist.synthesis.generator import HUB_ID
from gptfl_dist.synthesis.quality import Draw
from gptfl_dist.synthesis.source import quiet_transformers

_MAX_NEW_TOKENS = 80  # a little more than a text encoder reads
_BATCH = 50  # draws at a time; they depend on it
_HINT = (
    "Give --text-model as a folder that holds a causal or text-to-text model of transformers and its tokenizer, with"
    " safetensors weights, or as a hub id such as owner/name."
)


class TextModel:
    """A loaded language model and its tokenizer."""

    def __init__(self, source: str, device: str) -> None:
        """Loads the model at `source` onto a device of torch, in its own number format there, in float32 on a CPU.

        Raises GeneratorError where there is none, or it is of another kind.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir() and (folder.exists() or not HUB_ID.fullmatch(source)):
            what = "is a file" if folder.exists() else "does not exist"
            raise GeneratorError(f"--text-model is {source}, which {what}; expected a folder", hint=_HINT)
        self._device = device
        try:
            self._load(str(folder) if folder.is_dir() else source)
        except GeneratorError:
            raise
        except Exception as error:  # the loaders of models and tokenizers raise nearly every type there is
            hub = "" if folder.is_dir() else " Check the connection; a gated model also needs `hf auth login`."
            raise GeneratorError(
                f"the text model {source} cannot be loaded: {first_line(error)}", hint=_HINT + hub
            ) from error
        commit = getattr(self._model.config, "_commit_hash", None)
        self.description = (
            f"{source}{f'@{commit}' if commit else ''} on {device}, transformers {version('transformers')}"
        )

    def _load(self, source: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        quiet_transformers()
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        self._answers_apart = bool(config.is_encoder_decoder)
        kind = AutoModelForSeq2SeqLM if self._answers_apart else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(
            source,
            dtype="float32" if self._device == "cpu" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        absent = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
        if absent:
            raise GeneratorError(
                f"{source} is no whole language model: {len(absent)} of its tensors are absent or of another shape, "
                f"the first {sorted(absent)[0]}",
                hint=_HINT,
            )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self._model: Any = model.to(self._device).eval()

    def draw(
        self, instruction: str, count: int, temperature: float, seed: int, report: Callable[[int], None]
    ) -> list[Draw]:
        """`count` answers to an instruction, sampled at a temperature; `report(done)` counts them after each batch.

        All else about the sampling (top-k, top-p) is the model's own choice. Raises GeneratorError where it fails.
        """
        import torch

        device = torch.device(self._device)
        drawn: list[Draw] = []
        try:
            inputs = self._inputs(instruction).to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
                torch.manual_seed(seed)
                while len(drawn) < count:
                    drawn += self._batch(inputs, min(_BATCH, count - len(drawn)), temperature)
                    report(len(drawn))
        except torch.OutOfMemoryError as error:
            raise GeneratorError(
                f"the text model ran out of memory on {device} with {_BATCH} answers at a time",
                hint="take a smaller model, or one in a smaller number format",
            ) from error
        except Exception as error:  # whatever a foreign model or its chat template raises
            raise GeneratorError(f"the text model failed: {first_line(error)}", hint=_HINT) from error
        return drawn

    def _inputs(self, instruction: str) -> Any:
        if not self._tokenizer.chat_template:
            return self._tokenizer(instruction, return_tensors="pt")
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            add_generation_prompt=True,
            enable_thinking=False,  # for templates that know it; the others pass it over
            return_tensors="pt",
            return_dict=True,
        )

    def _batch(self, inputs: Any, count: int, temperature: float) -> list[Draw]:
        settings = self._model.generation_config
        ends = settings.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        padding = settings.pad_token_id
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            num_beams=1,
            temperature=temperature,
            max_new_tokens=_MAX_NEW_TOKENS,
            num_return_sequences=count,
            pad_token_id=next(iter(ends)) if padding is None else padding,
        )
        # A text-to-text model's answer follows one start token, a causal one's the instruction.
        answers = output[:, 1 if self._answers_apart else inputs["input_ids"].shape[1] :].tolist()
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [Draw(text, not ends.isdisjoint(answer)) for text, answer in zip(texts, answers, strict=True)]
