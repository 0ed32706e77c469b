# pyright: reportArgumentType=false, reportCallIssue=false
"""Makes the golden outputs in this folder from tiny torch models in the exact Hugging Face layouts.

``python tests/data/models/make.py`` writes, per case, a model directory and ``golden.npz`` with
inputs, LoRA factors (of PEFT) and torch's outputs with and without them. The reference tests build the
same cases live.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

HERE = Path(__file__).parent
RANK, ALPHA = 2, 3.0
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}


class Case(NamedTuple):
    """A torch model, inputs for ours, and torch's answer.

    ``layers`` are the modules whose outputs are the hidden states; ``run`` gives features, logits or
    log-likelihoods by name; ``family`` overrides the model type on loading.
    """

    model: Any
    layers: Callable[[Any], Any]
    inputs: dict[str, np.ndarray]
    run: Callable[[Any, dict[str, np.ndarray]], dict[str, torch.Tensor]]
    targets: tuple[str, ...]
    extra_files: Mapping[str, Any] = MappingProxyType({})
    family: str | None = None


def randomise(model: Any, seed: int) -> Any:
    """Weights that make every parameter matter: biases and norms are not at their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("logit_scale"):
                continue
            if p.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                p.copy_(0.2 * noise + ("Gemma" not in type(model).__name__))  # Gemma adds the 1 itself
            elif p.ndim == 1:
                p.copy_(0.2 * noise)
            else:
                p.copy_(noise / np.sqrt(p[0].numel() if p.ndim > 1 else 1))
    return model.eval()


def images(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)}


def texts(
    vocabulary: int, lengths: tuple[int, ...], types: bool = False, pad: int = 1
) -> dict[str, np.ndarray]:
    """Right-padded ids; ids start at 5 so that none is a special one."""
    random, width = np.random.RandomState(1), max(lengths)
    mask = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int32)
    ids = np.where(mask, random.randint(5, vocabulary, mask.shape), pad).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = (mask * (np.arange(width) >= 3)).astype(np.int32)
    return inputs


def tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value).long() for name, value in inputs.items()}


def pixels(image: np.ndarray, mean: Any = 0.5, std: Any = 0.5) -> torch.Tensor:
    x = (torch.tensor(image).double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return x.permute(0, 3, 1, 2).float()


def vit(channels: int = 1, size: int = 8, patch: int = 2) -> Case:
    config = hf.ViTConfig(
        **TINY, image_size=size, patch_size=patch, num_channels=channels, num_labels=5, layer_norm_eps=1e-6
    )

    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        x = pixels(inputs["image"])
        return {"features": model.vit(x).last_hidden_state[:, 0], "logits": model(x).logits}

    return Case(
        randomise(hf.ViTForImageClassification(config), 1),
        lambda m: m.vit.layers,
        images((3, size, size, channels)),
        run,
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    )


CLIP_MEAN, CLIP_STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CLIP_FILES = {"preprocessor_config.json": {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}}


def _clip() -> Any:
    text = {"vocab_size": 40, "max_position_embeddings": 11, "eos_token_id": 39, "bos_token_id": 38}
    config = hf.CLIPConfig(
        text_config=TINY | text, vision_config=TINY | {"image_size": 12, "patch_size": 4}, projection_dim=10
    )
    return randomise(hf.CLIPModel(config), 2)


def clip() -> Case:
    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        out = model.get_image_features(pixels(inputs["image"], CLIP_MEAN, CLIP_STD)).pooler_output
        return {"features": out / out.norm(dim=-1, keepdim=True)}

    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return Case(
        _clip(),
        lambda m: m.vision_model.encoder.layers,
        images((3, 12, 12, 3)),
        run,
        tuple(f"vision_model.*{name}" for name in targets),
        CLIP_FILES,
    )


def clip_text() -> Case:
    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        out = model.get_text_features(torch.tensor(inputs["input_ids"]).long()).pooler_output
        return {"features": out / out.norm(dim=-1, keepdim=True)}

    inputs = texts(38, (7, 4, 9))
    ends = inputs["attention_mask"].sum(axis=1) - 1
    inputs["input_ids"][np.arange(3), ends] = 39
    inputs["input_ids"][inputs["attention_mask"] == 0] = 39  # CLIP pads with its end-of-text token
    return Case(
        _clip(),
        lambda m: m.text_model.encoder.layers,
        {"input_ids": inputs["input_ids"]},
        run,
        ("text_model.*q_proj", "text_model.*v_proj"),
        CLIP_FILES,
        family="clip_text_model",
    )


BERT_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def bert() -> Case:
    config = hf.BertConfig(**TINY, vocab_size=40, max_position_embeddings=16, num_labels=3)

    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        x = tensors(inputs)
        return {"features": model.bert(**x).pooler_output, "logits": model(**x).logits}

    return Case(
        randomise(hf.BertForSequenceClassification(config), 3),
        lambda m: m.bert.encoder.layer,
        texts(40, (7, 4, 1), types=True),
        run,
        BERT_TARGETS,
    )


def minilm() -> Case:
    """A sentence-transformers directory: the bare encoder, mean pooled."""
    config = hf.BertConfig(**TINY, vocab_size=40, max_position_embeddings=16)

    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        x = tensors(inputs)
        mask = x["attention_mask"][..., None].float()
        return {"features": (model(**x).last_hidden_state * mask).sum(1) / mask.sum(1)}

    return Case(
        randomise(hf.BertModel(config), 4),
        lambda m: m.encoder.layer,
        texts(40, (9, 2, 5)),
        run,
        BERT_TARGETS,
        {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}},
    )


