"""A hub of small random models, adapters and data sets, laid out as those that the ``knots-*`` files name."""

import io
import json

import jax
import numpy as np
from PIL import Image as PillowImage
from safetensors.numpy import save_file
from test_data_huggingface import ClassLabel, Dataset, Image, Value
from test_data_tfds import FEATURES, TEXT, label, prepare
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from enmp_jax import models as backbones
from enmp_jax.adapters import save_adapter
from enmp_jax.data import clip_prompts
from enmp_jax.models.convert import to_tensors

COMMIT = "f" * 40
VISION = ("stanford_cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
NLI = ("snli", "mnli", "sick", "qnli", "rte", "scitail")
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def folder(root, repo):
    """Where a repository's snapshot lies in the hub's own cache."""
    return root / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


def make(root):
    """Bases and adapters below ``root``; returns what stands in for ``snapshot_download``."""
    for size, repo, patch in (("B-32", "base-patch32", 8), ("L-14", "large-patch14", 16)):
        clip(folder(root, f"openai/clip-vit-{repo}"), patch)
        for i, task in enumerate(VISION):
            # As PEFT wrote them around the inner vision model of transformers 4.
            names = [
                f"encoder.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in ("q", "k", "v", "out")
            ]
            path = folder(root, f"hoffman-lab/KnOTS-ViT-{size}_lora_R16_{task}")
            adapter(path, i, names, {}, f"openai/clip-vit-{repo}")
    llama(folder(root, "meta-llama/Meta-Llama-3-8B"))
    for i, task in enumerate(NLI):
        names = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo"]
        score = {"score": {"weight": np.random.default_rng(i).normal(size=(3, 32)).astype(np.float32)}}
        path = folder(root, f"hoffman-lab/KnOTS-Llama3_8B_lora_R16_{task}")
        adapter(path, i, names, score, "meta-llama/Meta-Llama-3-8B", "SEQ_CLS")

    def download(repo, revision=None, allow_patterns=None):
        assert allow_patterns, "whole repositories are never asked for"
        if not folder(root, repo).is_dir():
            raise OSError(f"404: no {repo}")
        return str(folder(root, repo))

    return download


def tokenizer(path, texts, start, end, append):
    """A word-level tokenizer with the special tokens of CLIP or Llama."""
    made = Tokenizer(models.WordLevel(unk_token="?"))  # pyright: ignore[reportCallIssue]
    made.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["?", start, end]))
    tail = f" {end}" if append else ""
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{start} $A{tail}", pair=f"{start} $A {start} $B{tail}",
        special_tokens=[(t, made.token_to_id(t)) for t in (start, end)],
    )  # fmt: skip
    path.mkdir(parents=True)
    made.save(str(path / "tokenizer.json"))
    special = {"bos_token": start, "eos_token": end} | ({"pad_token": end} if append else {})
    settings = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 77 if append else 4096,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def clip(path, patch):
    """Both towers in one file, as openai's."""
    packaged = [clip_prompts.prompts(name) for name in VISION]
    texts = [text for p in packaged for text in (*p.class_names, *p.templates)]
    tokens = tokenizer(path, texts, "<|startoftext|>", "<|endoftext|>", append=True)
    text = TOWER | {
        "model_type": "clip_text_model", "vocab_size": tokens.get_vocab_size(), "max_position_embeddings": 77,
        "bos_token_id": tokens.token_to_id("<|startoftext|>"),
        "eos_token_id": tokens.token_to_id("<|endoftext|>"),
    }  # fmt: skip
    vision = TOWER | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": patch}
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 24,
        "text_config": text, "vision_config": vision,
    }  # fmt: skip
    tensors = {}
    for i, family in enumerate(("clip", "clip_text_model")):
        backbone = backbones.build(config, family=family)
        tensors |= to_tensors(backbone, weights(backbone, i))
    write(path, config, tensors)
    settings = {
        "crop_size": 32, "size": 32, "do_center_crop": True, "do_resize": True, "do_normalize": True,
        "image_processor_type": "CLIPImageProcessor", "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def llama(path):
    """A causal language model, as Meta's."""
    texts = [f"sentence {i} of a text ?" for i in range(40)]
    tokens = tokenizer(path, texts, "<|begin_of_text|>", "<|end_of_text|>", append=False)
    config = TOWER | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": tokens.get_vocab_size(),
        "num_key_value_heads": 2, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": tokens.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokens.token_to_id("<|end_of_text|>"),
    }  # fmt: skip
    backbone = backbones.build(config, dtype="bfloat16")
    write(path, config, to_tensors(backbone, weights(backbone, 2)))


