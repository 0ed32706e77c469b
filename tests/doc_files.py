"""The files that the pages in docs/ speak of, tiny: a base, adapters of two classifiers, examples."""

import json
import os

import jax
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from enmp_jax import models
from enmp_jax.adapters.peft_files import save_adapter

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "a",
    "red",
    "green",
    "blue",
    "good",
    "bad",
    "cheap",
    "offer",
]
BERT = {
    "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, "type_vocab_size": 2,
    "pad_token_id": 0, "architectures": ["BertForSequenceClassification"],
}  # fmt: skip
CLASSES = {"reviews": ("bad", "good"), "spam": ("no", "yes")}


def save_base(path, seed=0):
    """A BERT of random weights, with its tokenizer."""
    tokenizer = Tokenizer(
        tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    backbone = models.build(BERT)
    models.save(path, backbone, backbone.init(jax.random.key(seed)))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    ).save_pretrained(path)


def save_classifier(path, base, seed, rank=2):
    """A LoRA of random weights on queries and values, and its head, as PEFT saves both."""
    random = np.random.default_rng(seed)
    modules = {
        f"bert.encoder.layer.{layer}.attention.self.{name}": (
            random.normal(size=(rank, 16)).astype("f") * 0.4, random.normal(size=(16, rank)).astype("f") * 0.4
        )
        for layer in range(2) for name in ("query", "value")
    }  # fmt: skip
    head = {"weight": random.normal(size=(2, 16)).astype("f"), "bias": np.zeros(2, "f")}
    save_adapter(path, modules, rank, rank, base, heads={"classifier": head}, task_type="SEQ_CLS")


def save_all(root):
    """``models/base``, ``adapters/{reviews,spam}`` and ``data/{reviews,spam}.jsonl`` below ``root``."""
    save_base(root / "models/base")
    (root / "data").mkdir()
    for seed, (task, classes) in enumerate(CLASSES.items()):
        save_classifier(root / "adapters" / task, "models/base", seed)
        random = np.random.default_rng(10 + seed)
        lines = [
            {"text": " ".join(random.choice(WORDS[4:], 6)), "label": classes[i % 2], "n": i}
            for i in range(40)
        ]
        (root / "data" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


if __name__ == "__main__":  # python tests/doc_files.py: here, to try the pages by hand
    from pathlib import Path

    save_all(Path(os.curdir))