def roberta() -> Case:
    config = hf.RobertaConfig(
        **TINY, vocab_size=40, max_position_embeddings=16, num_labels=3, type_vocab_size=1, pad_token_id=1
    )

    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        x = tensors(inputs)
        first = model.roberta(**x).last_hidden_state[:, 0]
        dense = model.classifier.dense
        return {"features": torch.tanh(dense(first)), "logits": model(**x).logits}

    # classifier.dense is not a layer's module: its name must not match
    targets = ("query", "value", ".*encoder.*output.dense", "intermediate.dense")
    return Case(
        randomise(hf.RobertaForSequenceClassification(config), 5),
        lambda m: m.roberta.encoder.layer,
        texts(40, (7, 4, 1)),
        run,
        targets,
    )


LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _classifier(model: Any, seed: int, targets: tuple[str, ...] = LLAMA_TARGETS) -> Case:
    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        x = tensors(inputs)
        last = torch.tensor(inputs["attention_mask"].sum(1) - 1).long()
        hidden = model.base_model(**x).last_hidden_state
        return {"features": hidden[torch.arange(len(last)), last], "logits": model(**x).logits}

    return Case(randomise(model, seed), decoder_layers, texts(40, (23, 7, 1)), run, targets)


def decoder_layers(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _causal(model: Any, seed: int, targets: tuple[str, ...] = LLAMA_TARGETS) -> Case:
    def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        x = tensors(inputs)
        last = torch.tensor(inputs["attention_mask"].sum(1) - 1).long()
        hidden = model.base_model(**x).last_hidden_state
        logits = torch.log_softmax(model(**x).logits, -1)
        scores = logits[:, :-1].gather(-1, x["input_ids"][:, 1:, None])[..., 0] * x["attention_mask"][:, 1:]
        labels = torch.where(x["attention_mask"] > 0, x["input_ids"], -100)
        return {
            "features": hidden[torch.arange(len(last)), last],
            "log_likelihood": torch.nn.functional.pad(scores, (0, 1)),
            "loss": model(**x, labels=labels).loss,
        }

    return Case(randomise(model, seed), decoder_layers, texts(40, (11, 6, 2)), run, targets)


CAUSAL = TINY | {"vocab_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1}


def llama() -> Case:
    config = hf.LlamaConfig(**CAUSAL, num_labels=3, rope_parameters=LLAMA3_ROPE, attention_bias=True)
    return _classifier(hf.LlamaForSequenceClassification(config), 6)


def llama_lm() -> Case:
    return _causal(hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL, mlp_bias=True)), 7)


def mistral() -> Case:
    config = hf.MistralConfig(**CAUSAL, sliding_window=4, head_dim=6)
    return _causal(hf.MistralForCausalLM(config), 8)


def qwen2() -> Case:
    return _causal(hf.Qwen2ForCausalLM(hf.Qwen2Config(**CAUSAL, tie_word_embeddings=True)), 9)