def weights(backbone, seed):
    """Random parameters, norms near one; without JAX, which would compile every draw."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        near = float("norm" in jax.tree_util.keystr(path) and "weight" in jax.tree_util.keystr(path))
        return (near + 0.1 * random.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(backbone.init, jax.random.key(0)))


def write(path, config, tensors):
    (path / "config.json").write_text(json.dumps(config))
    contiguous = {name: np.array(value, order="C") for name, value in tensors.items()}
    save_file(contiguous, path / "model.safetensors", {"format": "pt"})


def adapter(path, seed, names, heads, base, task_type=None):
    """Rank 16, alpha 16, on the attention projections."""
    random = np.random.default_rng(seed)
    inner = {"k_proj": 16, "v_proj": 16} if heads else {}  # grouped keys and values
    modules = {
        name: tuple(
            random.normal(size=shape).astype(np.float32) * 0.1
            for shape in ((16, 32), (inner.get(name.rsplit(".", 1)[-1], 32), 16))
        )
        for name in names
    }
    save_adapter(path, modules, 16, 16, base, heads=heads, task_type=task_type)  # pyright: ignore[reportArgumentType]
    if heads:
        config = json.loads((path / "adapter_config.json").read_text())
        config["modules_to_save"] = ["classifier", "score"]  # PEFT's for SEQ_CLS
        (path / "adapter_config.json").write_text(json.dumps(config))


def picture(i):
    buffer = io.BytesIO()
    noise = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    PillowImage.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def make_data(root):
    """TFDS directories below ``root``; returns what stands in for the ``datasets`` package."""
    image = {
        "pythonClassName": FEATURES + "image_feature.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
    }
    count = [0]

    def images(n, classes):
        count[0] += n
        return [{"image": picture(count[0] - i), "label": i % classes} for i in range(n)]

    for path, splits, classes in (
        ("dtd/3.0.1", {"validation": 8, "test": 5}, 47),
        ("eurosat/rgb/2.0.0", {"train": 40}, 10),
        ("mnist/3.0.1", {"test": 30}, 10),
        ("sun397/standard-part1-120k/4.0.0", {"test": 30}, 397),
        ("svhn_cropped/3.1.0", {"test": 30}, 10),
    ):
        data = {split: images(n, classes) for split, n in splits.items()}
        prepare(root / path, data, {"image": image, "label": label(classes)})

    def pairs(keys, n, classes, words):
        return [{key: f"{words} {i} of a {key}" for key in keys} | {"label": i % classes} for i in range(n)]

    two = ("premise", "hypothesis")
    for path, keys, splits, classes in (
        ("snli/1.1.0", two, {"validation": 1030, "test": 9}, 3),
        ("glue/mnli/2.0.0", two, {"validation_matched": 40}, 3),
        ("glue/rte/2.0.0", ("sentence1", "sentence2"), {"validation": 16}, 2),
        ("sci_tail/1.0.0", two, {"validation": 8, "test": 5}, 2),
    ):
        data = {split: pairs(keys, n, classes, f"{path} {split}") for split, n in splits.items()}
        prepare(root / path, data, {**dict.fromkeys(keys, TEXT), "label": label(classes)})

    def image_set(splits, classes):
        features = {"image": Image(), "label": ClassLabel([f"class {i}" for i in range(classes)])}
        made = {}
        for split, n in splits.items():
            rows = images(n, classes)
            columns = {key: [row[key] for row in rows] for key in ("image", "label")}
            columns["image"] = [{"bytes": data, "path": None} for data in columns["image"]]
            made[split] = Dataset(features, columns)
        return made

    def text_set(keys, splits, classes):
        made = {}
        for split, n in splits.items():
            rows = pairs(keys, n, classes, split)
            columns = {key: [row[key] for row in rows] for key in (*keys, "label")}
            made[split] = Dataset({**dict.fromkeys(keys, Value("string")), "label": Value("int64")}, columns)
        return made

    sets = {
        "tanganke/stanford_cars": image_set({"test": 30}, 196),
        "tanganke/gtsrb": image_set({"test": 30}, 43),
        "timm/resisc45": image_set({"validation": 8, "test": 5}, 45),
        "sick": text_set(("sentence_A", "sentence_B"), {"validation": 8, "test": 5}, 3),
        "SetFit/qnli": text_set(("text1", "text2"), {"validation": 30}, 2),
    }
    return lambda name, configuration, revision: sets[name]
