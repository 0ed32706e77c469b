"""The tokenizer inside a GGUF file, as the files that transformers reads; no torch and no llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from enmp_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
"""Kinds of tokens (``tokenizer.ggml.token_type``)."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> list[Any]:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only]


_PRE: Mapping[str, Sequence[Any]] = {
    "default": [_BYTES],
    "gpt-2": [_BYTES],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _BYTES],
    "llama3": _split(_LLAMA3),
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}
"""How text is cut before the merges of a byte-level BPE (``tokenizer.ggml.pre``), as llama.cpp does."""


def files(metadata: Mapping[str, Any], source: object) -> dict[str, str]:
    """Names and contents of the tokenizer's files, chat template included.

    Args:
        metadata: of the GGUF file.
        source: the file, for messages.

    Raises:
        UserError: the file has no tokenizer, or one of a kind that is not known.
    """

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, tokens = get("model"), get("tokens")
    if not tokens:
        raise UserError(f"{source} has no tokenizer in it: take a file that has one")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, get("merges", []), get("pre", "default"), source)
    elif kind == "llama":
        tokenizer = _sentencepiece(tokens, get("scores", []), get("add_space_prefix", True))
    else:
        raise UserError(f"{source}: its tokenizer is of the kind {kind!r}; known are gpt2 and llama")
    kinds = get("token_type", [_NORMAL] * len(tokens))
    added = {_UNKNOWN: True, _CONTROL: True, _USER: False}  # -> whether special: left out of decoded text
    for special in (True, False):
        chosen = [t for t, k in zip(tokens, kinds, strict=True) if added.get(k) is special]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in chosen])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {short: get(f"{name}_token_id") for short, name in names.items()}
    special_tokens = {f"{short}_token": tokens[i] for short, i in ids.items() if i is not None}
    begins = kind == "llama" or get("pre") in ("llama3", "llama-bpe")
    if get("add_bos_token", begins) and ids["bos"] is not None:
        bos = tokens[ids["bos"]]
        tokenizer.post_processor = _after(tokenizer.post_processor, bos, ids["bos"])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    template = metadata.get("tokenizer.chat_template")
    return texts | ({"chat_template.jinja": template} if template else {})


def _byte_level(
    tokens: Sequence[str], merges: Sequence[str], pre: str, source: object
) -> tokenizers.Tokenizer:
    if pre not in _PRE:
        raise UserError(
            f"{source}: its tokenizer cuts text in the way {pre!r}; known are {', '.join(sorted(_PRE))}"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    whole = pre in ("llama3", "llama-bpe")  # a word that is a token is not cut further
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole))  # type: ignore[arg-type]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(_PRE[pre]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], space_first: bool) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours, those whose union has the best score are joined first."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [(-score, i, cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    pairs = [pair for _, _, pair in sorted(merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=tokens[0], fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if space_first else steps)
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if space_first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return tokenizer


def _after(given: Any, bos: str, index: int) -> Any:
    """A post-processor that puts the first token in front of what another leaves."""
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
    return template if given is None else processors.Sequence([given, template])
