"""A tokenizer with a token for every letter, for models with a vocabulary of 64."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split

LETTERS = ["<s>", "<unk>", *list(" abcdefghijklmnopqrstuvwxyz0123456789.,:;+-=()?'")]


def save_tokenizer(path: Path) -> None:
    """Save the tokenizer beside a model."""
    tokenizer = Tokenizer(WordLevel({letter: i + 1 for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(path)
