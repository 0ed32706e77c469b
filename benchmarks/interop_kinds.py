"""The adapters of ``interop.py``: small models of torch, transformers and PEFT with random weights.

Each kind is a base model and two adapters on it. What each adapter adds to every tensor of the base is
computed by PEFT (its merged model less the base, in float64), or by hand where no library reads the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model

TASKS = ("first", "second")
Deltas = dict[str, np.ndarray]  # tensor of the base -> what is added


@dataclasses.dataclass
class Made:
    """One kind, on the disk.

    Attributes:
        base: directory of the base model; None: there is none to merge into.
        adapters: task -> directory or file.
        deltas: task -> float64 deltas by name of the base's tensor.
        matrices: name of a tensor -> its matrices [out, in] that are merged by themselves, if it is not one.
        load: the base as a torch module, for PEFT; None where PEFT does not read the adapters.
        ranks: name of a tensor -> rank of its LoRA, where it is not ``RANK``.
        names: name of a base's tensor -> its name in ``delta.safetensors``, where it is another.
    """

    base: Path | None
    adapters: dict[str, Path]
    deltas: dict[str, Deltas]
    matrices: Callable[[str, np.ndarray], list[np.ndarray]] = lambda name, x: [x.reshape(len(x), -1)]
    load: Callable[[], torch.nn.Module] | None = None
    ranks: Callable[[str], int] = lambda name: RANK
    names: Callable[[str], str] = lambda name: name
    needs_base: bool = False


RANK = 3
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LLAMA = {
    **SIZES,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}


def seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A model with the same random weights every time."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # transformers starts some of them at zero
        torch.nn.init.normal_(parameter, std=0.1)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()
    return model


def randomise(model: Any, seed: int) -> None:
    """LoRA as after a training: no B of zeros."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=random) * 0.1
            near = "magnitude" in name
            parameter.data = (parameter.data * (1 + 0.3 * noise) if near else noise).to(parameter.dtype)


def by_peft(
    root: Path,
    make: Callable[[], torch.nn.Module],
    config: Callable[[], LoraConfig],
    *,
    torch_file: bool = False,
    dtype: torch.dtype = torch.float32,
    **made: Any,
) -> Made:
    """Adapters that PEFT makes, saves and merges."""
    base = root / "base"
    model = seeded(make)
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(base)
    else:
        base.mkdir(parents=True)
        (base / "config.json").write_text("{}")
        safetensors.torch.save_file(model.state_dict(), base / "model.safetensors")
    adapters, deltas = {}, {}
    for seed, task in enumerate(TASKS):
        settings = config()
        adapted = get_peft_model(seeded(make), settings)
        randomise(adapted, seed + 1)
        if dtype != torch.float32:
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype).to(torch.float32)
        adapters[task] = root / task
        adapted.save_pretrained(adapters[task], safe_serialization=not torch_file)
        if dtype != torch.float32:
            file = adapters[task] / "adapter_model.safetensors"
            tensors = {k: v.to(dtype) for k, v in safetensors.torch.load_file(file).items()}
            safetensors.torch.save_file(tensors, file)
        deltas[task] = of_peft(adapters[task], make)
    return Made(base, adapters, deltas, load=lambda: seeded(make), **made)


def of_peft(adapter: Path, make: Callable[[], torch.nn.Module]) -> Deltas:
    """What an adapter adds to each tensor of the base, by PEFT in float64."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    plain = seeded(make).double()
    before = {k: v.detach().clone() for k, v in plain.named_parameters()}  # tied weights once
    # PiSSA and OLoRA decompose float32 alone; loading subtracts what they started from
    model = plain.float() if isinstance(settings["init_lora_weights"], str) else plain
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).double().merge_and_unload().state_dict()
    found = {k: (merged[k] - before[k]).numpy() for k in before if k in merged}
    return {k: v for k, v in found.items() if np.abs(v).max(initial=0) > 1e-12}


class Block(torch.nn.Module):
    """A mixture of experts that are modules, as older transformers had them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(16, 16)
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({"w1": torch.nn.Linear(16, 24), "w2": torch.nn.Linear(24, 16)})
            for _ in range(3)
        )


class Mixture(torch.nn.Module):
    """Two layers of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))


class Attention(torch.nn.Module):
    """diffusers' names."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(width, width, bias=False)
        self.to_k = torch.nn.Linear(context, width, bias=False)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(width, width)])


