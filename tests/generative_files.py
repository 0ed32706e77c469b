"""A tiny causal model with tokenizer and chat template, adapters and jsonl data, as files."""

import json

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from enmp_jax import models
from enmp_jax.adapters.peft_export import save_adapter
from enmp_jax.config import run_file
from enmp_jax.models import checkpoint

WORDS = "the cat dog sat on mat a red green blue yes no maybe what is colour say sky grass sea"
SPECIAL = ["<s>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


def save_tokenizer(path, chat=True):
    """Byte-level BPE whose tokens are words, with and without a space before them, and single bytes."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in WORDS.split():
        for i in range(1, len(word)):
            if word[: i + 1] not in vocabulary:
                vocabulary.append(word[: i + 1])
                merges.append((word[:i], word[i]))
    for word in WORDS.split():
        vocabulary.append("Ġ" + word)
        merges.append(("Ġ", word))
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab={w: i for i, w in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE if chat else None
    fast.save_pretrained(path)
    return fast


def save_base(path, chat=True, seed=0, **config):
    """Random weights, large enough that scores differ; returns the tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(path, chat)
    settings = {**LLAMA, "vocab_size": len(tokenizer), **config}
    backbone = models.build(settings)
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))

    def draw(x):
        norm = x.ndim < 2 or x.shape == (backbone.n_layers, backbone.width)
        return (np.ones(x.shape) if norm else random.normal(size=x.shape, scale=0.3)).astype("f")

    params = jax.tree.map(draw, shapes)
    models.save(path, backbone, params)
    return tokenizer


def save_experts(path, base, names, rank=2, scale=0.4, trained_on=None):
    """Random adapters of all query, value and down projections; ``trained_on`` is what they call the base."""
    backbone = models.build(checkpoint.read_config(base))
    for seed, name in enumerate(names):
        random = np.random.default_rng(seed + 1)
        modules = {
            template.format(layer): (
                random.normal(size=(rank, inner)).astype("f") * scale,
                random.normal(size=(out, rank)).astype("f") * scale,
            )
            for template, (out, inner) in backbone.modules.items()
            if template.endswith(("q_proj", "v_proj", "down_proj"))
            for layer in range(backbone.n_layers)
        }
        save_adapter(path / name, modules, rank, rank, trained_on or base.name, task_type="CAUSAL_LM")


def completions(n, seed=0):
    """Records of prompts and answers, no two alike."""
    random = np.random.default_rng(seed)
    nouns, colours = ["cat", "dog", "mat", "sky", "grass", "sea"], ["red", "green", "blue"]
    return [
        {
            "prompt": f"what colour is the {nouns[random.integers(6)]} {seed}.{i}?",
            "answer": " ".join(random.choice(colours, random.integers(1, 5))),
        }
        for i in range(n)
    ]


def choices(n, seed=0, answered=True):
    """Records of prompts with two to four choices of different lengths."""
    random = np.random.default_rng(seed)
    all_choices = ["yes", "no", "maybe", "the cat sat on the mat"]
    found = []
    for i in range(n):
        given = [str(c) for c in random.permutation(all_choices)[: random.integers(2, 5)]]
        record = {"prompt": f"is the sky {seed}.{i} blue?", "choices": given}
        found.append(record | ({"answer": int(random.integers(len(given)))} if answered else {}))
    return found


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_splits(path, make, sizes=(("train", 24), ("search", 9), ("selection", 6), ("test", 7))):
    """``path/SPLIT.jsonl`` with records of ``make(n, seed)``."""
    for seed, (split, n) in enumerate(sizes):
        write_jsonl(path / f"{split}.jsonl", make(n, seed))


def run_text(tasks, search="", evaluation="", train="", strategy="random"):
    """A run file of the base ``base``; tasks: name -> lines of its data besides source and splits."""
    lines = ["base: {model: base}", "tasks:"]
    splits = "train: train, search: search, selection: selection, test: test"
    for name, more in tasks.items():
        data = f"{{source: 'jsonl:{name}', {splits}{more}}}"
        lines.append(f"  - {{name: {name}, adapter: experts/{name}, data: {data}}}")
    lines += [
        "merge: {method: sum, scale: 0.5}",
        f"search: {{strategy: {strategy}, population: 4, generations: 2, finalists: 2{search}}}",
        f"evaluation: {{batch_size: 4{evaluation}}}",
        f"train: {{steps: 3, batch_size: 4{train}}}",
    ]
    return "\n".join(lines) + "\n"


def save_all(path):
    """Base, data and adapters of a task of completions, ``say``, and one of choices, ``pick``."""
    save_base(path / "base")
    save_experts(path / "experts", path / "base", ("say", "pick"))
    write_splits(path / "say", completions)
    write_splits(path / "pick", choices)
    return path


def loaded_run(root, tasks=("say", "pick"), choice=", choice_norm: token", **more):
    """The run file of what ``save_all`` wrote; other arguments as in ``run_text``."""
    data = {"say": "", "pick": choice}
    path = root / "run.yaml"
    path.write_text(run_text({name: data[name] for name in tasks}, **more))
    return run_file.load(path)
