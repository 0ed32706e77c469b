"""Prompts, answers and choices from files to tokens: boundaries, templates, truncation, bad input."""

import json

import numpy as np
import pytest
from generative_files import save_base, save_tokenizer, write_jsonl

from enmp_jax.config.sections import DataConfig, TaskConfig
from enmp_jax.data import batch, load_examples, preprocess_for, task_kind
from enmp_jax.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("generative")
    save_base(path / "base")
    return path


def read(root, records, kind="completion", base="base", **data):
    write_jsonl(root / "d.jsonl", records)
    config = DataConfig("jsonl:d.jsonl", test="all", **data)
    return load_examples(config, "test", root, preprocess_for(root / base, "llama", config, kind))


def decoded(root, examples, row=0):
    """Per branch its text: the prompt first, then what is scored."""
    tokenizer = save_tokenizer(root / "base")
    inputs = {name: x[row] for name, x in examples.inputs.items()}
    real = inputs["attention_mask"] > 0
    branch = inputs.get("branch", np.zeros_like(real))
    targets = inputs["target_branch"]
    prompt_end = inputs["target_from"][0] + 1
    texts = [tokenizer.decode(inputs["input_ids"][:prompt_end])]
    texts += [tokenizer.decode(inputs["target_ids"][targets == i]) for i in range(1, targets.max() + 1)]
    # what leads to each target are the prompt and the tokens of its own answer before it
    for i in range(1, targets.max() + 1):
        ids, sources = inputs["target_ids"][targets == i], inputs["target_from"][targets == i]
        assert sources[0] == prompt_end - 1
        np.testing.assert_array_equal(inputs["input_ids"][sources[1:]], ids[:-1])
        if "position" in inputs:
            np.testing.assert_array_equal(inputs["position"][sources], prompt_end - 1 + np.arange(len(ids)))
            np.testing.assert_array_equal(branch[sources[1:]], i)
    return texts


def test_a_completion_ends_with_the_end_of_sequence(root):
    examples = read(
        root, [{"prompt": "the cat sat", "answer": "on the mat"}, {"prompt": "a", "answer": "dog"}]
    )
    assert decoded(root, examples) == ["<s>the cat sat", " on the mat<end>"]
    assert decoded(root, examples, 1) == ["<s>a", " dog<end>"]
    assert examples.inputs["target_branch"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert examples.inputs["attention_mask"].sum(1).tolist() == [7, 3]
    assert examples.labels.tolist() == [0, 0]


def test_choices_share_their_prompt(root):
    record = {"prompt": "is the sky blue?", "choices": ["yes", "the cat", "no"], "answer": 1}
    examples = read(root, [record], "choice")
    assert decoded(root, examples) == ["<s>is the sky blue?", " yes", " the cat", " no"]
    assert examples.labels.tolist() == [1]
    assert examples.inputs["choice_length"].tolist() == [[1, 1, 1]]
    # the last token of a choice is no input
    assert (examples.inputs["branch"][0] > 0).sum() == 1
    for norm, lengths in (("token", [1, 2, 1]), ("character", [3, 7, 2])):
        assert read(root, [record], "choice", choice_norm=norm).inputs["choice_length"].tolist() == [lengths]
    unanswered = {key: value for key, value in record.items() if key != "answer"}
    examples = read(root, [unanswered], "choice")
    assert examples.labels.tolist() == [-1] and examples.notes == ("no example has a label",)
    assert read(root, [record | {"answer": "no"}], "choice").labels.tolist() == [2]
    # for training, a choice is the completion of its right answer
    assert decoded(root, read(root, [record])) == ["<s>is the sky blue?", " the cat<end>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["<s>cat", " dog<end>"]),
        ("say {prompt}:", ["<s>say cat:", " dog<end>"]),
        ("say {prompt}:{answer}", ["<s>say cat:", "dog<end>"]),
        ("{other}! {prompt}\n", ["<s>sea! cat", "\ndog<end>"]),
    ],
)
def test_templates(root, template, expected):
    record = {"prompt": "cat", "other": "sea", "answer": "dog"}
    assert decoded(root, read(root, [record], template=template)) == expected


def test_chat_templates_write_turns(root):
    chat = ["<s><user>the cat<end>\n<assistant>", "sat<end>"]
    assert decoded(root, read(root, [{"prompt": "the cat", "answer": "sat"}], chat=True)) == chat
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert decoded(root, read(root, [{"messages": turns}])) == chat
    longer = [*turns, {"role": "user", "content": "on"}, {"role": "assistant", "content": "mat"}]
    assert decoded(root, read(root, [{"messages": longer}])) == [
        "<s><user>the cat<end>\n<assistant>sat<end>\n<user>on<end>\n<assistant>", "mat<end>",
    ]  # fmt: skip
    record = {"messages": turns[:1], "choices": ["yes", "no"], "answer": 0}
    assert decoded(root, read(root, [record], "choice")) == [chat[0], "yes", "no"]