class Transformer(torch.nn.Module):
    """Spatial transformer of a UNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = torch.nn.Conv2d(width, width, 1)
        block = {"attn1": Attention(width, width), "attn2": Attention(width, 20)}
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.ModuleDict(block)])


class Down(torch.nn.Module):
    """One block of a UNet."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.attentions = torch.nn.ModuleList([Transformer(width)])
        self.resnets = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(inner, width, 3, padding=1)})]
        )


class Unet(torch.nn.Module):
    """Names and shapes of Stable Diffusion's, small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.time_embedding = torch.nn.ModuleDict({"linear_1": torch.nn.Linear(8, 16)})
        self.down_blocks = torch.nn.ModuleList([Down(8, 8), Down(8, 16)])
        self.mid_block = torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([Transformer(16)])})
        self.up_blocks = torch.nn.ModuleList([Down(24, 8)])


def single_files(root: Path, style: str, *, conv: bool = True) -> Made:
    """Files of kohya's, LyCORIS' or diffusers' spelling; their deltas by hand."""
    base = root / "base"
    base.mkdir(parents=True)
    model = seeded(Unet)
    (base / "config.json").write_text("{}")
    safetensors.torch.save_file(model.state_dict(), base / "diffusion_pytorch_model.safetensors")
    adapters, deltas = {}, {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or (conv and isinstance(module, torch.nn.Conv2d))
    }
    for seed, task in enumerate(TASKS):
        random = torch.Generator().manual_seed(seed)
        tensors, found = {}, {}
        for name, module in layers.items():
            out, *rest = module.weight.shape
            down = torch.randn(RANK, *rest, generator=random) * 0.1
            up = torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=random) * 0.1
            scaling = 1.0
            if style == "kohya":
                key = f"lora_unet_{name.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = torch.tensor(1.5)
                scaling = 1.5 / RANK
            else:
                tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            product = up.double().reshape(out, RANK) @ down.double().reshape(RANK, -1)
            found[f"{name}.weight"] = (scaling * product).reshape(module.weight.shape).numpy()
        adapters[task] = root / f"{task}.safetensors"
        safetensors.torch.save_file(tensors, adapters[task])
        deltas[task] = found
    return Made(base, adapters, deltas, names=functools.partial(_spelled, style))


def _spelled(style: str, name: str) -> str:
    path = name.removesuffix(".weight")
    flat = path.replace(".", "_")
    return f"lora_unet_{flat}.weight" if style == "kohya" else f"unet.{path}.weight"


def _experts(flip: bool, name: str, x: np.ndarray) -> list[np.ndarray]:
    if x.ndim != 3:
        return [x.reshape(len(x), -1)]
    return [part.T if flip else part for part in x]


def _lora(*targets: str, **settings: Any) -> Callable[[], LoraConfig]:
    # a regular expression where it ends in one
    names: Any = targets[0] if len(targets) == 1 and "(" in targets[0] else list(targets)
    return lambda: LoraConfig(**{"r": RANK, "lora_alpha": 5, "target_modules": names, **settings})


def _config(name: str, **values: Any) -> Any:
    return getattr(transformers, name)(**values)


