"""Language models of a few thousand parameters that learn, in seconds, to write captions of two digits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptfl_dist.run.prompts import DEFAULT_INSTRUCTION

LABELS = ("three", "seven")
DEFINITIONS = tuple(f"the cardinal number that is the sum of {less} and one" for less in ("two", "six"))
CHAT_TEMPLATE = "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}<assistant>"
_ADJECTIVES = ("bold", "thin", "slanted", "round", "faded", "tall")
_PLACES = ("a wall", "old paper", "a ticket", "a door", "blue tiles", "a shirt")
_SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>", "<user>", "<assistant>")


def _answers(label: str) -> list[str]:
    """What the models learn to write of a label: captions in two forms, and a fault for every third of them."""
    made = itertools.product(("A", "Some"), _ADJECTIVES, _PLACES)
    good = [f"{article} {adjective} {label} stands on {place} ." for article, adjective, place in made]
    faults = [f"A {adjective} zebra stands on {place} ." for adjective, place in zip(_ADJECTIVES, _PLACES, strict=True)]
    faults += [f"A {adjective} {label} stands on" for adjective in _ADJECTIVES]
    faults += [f"A {label} {label} {label} stands on {place} ." for place in _PLACES]
    return [*good, *faults, *faults]


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.WhitespaceSplit()
    vocabulary = dict.fromkeys([*_SPECIAL, *(word for text in texts for word, _ in split.pre_tokenize_str(text))])
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unknown>"))
    inner.pre_tokenizer = split
    pad, start, end, unknown, *_ = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=start, eos_token=end, unk_token=unknown
    )


def _trained(model: Any, rows: Sequence[tuple[list[int], list[int]]], apart: bool, steps: int = 150) -> Any:
    """Trains on (question, answer) token ids; `apart`: a text-to-text model, which reads one and writes the other."""
    import torch

    torch.set_num_threads(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = random.Random(0)

    def padded(rows: Sequence[list[int]], value: int) -> Any:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    for _ in range(steps):
        batch = draw.sample(rows, 32)
        if apart:
            inputs, targets = padded([question for question, _ in batch], 0), [answer for _, answer in batch]
        else:
            inputs = padded([question + answer for question, answer in batch], 0)
            targets = [[-100] * len(question) + answer for question, answer in batch]
        loss = model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=padded(targets, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def write_small_text_models(folder: Path) -> None:
    """Writes the folders `chat` and `causal`, one model with and without a chat template, and `text-to-text`."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    explained = {label: f"{label} ({definition})" for label, definition in zip(LABELS, DEFINITIONS, strict=True)}
    pairs = [
        (DEFAULT_INSTRUCTION.replace("{label}", name), answer)
        for label in LABELS
        for name in (label, explained[label])
        for answer in _answers(label)
    ]
    tokenizer = _tokenizer([*itertools.chain(*pairs)])
    ids = [(tokenizer(question)["input_ids"], [*tokenizer(answer)["input_ids"], 2]) for question, answer in pairs]
    size = len(tokenizer)

    gpt2 = GPT2Config(vocab_size=size, n_positions=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    chat = [([4, *question, 5], answer) for question, answer in ids]
    causal = _trained(GPT2LMHeadModel(gpt2), [*ids, *chat], apart=False)
    causal.save_pretrained(folder / "causal")
    causal.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "causal")
    bart = BartConfig(
        vocab_size=size,
        max_position_embeddings=128,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,  # as in BART itself: an answer begins with the mark that ends it
        forced_eos_token_id=None,
    )
    _trained(BartForConditionalGeneration(bart), ids, apart=True).save_pretrained(folder / "text-to-text")
    tokenizer.save_pretrained(folder / "text-to-text")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
