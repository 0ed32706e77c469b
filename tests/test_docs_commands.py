"""Every command of the pages runs as it is printed, or stands here with the reason why it does not.

All run in this process, in two directories with tiny files of the names that the pages speak of.
"""

import contextlib
import functools
import io
import re
import shlex
import shutil

import doc_files
import generative_files
import gguf_files
import pytest
import yaml
from doc_blocks import PAGES, ROOT, of, printed

import enmp_jax as enmp
from enmp_jax.cli import main as cli
from enmp_jax.report import write

CHAT = {"chat-adapters.md", "language-models.md"}
"""Pages about generative models; the others are about classifiers."""
NOT_RUN = {
    r"make ": "a target installs and runs for minutes; tests/test_docs.py: the targets exist",
    r"pip install |git clone |cd enmp-jax$": "installs; .ci/wheel installs the package and runs it",
    r"enmp demo --quick$": "run from the wheel by .ci/wheel",
    r"enmp doctor$": "measures this machine; tests/test_doctor.py runs it",
    r"gcloud |sbatch ": "no pod and no cluster here",
    r".* --coordinator HOST0": "two processes: tests/test_multihost.py",
    r"vllm |llama-server ": "other programs; tests/reference/test_gguf.py has llama.cpp read the adapter",
    r"TFDS_DATA_DIR=DIR enmp search vision-small": "needs its data; tests/test_suites_vision.py loads them",
    r".* --lm-eval arc_easy": "a data set of the hub; tests/reference/test_lm_eval.py has a task file",
    r"enmp compare (RUN|RUN.yaml|DIR)$": "all methods take minutes; choosing.md's three methods are run",
    r"enmp train RUN.yaml": "language-models.md's is run; this page's run file has nothing to train on",
    r"enmp controls DIR$": "minutes; the quickstart's two rows are run, all by tests/test_controls_run.py",
}
"""Beginning of a command, as a regular expression -> why it is not run."""
MEANT = {
    "enmp init ADAPTER...": "enmp init adapters/reviews adapters/spam",
    "enmp search run.yaml --set search.population=32 --set merge.method=tsv --out ...":
        "enmp search run.yaml --set search.population=32 --set merge.method=tsv --out runs/set",
    "source <(enmp completion bash)": "enmp completion bash",
    "enmp evaluate RUN.yaml [--mask mask.json]": "enmp evaluate run.yaml --mask runs/first/mask.json",
    "enmp evaluate --json": "enmp evaluate run.yaml --json",
    "enmp refine DIR": "enmp refine runs/mine",
    "enmp refine DIR --cross-fit": "enmp refine runs/mine --cross-fit --out twice",
    "enmp merge --adapter A=DIR --adapter B=DIR --method ties --out DIR":
        "enmp merge --adapter A=adapters/reviews --adapter B=adapters/spam --method ties --out merged",
    "enmp merge --method tsv":
        "enmp merge --adapter A=adapters/reviews --adapter B=adapters/spam --method tsv --out merged",
    "enmp export DIR --format F": "enmp export runs/mine --format checkpoint",
    "enmp verify DIR...": "enmp verify runs/first adapters/spam",
    "enmp verify DIR": "enmp verify runs/first",
    "enmp statistics RUN.yaml --kind gram --out FILE.safetensors":
        "enmp statistics run.yaml --kind gram --out again.safetensors",
    "enmp train RUN --out DIR": "enmp train run.yaml --out trained",
    "enmp inspect DIR...": "enmp inspect adapters/reviews adapters/spam",
    "enmp report DIR...": "enmp report runs/second runs/mine",
    "enmp search RUN --plan": "enmp search run.yaml --plan",
}  # fmt: skip
"""What stands for something else on a page -> what is run."""
QUICK = {"generations": 2, "seeds": 1, "refine": None}


def write_run(path, page, **more):
    """The run file that a page shows, with a short search at one scale; ``more`` in other sections."""
    run = yaml.safe_load(of(ROOT / "docs" / page, "yaml")[0].text)
    for section, values in {"search": QUICK, "merge": {"scale": 0.5}, **more}.items():
        run[section] = run.get(section, {}) | values
    path.write_text(yaml.safe_dump(run))


def classifiers(root):
    doc_files.save_all(root)
    write_run(root / "run.yaml", "quickstart.md")
    for seed, name in enumerate(("BASE", "TUNED_A", "TUNED_B")):
        doc_files.save_base(root / name, seed)
        config = root / name / "config.json"  # a model without a head, which is all that its files have
        config.write_text(config.read_text().replace("BertForSequenceClassification", "BertModel"))