def test_kinds_are_found_from_the_data(root):
    def kind(record, given=None):
        write_jsonl(root / "k.jsonl", [record])
        return task_kind(TaskConfig("t", "a", DataConfig("jsonl:k.jsonl"), kind=given), root)

    choice = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
    assert kind(choice) == "choice"
    assert kind(choice, "completion") == "completion"
    assert kind({"prompt": "a", "answer": "b"}) == "completion"
    assert kind({"messages": []}) == "completion"
    assert kind({"text": "a", "label": 1}) == "classification"
    with pytest.raises(UserError, match=r"tfds:x: a choice task takes jsonl:FILE"):
        task_kind(TaskConfig("t", "a", DataConfig("tfds:x"), kind="choice"), root)


def test_long_answers_are_truncated_and_counted(root):
    records = [{"prompt": "the cat", "answer": "a " * 6 + "a"}, {"prompt": "the", "answer": "cat"}]
    examples = read(root, records, max_length=7)
    assert examples.notes == ("1 texts were truncated to 7 tokens",)
    assert decoded(root, examples) == ["<s>the cat", " a a a a"]
    with pytest.raises(UserError, match=r"d.jsonl:1: its prompt has 3 tokens, and the window is 3: raise"):
        read(root, records, max_length=3)
    long = {"prompt": "the", "choices": ["cat", "a a a a a"], "answer": 0}
    with pytest.raises(UserError, match=r"d.jsonl:1: its prompt has 2 tokens, its longest choice 5, and the"):
        read(root, [long], "choice", max_length=6)
    assert not read(root, [long], "choice", max_length=7).notes


BAD = {
    "repeated": ({"prompt": "a", "choices": ["b", "b"], "answer": 0}, "the choice 'b' is there twice"),
    "range": (
        {"prompt": "a", "choices": ["b", "c"], "answer": 2},
        r"the answer 2 is out of range: .* 0 to 1",
    ),
    "odd": ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "'d' is neither a choice nor the number"),
    "true": ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "True is neither a choice nor"),
    "one": ({"prompt": "a", "choices": ["b"], "answer": 0}, "choices must be a list of two or more"),
    "none": ({"prompt": "a", "choices": ["b", ""], "answer": 0}, "tokenises to nothing"),
    "no prompt": ({"choices": ["b", "c"], "answer": 0}, "no key 'prompt'; its texts are"),
    "turns": (
        {"messages": [["user", "a"]], "choices": ["b", "c"], "answer": 0},
        "messages must be a list of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices_are_one_line(root, case):
    record, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        read(root, [record], "choice")
    assert "d.jsonl:1" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("answer", ["", " "])
def test_empty_answers_are_refused(root, chat, answer):
    with pytest.raises(UserError, match=r"d.jsonl:1: an answer tokenises to nothing"):
        read(root, [{"prompt": "a", "answer": answer}], chat=chat)


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        ({"prompt": "a", "answer": 3}, {}, r"d.jsonl:1: 'answer' must be a string, got 3"),
        (
            {"prompt": "a", "choices": ["b", "c"]},
            {},
            r"1: no answer, and a completion task needs one",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            {},
            r"1: messages must end with an answer",
        ),
        (
            {"prompt": "a", "answer": "b"},
            {"template": "{promt} {answer}"},
            "no key 'promt'; did you mean 'prompt'",
        ),
        ({"prompt": "a", "answer": "b"}, {"template": "say"}, r"data.template 'say': it has no {prompt}"),
        ({"prompt": "a", "answer": "b"}, {"template": "{prompt"}, r"data.template '{prompt': expected"),
        ({"prompt": "a", "answer": "b"}, {"template": "{answer}{prompt}"}, "must stand at its end"),
        ({"prompt": "a", "answer": "b"}, {"template": "{prompt.x}"}, r"{prompt.x} is no key of the data"),
        ({"prompt": "a", "answer": "b"}, {"labels": (0, 1)}, "data.labels is for classification"),
    ],
)
def test_bad_completions_and_templates(root, record, data, message):
    with pytest.raises(UserError, match=message):
        read(root, [record], **data)


def test_no_chat_template_and_a_foreign_tokenizer(root):
    save_base(root / "plain", chat=False)
    with pytest.raises(UserError, match=r"d.jsonl:1: the tokenizer of .*plain has no chat template: leave"):
        read(root, [{"prompt": "a", "answer": "b"}], base="plain", chat=True)
    save_base(root / "small")
    config = json.loads((root / "small" / "config.json").read_text())
    (root / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens, the model's embeddings only 100: "):
        read(root, [{"prompt": "a", "answer": "b"}], base="small")


def test_batches_hold_one_kind_each(root):
    records = [{"prompt": "the cat", "choices": ["yes", "a dog"], "answer": 1}] * 3
    chosen, completed = read(root, records, "choice"), read(root, records)
    made = batch([completed, chosen, completed], 4)
    assert [b.task.tolist() for b in made] == [[[0, 0, 0, 2], [2, 2, 2, 2]], [[1, 1, 1, 1]]]
    assert [b.mask.sum() for b in made] == [6, 3]
    assert made[0].inputs["target_ids"].shape == (2, 4, 8) and made[0].inputs["input_ids"].shape == (2, 4, 16)
    assert made[1].inputs["choice_length"].shape == (1, 4, 2) and "branch" not in made[0].inputs
