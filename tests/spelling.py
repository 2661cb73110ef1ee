"""A tokenizer without a vocabulary of its own."""

from __future__ import annotations

from typing import Any


def spelling_tokenizer() -> Any:
    """A CLIP tokenizer whose words are spelled byte by byte, without merges."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=[], model_max_length=16)
