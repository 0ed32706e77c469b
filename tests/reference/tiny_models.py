"""Tiny random transformers models and PEFT adapters on them, made on the spot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Family(NamedTuple):
    """A model class, its configuration, LoRA targets and inputs for both sides."""

    model: Any
    config: Any
    targets: list[str]
    task_type: str | None
    inputs: Mapping[str, np.ndarray]  # for our backbone
    tensors: Mapping[str, torch.Tensor]  # for transformers


def _images() -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    values = (pixels / 255.0 - np.asarray(_MEAN)) / np.asarray(_STD)
    return {"image": pixels}, {
        "pixel_values": torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)
    }


def _tokens() -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    ids = np.random.default_rng(0).integers(3, 60, (3, 7)).astype(np.int32)
    mask = np.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    arrays = {"input_ids": ids, "attention_mask": mask}
    return arrays, {name: torch.tensor(value, dtype=torch.long) for name, value in arrays.items()}


def family(name: str) -> Family:
    """One of clip, llama, bert."""
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    if name == "clip":
        inputs, tensors = _images()
        config = transformers.CLIPVisionConfig(
            hidden_size=24, image_size=16, patch_size=8, projection_dim=10, **sizes
        )
        model = transformers.CLIPVisionModelWithProjection
        return Family(model, config, ["q_proj", "fc1"], None, inputs, tensors)
    inputs, tensors = _tokens()
    sizes |= {"hidden_size": 24, "vocab_size": 60, "num_labels": 3, "pad_token_id": 0}
    if name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=1, **sizes)
        model = transformers.LlamaForSequenceClassification
        return Family(model, config, ["k_proj", "down_proj"], "SEQ_CLS", inputs, tensors)
    config = transformers.BertConfig(**sizes)
    model = transformers.BertForSequenceClassification
    return Family(model, config, ["query", "attention.output.dense"], "SEQ_CLS", inputs, tensors)


def make_base(name: str, path: Path) -> Path:
    """A random base model in float32, weights large enough for deltas to show in the outputs."""
    torch.manual_seed(0)
    made = family(name)
    model = made.model(made.config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(path))
    return path


def load_base(name: str, path: Path) -> torch.nn.Module:
    """The base in evaluation mode."""
    return family(name).model.from_pretrained(path).eval()


def make_adapter(name: str, base: Path, path: Path, seed: int, **options: Any) -> Path:
    """An adapter made by PEFT itself, its B random."""
    made = family(name)
    options = {"r": 4, "lora_alpha": 6, "target_modules": made.targets, "task_type": made.task_type} | options
    model = peft.get_peft_model(load_base(name, base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(path))
    return path


def outputs(name: str, model: torch.nn.Module) -> np.ndarray:
    """Logits (CLIP: unit image embeddings)."""
    with torch.no_grad():
        out = model(**family(name).tensors)
    values = out.image_embeds if name == "clip" else out.logits
    if name == "clip":
        values = values / values.norm(dim=-1, keepdim=True)
    return values.numpy()


def load_quietly(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """``PeftModel.from_pretrained`` in which every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about its own names
        return peft.PeftModel.from_pretrained(model, path).eval()