def questions(n, seed, **more):
    """Lines of a jsonl file; all are of one length, so that there is one shape to compile for."""
    return [{"prompt": f"the cat {seed}{i:02} is", "answer": "red"} | more for i in range(n)]


def chat(root):
    sizes = {key: value for key, value in gguf_files.SIZES.items() if key != "vocab_size"}
    name = yaml.safe_load(of(ROOT / "docs/chat-adapters.md", "yaml")[0].text)["base"]["model"]
    generative_files.save_base(root / name, **sizes)
    generative_files.save_experts(
        root / "adapters", root / name, ("support", "german", "nli"), trained_on=name
    )
    settings = gguf_files.config()
    gguf_files.write(root / "model-Q4_K_M.gguf", settings, gguf_files.hf_tensors(settings))
    few = [(split, 4) for split in ("train", "search", "selection", "test")]
    for task in ("support", "german"):
        generative_files.write_splits(root / "data" / task, questions, few)
    choices = functools.partial(questions, choices=["red", "green"])
    generative_files.write_splits(root / "data/nli", choices, few)


def commands(pages):
    """Where, and what is run there, once each."""
    found = {}
    for page in pages:
        for line, command in printed(page):
            if not any(re.match(pattern, command) for pattern in NOT_RUN):
                found.setdefault(MEANT.get(command, command), f"{page.name}:{line}")
    return found


def run(place, command):
    """Run a command as a shell would; returns what it printed on standard output."""
    words, _, target = command.partition(" > ")
    program, *words = shlex.split(words)
    assert program == "enmp", f"{place}: {command}: what is no command of enmp stands in NOT_RUN"
    if "--out" in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        try:
            code = cli.main(words)
        except SystemExit as stopped:  # --help
            code = stopped.code
    assert not code, f"{place}: {command}"
    return told.getvalue(), target


@pytest.fixture
def without_pictures(monkeypatch):
    """A search draws for seconds, which tests/test_report.py looks at."""
    monkeypatch.setattr(write, "files", lambda chart: {})


@pytest.mark.usefixtures("without_pictures")
def test_the_commands_about_classifiers_run(tmp_path, monkeypatch):
    classifiers(tmp_path)
    monkeypatch.chdir(tmp_path)
    pages = sorted(
        PAGES, key=lambda page: page.name != "quickstart.md"
    )  # which makes what the others speak of
    for command, place in commands(page for page in pages if page.name not in CHAT).items():
        if "runs/second" in command and not (tmp_path / "runs/second").exists():
            shutil.copytree(tmp_path / "runs/first", tmp_path / "runs/second")
        told, target = run(place, command)
        assert not target or "models/base" in told, place  # enmp init; the page's run file is there filled in
    (block,) = of(ROOT / "README.md", "python")  # its first half is run by test_contributing.py
    exec("run = " + block.text.split("\n\nrun = ")[1], {"enmp": enmp})
    assert (tmp_path / "mask.json").exists() and (tmp_path / "runs/greedy/refined").is_dir()
    first = ("merged/heads/reviews.safetensors", "delta", "report.html", "controls.json")
    for made in ("plain", *(f"runs/first/{name}" for name in first)):
        assert (tmp_path / made).exists(), made


@pytest.mark.usefixtures("without_pictures")
def test_the_commands_about_generative_models_run(tmp_path, monkeypatch):
    chat(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in sorted(CHAT):
        write_run(
            tmp_path / "run.yaml", name, evaluation={"batch_size": 4}, train={"steps": 2, "epochs": None}
        )
        for command, place in commands([ROOT / "docs" / name]).items():
            run(place, command)
    for made in ("merged", "gguf/adapter.gguf", "model"):
        assert (tmp_path / "runs/chat" / made).exists(), made


def test_what_is_not_run_stands_on_a_page_and_has_its_reason():
    every = {command for page in PAGES for _, command in printed(page)}
    assert len(every) > 50 and MEANT.keys() <= every
    for pattern, reason in NOT_RUN.items():
        assert any(re.match(pattern, command) for command in every), pattern
        for path in re.findall(r"tests/\S+?\.py|\.ci/\w+", reason):
            assert (ROOT / path).exists(), path


def test_a_command_is_in_a_shell_block_or_in_a_sentence():
    for page in PAGES:
        for block in of(page, ""):
            assert not re.search(r"^(enmp|make|pip|gcloud|sbatch) ", block.text, re.MULTILINE), page.name
