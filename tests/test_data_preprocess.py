"""Preprocessing by the base model's files."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import batch, load_examples, preprocess_for
from enmp_jax.data.preprocess import PlainImages, with_channels
from enmp_jax.errors import UserError

DATA = DataConfig("npz:a.npz", test="all", max_length=9)
OPENAI = {  # preprocessor_config.json of openai/clip-vit-base-patch32
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def model(root, config, preprocessor=None):
    (root / "m").mkdir(exist_ok=True)
    (root / "m" / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (root / "m" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return root / "m"


def pictures():
    rng = np.random.default_rng(0)
    shapes = [(300, 400, 3), (28, 28, 1), (3, 90, 3), (231, 224, 3), (224, 224, 1), (1, 1, 3)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.mark.parametrize("size", [224, 336])
def test_clip_images_are_those_of_the_transformers_class(root, size):
    settings = OPENAI | {"size": size, "crop_size": size}
    path = model(root, {"model_type": "clip", "vision_config": {"image_size": size}}, settings)
    made, truncated = preprocess_for(path, "clip", DATA)(pictures())
    assert made["image"].dtype == np.uint8 and made["image"].shape == (6, size, size, 3) and truncated == 0
    oracle = CLIPImageProcessorPil.from_pretrained(str(path))
    pil = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pictures()]
    channels_first = np.moveaxis(made["image"], -1, 1)
    raw = oracle(pil, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(channels_first, raw)
    # rescaling and normalising what we give yields what the class gives
    mean, std = (np.asarray(OPENAI[key], np.float32)[:, None, None] for key in ("image_mean", "image_std"))
    full = oracle(pil, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose((channels_first / np.float32(255) - mean) / std, full, rtol=0, atol=1e-6)


def test_small_models_have_no_processor(root):
    path = model(root, {"model_type": "vit", "image_size": 8, "num_channels": 1}, {"image_mean": [0.5]})
    preprocess = preprocess_for(path, "vit", DATA)
    assert isinstance(preprocess, PlainImages)
    same = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess(list(same))[0]["image"], same)
    made = preprocess(pictures())[0]["image"]
    assert made.shape == (6, 8, 8, 1)
    first = Image.fromarray(pictures()[0]).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(made[0, ..., 0], first)


def test_vit_with_a_size_uses_its_processor(root):
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
    }
    path = model(root, {"model_type": "vit", "image_size": 32, "num_channels": 3}, settings)
    made = preprocess_for(path, "vit", DATA)(pictures())[0]["image"]
    first = Image.fromarray(pictures()[0]).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(made[0], first)
    assert made.shape == (6, 32, 32, 3)


def test_bad_images_settings(root):
    path = model(root, {"model_type": "clip", "vision_config": {"image_size": 336}}, OPENAI)
    with pytest.raises(UserError, match=r"makes? \[224, 224\] pixels, the model takes \[336, 336\]"):
        preprocess_for(path, "clip", DATA)(pictures())
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config.json"):
        preprocess_for(path, "clip", DATA)
    with pytest.raises(UserError, match="images have 2 channels, but the base model takes 3"):
        with_channels(np.zeros((2, 2, 2), np.uint8), 3)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "dog", "sat", "on", "mat", "a"]


def text_model(root, pad: str | None = "[PAD]", **config):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    path = model(root, {"model_type": "bert"} | config)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]", pad_token=pad
    ).save_pretrained(path)
    return path


PAIRS = [("the cat", "sat on"), ("the cat sat on the mat a a a a", "the cat"), ("the cat", "x")]


def test_pairs_are_padded_and_truncated(root):
    made, truncated = preprocess_for(text_model(root), "bert", DATA)(PAIRS)
    assert made["input_ids"].tolist() == [
        [2, 4, 5, 3, 7, 8, 3, 0, 0],
        [2, 4, 5, 7, 8, 3, 4, 5, 3],  # the longer text loses its end
        [2, 4, 5, 3, 1, 3, 0, 0, 0],
    ]
    assert made["attention_mask"].sum(1).tolist() == [7, 9, 6]
    assert made["input_ids"].dtype == made["attention_mask"].dtype == np.int32
    assert truncated == 1


def test_exactly_the_maximum_is_not_truncated(root):
    made, truncated = preprocess_for(text_model(root), "bert", DATA)([("the cat sat on the mat a",)])
    assert made["input_ids"].shape == (1, 9) and truncated == 0


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 6}, 6),
        ({"model_type": "gpt2", "n_positions": 5}, 5),
        ({"model_type": "roberta", "max_position_embeddings": 9}, 7),
        ({}, 9),
    ],
)
def test_the_model_limits_the_length_too(root, config, longest):
    made, truncated = preprocess_for(text_model(root, **config), "bert", DATA)([("a " * 20,)])
    assert made["input_ids"].shape == (1, longest) and truncated == 1


def test_tokenizers_without_padding_token(root):
    made, _ = preprocess_for(text_model(root, pad=None, model_type="llama"), "llama", DATA)(PAIRS)
    assert made["input_ids"][0].tolist() == [2, 4, 5, 3, 7, 8, 3, 3, 3]
    assert made["attention_mask"][0].tolist() == [1] * 7 + [0] * 2


def test_texts_from_file_to_batches(root):
    lines = [{"text": " ".join(["cat"] * (1 + i % 40)), "label": i % 2} for i in range(300)]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = DataConfig("jsonl:t.jsonl", test="all", max_length=32)
    preprocess = preprocess_for(text_model(root), "bert", config)
    examples = load_examples(config, "test", root, preprocess)
    # 2 special tokens: texts of 31 to 40 words do not fit; 300 texts are more than one chunk
    assert examples.notes == (f"{sum(i % 40 >= 30 for i in range(300))} texts were truncated to 32 tokens",)
    assert examples.inputs["input_ids"].shape == (300, 32)
    lengths = [min(32, 3 + i % 40) for i in range(300)]
    assert examples.inputs["attention_mask"].sum(1).tolist() == lengths
    again = load_examples(config, "test", root, preprocess_for(root / "m", "bert", config))
    np.testing.assert_array_equal(again.inputs["input_ids"], examples.inputs["input_ids"])
    assert again.notes == examples.notes and len(list((root / "cache" / "examples").iterdir())) == 1
    assert [b.inputs["input_ids"].shape[2] for b in batch([examples], 64)] == [16, 32]


def test_other_tokenizer_files_are_another_cache_entry(root):
    first = preprocess_for(text_model(root), "bert", DATA).identity
    assert preprocess_for(root / "m", "bert", DATA).identity == first
    file = root / "m" / "tokenizer.json"
    file.write_text(file.read_text().replace('"mat"', '"rug"'))
    assert preprocess_for(root / "m", "bert", DATA).identity != first


def test_data_of_the_other_kind(root):
    (root / "t.jsonl").write_text('{"text": "a", "label": 0}')
    images = preprocess_for(model(root, {"model_type": "vit", "image_size": 8}), "vit", DATA)
    with pytest.raises(UserError, match=r"jsonl:t.jsonl holds texts but the base model takes images"):
        load_examples(DataConfig("jsonl:t.jsonl", test="all"), "test", root, images)


def test_bad_text_models(root):
    with pytest.raises(UserError, match="neither an image size nor tokenizer files"):
        preprocess_for(model(root, {"model_type": "bert"}), "bert", DATA)
    (root / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        preprocess_for(root / "m", "bert", DATA)([("a",)])
    with pytest.raises(UserError, match="texts have 3 parts"):
        preprocess_for(text_model(root), "bert", DATA)([("a", "a", "a")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit", "image_size": "224"}, "image_size is '224'"),
        ({"model_type": "vit", "image_size": [8, 8, 3]}, r"image_size is \[8, 8, 3\]"),
        ({"model_type": "vit", "image_size": None}, "image_size is None"),
        ({"model_type": "vit", "image_size": 8, "num_channels": "3"}, "num_channels is '3'"),
        ({"model_type": "clip", "vision_config": 3}, "vision_config is 3"),
    ],
)
def test_image_settings_of_the_wrong_type(root, config, message):
    with pytest.raises(UserError, match=message):
        preprocess_for(model(root, config), "vit", DATA)


@pytest.mark.parametrize("change", [{"max_position_embeddings": None}, {"max_position_embeddings": "9"}])
def test_text_settings_of_the_wrong_type(root, change):
    path = text_model(root)
    (path / "config.json").write_text(json.dumps({"model_type": "bert"} | change))
    with pytest.raises(UserError, match="max_position_embeddings is "):
        preprocess_for(path, "bert", DATA)


def test_a_processor_that_fails_on_the_images(root):
    path = model(root, {"model_type": "clip", "vision_config": {"image_size": 8}}, OPENAI | {"size": [1]})
    with pytest.raises(UserError, match="preprocessor_config.json cannot be used"):
        preprocess_for(path, "clip", DATA)(pictures())
