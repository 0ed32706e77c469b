"""The tokenizer of a base model's directory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from enmp_jax.errors import UserError, one_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer, which pads and truncates on the right.

    Raises:
        UserError: its files cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), padding_side="right", truncation_side="right")
    except Exception as error:  # the tokenizers package raises Exception itself
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({one_line(error)})") from None


def tokenizer_digest(directory: Path) -> str:
    """Hash of the tokenizer's files."""
    digest = hashlib.blake2b(digest_size=16)
    for name in TOKENIZER_FILES:
        if (directory / name).exists():
            content = (directory / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
