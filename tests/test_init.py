"""``enmp init``, the reference of run files, and what a search with few masks says."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import yaml
from adapter_files import loaded, make  # noqa: F401 (a fixture)

from enmp_jax.cli import main as cli
from enmp_jax.config import run_file
from enmp_jax.config.reference import keys_of, reference
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import SearchConfig
from enmp_jax.masks import MaskSpec
from enmp_jax.runs.search import few_masks

PAGE = Path(__file__).parent.parent / "docs" / "run-file.md"


def written(tmp_path, capfd, *words):
    assert cli.main(["init", *map(str, words)]) == 0
    (tmp_path / "run.yaml").write_text(capfd.readouterr().out)
    return run_file.load(tmp_path / "run.yaml")


def test_a_run_file_to_start_from(loaded, tmp_path, capfd):  # noqa: F811
    run = written(tmp_path, capfd, tmp_path / "secret-user/cars", tmp_path / "secret-user/dtd")
    assert run.base.model == "org/base" and [task.name for task in run.tasks] == ["cars", "dtd"]
    assert run.tasks[0].head.source == "adapter" and run.tasks[1].head.source == "base"
    # what stands there as a comment is the default
    text = (tmp_path / "run.yaml").read_text()
    body = text[text.index("# search:") :].replace("\n#   ", "\n  ").replace("\n# ", "\n")
    assert yaml.safe_load(body.removeprefix("# "))["search"]["population"] == run.search.population == 8
    default = dataclasses.asdict(SearchConfig())
    for key, value in yaml.safe_load(body.removeprefix("# "))["search"].items():
        wanted = list(default[key]) if isinstance(default[key], tuple) else default[key]
        assert value == wanted, key


def test_generative_adapters_and_names_that_are_taken(tmp_path, capfd):
    make(tmp_path / "a" / "adapter", 0, task_type="CAUSAL_LM")
    make(tmp_path / "b" / "adapter", 1, task_type="CAUSAL_LM")
    run = written(tmp_path, capfd, tmp_path / "a/adapter", tmp_path / "b/adapter")
    assert [task.name for task in run.tasks] == ["task-1", "task-2"]
    assert run.tasks[0].data.source == "jsonl:DATA/task-1" and run.tasks[0].data.test == "test"


def test_adapters_that_cannot_be_merged_write_nothing(tmp_path, capfd):
    assert cli.main(["init", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "there is no adapter_config.json" in err


def test_the_reference_is_up_to_date():
    assert PAGE.read_text() == reference(), "python -m enmp_jax.config.reference > docs/run-file.md"


def test_the_reference_knows_every_key():
    text = reference()
    waiting = [RunConfig]
    while waiting:
        for key in keys_of(waiting.pop()):
            assert f"| `{key.name}` |" in text
            waiting += [key.section] if key.section else []
    assert "| `population` | whole number | `8` |" in text and "| `model` | text | **needed** |" in text


@pytest.mark.parametrize("distinct,share,said", [
    (1, 0.1, "every mask of the search was the empty one: at most 0 of 6 modules"),
    (3, 0.2, "saw 3 distinct masks only: at most 1 of 6 modules"),
    (5, 0.2, None),
    (None, 0.2, None),
])  # fmt: skip
def test_searches_of_few_masks_say_so_and_why(loaded, distinct, share, said):  # noqa: F811
    line = few_masks(MaskSpec.of(loaded.stack, max_pruned=share), distinct)
    assert (line is None) == (said is None) and (said or "") in (line or "")


def test_completion_knows_commands_options_and_values(tmp_path, capfd):
    """The script that bash runs, asked as bash asks."""
    assert cli.main(["completion", "bash"]) == 0
    script = capfd.readouterr().out
    (tmp_path / "completion.bash").write_text(script)

    def completed(*words):
        line = " ".join(f'"{word}"' for word in words)
        code = f"source {tmp_path}/completion.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        shown = "IFS=$'\\n'; _tyro_enmp; echo \"${COMPREPLY[*]}\""
        found = subprocess.run(["bash", "-c", code + shown], capture_output=True, text=True, check=True)
        return set(found.stdout.split())

    assert {"merge", "verify", "export"} <= completed("enmp", "")
    assert completed("enmp", "ver") == {"verify"}
    assert completed("enmp", "export", "runs/mine", "--form") == {"--format"}
    assert completed("enmp", "export", "runs/mine", "--format", "ch") == {"checkpoint"}