def qwen3() -> Case:
    config = hf.Qwen3Config(**CAUSAL, head_dim=8, num_labels=4)
    return _classifier(hf.Qwen3ForSequenceClassification(config), 10)


def qwen2_window() -> Case:
    """A window in the last of three layers only."""
    config = hf.Qwen2Config(**CAUSAL, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    return _causal(hf.Qwen2ForCausalLM(config), 11)


def gemma() -> Case:
    return _causal(hf.GemmaForCausalLM(hf.GemmaConfig(**CAUSAL, head_dim=6, hidden_act="gelu")), 12)


def gemma2() -> Case:
    """Soft caps so low that they bend most scores and logits."""
    config = hf.Gemma2Config(
        **CAUSAL, head_dim=6, sliding_window=3, query_pre_attn_scalar=10, attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    )  # fmt: skip
    return _causal(hf.Gemma2ForCausalLM(config), 13)


def gemma3() -> Case:
    """Two layers with a window, one without, each kind with rotary angles of its own."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3TextConfig(
        **CAUSAL, head_dim=6, sliding_window=3, query_pre_attn_scalar=10, layer_types=kinds,
        rope_parameters=rope,
    )  # fmt: skip
    return _causal(hf.Gemma3ForCausalLM(config), 14)


PHI3_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def phi3() -> Case:
    return _causal(hf.Phi3ForCausalLM(hf.Phi3Config(**CAUSAL, sliding_window=5)), 15, PHI3_TARGETS)


def phi4() -> Case:
    """Phi-4-mini: tied, half of each head rotated, LongRoPE."""
    rope = {
        "rope_type": "longrope", "rope_theta": 50.0, "partial_rotary_factor": 0.5,
        "short_factor": [1.5], "long_factor": [3.0],
    }  # fmt: skip
    config = hf.Phi3Config(
        **CAUSAL,
        tie_word_embeddings=True,
        rope_parameters=rope,
        original_max_position_embeddings=32,
        num_labels=3,
    )
    return _classifier(hf.Phi3ForSequenceClassification(config), 16, PHI3_TARGETS)


GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 24}


def gpt2() -> Case:
    return _causal(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), 17, GPT2_TARGETS)


# fmt: off
CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        vit, clip, clip_text, bert, minilm, roberta, llama, llama_lm, mistral, qwen2, qwen3, qwen2_window,
        gemma, gemma2, gemma3, phi3, phi4, gpt2,
    )
}
# fmt: on


def outputs(case: Case, model: Any, base: Any) -> dict[str, np.ndarray]:
    """Torch's answers and hidden states after each layer; ``base`` is the model inside PEFT's wrapper."""
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in case.layers(base)
    ]
    with torch.no_grad():
        answer = case.run(base, case.inputs)
    for hook in hooks:
        hook.remove()
    hidden = torch.stack(states[: len(hooks)])
    return {name: value.numpy() for name, value in answer.items()} | {"hidden": hidden.numpy()}


def with_lora(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """PEFT's factors ({key: array}) and torch's outputs with them attached."""
    regex = "|".join(
        rf".*({name.replace('.', chr(92) + '.') if '*' not in name else name})" for name in case.targets
    )
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=regex, init_lora_weights=False)
    torch.manual_seed(0)
    peft_model = get_peft_model(case.model, config).eval()
    factors = {k: v.numpy() for k, v in get_peft_model_state_dict(peft_model).items() if "lora_" in k}
    return factors, outputs(case, peft_model, peft_model.base_model.model)


def write(name: str, case: Case) -> None:
    folder = HERE / name
    case.model.save_pretrained(folder)
    for path, content in case.extra_files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    arrays = {f"input:{k}": v for k, v in case.inputs.items()}
    arrays |= {f"base:{k}": v for k, v in outputs(case, case.model, case.model).items()}
    factors, answers = with_lora(case)
    arrays |= {f"factor:{k}": v for k, v in factors.items()} | {f"lora:{k}": v for k, v in answers.items()}
    np.savez_compressed(folder / "golden.npz", **arrays)


if __name__ == "__main__":
    for case_name, make in CASES.items():
        write(case_name, make())