def _make(model: str, config: str, **values: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(transformers, model)(_config(config, **values))


_llama = _make("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=False)
_tied = _make("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True)
bert = _make("BertModel", "BertConfig", **SIZES, num_hidden_layers=2, vocab_size=40)
_gpt2 = _make("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
_vision = {**SIZES, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
_clip_vision = _make("CLIPVisionModel", "CLIPVisionConfig", **_vision)


def _clip() -> torch.nn.Module:
    text = {
        **SIZES,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "vocab_size": 40,
        "max_position_embeddings": 16,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=_vision, projection_dim=10)
    return transformers.CLIPModel(config)


_t5 = _make(
    "T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3,
    num_heads=2, vocab_size=40,
)  # fmt: skip
_whisper = _make(
    "WhisperForConditionalGeneration", "WhisperConfig", d_model=16, encoder_layers=2, decoder_layers=3,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    vocab_size=60,
    num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=3, suppress_tokens=[], begin_suppress_tokens=[],
)  # fmt: skip
_resnet = _make("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2])
_swin = _make(
    "SwinModel", "SwinConfig", image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2],
    window_size=4,
)  # fmt: skip
_qwen_moe = _make(
    "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **LLAMA, moe_intermediate_size=10, num_experts=3,
    num_experts_per_tok=2, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip
_gpt_oss = _make(
    "GptOssForCausalLM", "GptOssConfig", **LLAMA, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
    tie_word_embeddings=False, layer_types=["full_attention"] * 2,
)  # fmt: skip
_T5_TARGETS = ("q", "v", "o", "wi", "wo")
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _dora_rank(name: str) -> int:
    return 16  # of any rank: as large as the matrices


KINDS: dict[str, Callable[[Path], Made]] = {
    "ViT, attention": lambda root: by_peft(root, _clip_vision, _lora("q_proj", "v_proj")),
    "Llama, all linear layers and lm_head": lambda root: by_peft(
        root, _llama, _lora("q_proj", "o_proj", "up_proj", "down_proj", "lm_head")
    ),
    "Llama, embeddings": lambda root: by_peft(root, _llama, _lora("q_proj", "embed_tokens")),
    "Llama, embeddings tied to lm_head": lambda root: by_peft(root, _tied, _lora("q_proj", "embed_tokens")),
    "BERT, embeddings and pooler": lambda root: by_peft(
        root, bert, _lora("query", "word_embeddings", "pooler.dense")
    ),
    "BERT, adapter_model.bin": lambda root: _as_torch(by_peft(root, bert, _lora("query", "value"))),
    "GPT-2, Conv1D": lambda root: by_peft(root, _gpt2, _lora("c_attn", "c_fc", fan_in_fan_out=True)),
    "T5, two stacks": lambda root: by_peft(root, _t5, _lora(*_T5_TARGETS)),
    "Whisper, two stacks and Conv1d": lambda root: by_peft(
        root, _whisper, _lora("q_proj", "v_proj", "conv1", "conv2")
    ),
    "CLIP, text and vision": lambda root: by_peft(root, _clip, _lora("q_proj", "fc1", "visual_projection")),
    "Swin, stages of different width": lambda root: by_peft(root, _swin, _lora("q_proj", "query", "key")),
    "ResNet, Conv2d": lambda root: by_peft(root, _resnet, _lora("convolution")),
    "UNet, PEFT's names": lambda root: by_peft(
        root, Unet, _lora("to_q", "to_k", "to_out.0", "proj_in", "conv1", "conv_in", "linear_1")
    ),
    "UNet, kohya and LyCORIS' LoCon": lambda root: single_files(root, "kohya"),
    "UNet, diffusers": lambda root: single_files(root, "diffusers"),
    "experts as modules": lambda root: by_peft(root, Mixture, _lora("q_proj", "w1", "w2")),
    "Qwen3-MoE, target_parameters": lambda root: by_peft(
        root, _qwen_moe, _lora("q_proj", target_parameters=_EXPERTS),
        matrices=functools.partial(_experts, False),
    ),
    "gpt-oss, target_parameters [in, out]": lambda root: by_peft(
        root, _gpt_oss, _lora("q_proj", target_parameters=_EXPERTS),
        matrices=functools.partial(_experts, True),
    ),
    "rsLoRA, rank and alpha patterns": lambda root: by_peft(
        root, _llama,
        _lora("q_proj", "v_proj", use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 7}),
        ranks=lambda name: 2 if "v_proj" in name else RANK,
    ),
    "bfloat16 factors": lambda root: by_peft(root, _llama, _lora("q_proj", "v_proj"), dtype=torch.bfloat16),
    "DoRA": lambda root: by_peft(
        root, _llama, _lora("q_proj", "v_proj", use_dora=True), ranks=_dora_rank, needs_base=True
    ),
    "PiSSA": lambda root: by_peft(
        root, _llama, _lora("q_proj", "up_proj", init_lora_weights="pissa"), ranks=lambda name: 2 * RANK,
        needs_base=True,
    ),
    "OLoRA": lambda root: by_peft(
        root, _llama, _lora("q_proj", "up_proj", init_lora_weights="olora"), ranks=lambda name: 2 * RANK,
        needs_base=True,
    ),
}  # fmt: skip


def _as_torch(made: Made) -> Made:
    """Adapters in torch's own files, as PEFT wrote them before safetensors."""
    for directory in made.adapters.values():
        file = directory / "adapter_model.safetensors"
        torch.save(safetensors.torch.load_file(file), directory / "adapter_model.bin")
        file.unlink()
    return made
