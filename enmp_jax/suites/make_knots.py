"""Write the ``knots-*.yaml`` run files: ``python -m enmp_jax.suites.make_knots`` (they differ in few lines).

Sources: adapters, their hub ids and ranks from KnOTS (Stoica et al., arXiv 2410.19735, "hoffman-lab" on the
hub); merge settings and validation shares from the configurations of the reference code of ENMP (Cao et
al., arXiv 2604.17753), which has none for ViT-L/14 and CART; averages of Llama-3-8B from that paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POPULATION, GENERATIONS = 16, 60  # the paper's; its code's default is 8 x 30


@dataclass(frozen=True)
class Data:
    """A task's data: source, splits (search, selection, test) and the number of search examples."""

    source: str
    splits: tuple[str, str, str]
    search_examples: int
    more: str = ""
    head: str = ""
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A merge section for vision and Llama; ``None``: the reference has no setting."""

    title: str
    merge: dict[str, str]
    vision: str | None
    llama: str | None
    vision_more: dict[str, str]
    llama_more: dict[str, str]
    published: tuple[str, str] | None = None


def _tail(size: int, share: int) -> tuple[tuple[str, str, str], int]:
    """The reference's validation share of the test split, halved into search and selection."""
    half = share / 2
    text = f"{half:g}"
    return (f"test[:{text}%]", f"test[{text}%:{share}%]", f"test[{share}%:]"), round(size * half / 100)


_OWN = ("validation[:50%]", "validation[50%:]", "test")
VISION = {
    "stanford_cars": Data(
        "hf:tanganke/stanford_cars", *_tail(8041, 20), note="TFDS's own download of cars196 is broken"
    ),
    "dtd": Data("tfds:dtd", _OWN, 940),
    "eurosat": Data(
        "tfds:eurosat/rgb", ("train[80%:85%]", "train[85%:90%]", "train[90%:]"), 1350,
        note="TFDS has no other split: as many rows as in the reference, but the adapter may have seen some",
    ),
    "gtsrb": Data("hf:tanganke/gtsrb", *_tail(12630, 20), note="not in TFDS"),
    "mnist": Data("tfds:mnist", *_tail(10000, 20)),
    "resisc45": Data("hf:timm/resisc45", _OWN, 3150, note="TFDS has a train split only"),
    "sun397": Data("tfds:sun397/standard-part1-120k", *_tail(19850, 20)),
    "svhn": Data("tfds:svhn_cropped", *_tail(26032, 20)),
}  # fmt: skip

# KnOTS trained three classes for every task: entailment, neutral, contradiction.
_TWO_WAY = ", labels: [0, 2]"
LLAMA = {
    "snli": Data("tfds:snli", ("validation[:512]", "validation[512:1024]", "test"), 512,
                 ", text: [premise, hypothesis]"),
    "mnli": Data("tfds:glue/mnli",
                 ("validation_matched[80%:90%]", "validation_matched[90%:]", "validation_matched[:80%]"), 982,
                 ", text: [premise, hypothesis]"),
    "sick": Data("hf:sick@refs/convert/parquet", _OWN, 248, ", text: [sentence_A, sentence_B]",
                 note="not in TFDS"),
    "qnli": Data("hf:SetFit/qnli", ("validation[:10%]", "validation[10%:20%]", "validation[20%:]"), 546,
                 ", text: [text1, text2]" + _TWO_WAY, ", masked_classes: [1]",
                 note="what the adapter was trained on: its order of question and sentence counts"),
    "rte": Data("tfds:glue/rte", ("validation[:25%]", "validation[25%:50%]", "validation[50%:]"), 69,
                ", text: [sentence1, sentence2]" + _TWO_WAY, ", masked_classes: [1]"),
    "scitail": Data("tfds:sci_tail", _OWN, 652, ", text: [premise, hypothesis]", ", masked_classes: [2]"),
}  # fmt: skip

METHODS = {
    "tv": Method("task arithmetic", {"method": "sum"}, "0.1", "0.3", {}, {}, ("90.25", "93.49")),
    "ties": Method(
        "TIES", {"method": "ties"}, "0.3", "1.2", {"density": "0.4"}, {"density": "0.8"}, ("89.99", "96.39")
    ),
    "dare-ties": Method(
        "DARE-TIES", {"method": "dare_ties", "drop_rate": "0.1"}, "0.3", "1.1", {"density": "0.2"},
        {"density": "0.8"}, ("89.20", "96.17"),
    ),
    "tsv": Method("TSV", {"method": "tsv"}, "0.3", "0.6", {}, {}),
    "iso": Method("Iso-C", {"method": "iso"}, "4.0", "2.8", {}, {}),
    "knots-ties": Method(
        "TIES in KnOTS space", {"method": "ties", "space": "knots", "density": "0.9"}, "0.6", "1.1", {}, {},
        ("92.47", "97.29"),
    ),
    "core-tsv": Method(
        "TSV in Core space", {"method": "tsv", "space": "core"}, "0.9", "0.5", {"isotropize": "true"}, {},
        ("94.18", "96.73"),
    ),
    "cart": Method("CART", {"method": "cart"}, None, None, {}, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A base model with its tasks."""

    base: str
    adapter: str
    dtype: str
    tasks: dict[str, Data]
    head: str
    batch: int
    scales_for: str
    cost: str


SUITES = {
    "knots-vit-b-32": Suite(
        "openai/clip-vit-base-patch32", "hoffman-lab/KnOTS-ViT-B-32_lora_R16_{}", "float32", VISION,
        "zero-shot", 128, "ViT-B/32", "",
    ),
    "knots-vit-l-14": Suite(
        "openai/clip-vit-large-patch14", "hoffman-lab/KnOTS-ViT-L-14_lora_R16_{}", "float32", VISION,
        "zero-shot", 64, "ViT-B/32 (there are none for ViT-L/14)", "",
    ),
    "knots-llama-3-8b": Suite(
        "meta-llama/Meta-Llama-3-8B", "hoffman-lab/KnOTS-Llama3_8B_lora_R16_{}", "bfloat16", LLAMA, "adapter",
        16, "Llama-3-8B", " The reference takes 69 s a mask on an RTX 4090.",
    ),
}  # fmt: skip


def files() -> dict[str, str]:
    """File name -> content of every ``knots-*`` run file."""
    made = {}
    for suite_name, suite in SUITES.items():
        llama = suite.tasks is LLAMA
        for name, method in METHODS.items():
            # for vision, the reference makes Core TSV isotropic
            full = f"{name}-iso" if name == "core-tsv" and not llama else name
            made[f"{suite_name}-{full}.yaml"] = _file(f"{suite_name}-{full}", suite, method, llama)
    return made


def _file(name: str, suite: Suite, method: Method, llama: bool) -> str:
    scale = method.llama if llama else method.vision
    more = method.llama_more if llama else method.vision_more
    title = method.title + (", isotropic" if "isotropize" in more else "")
    lines = [f"# {title}: the KnOTS adapters on {suite.base}.", "#"]
    lines += [f"#   enmp search {name} --out runs/{name}", f"#   enmp search {name} --dry-run", "#"]
    examples, masks = sum(data.search_examples for data in suite.tasks.values()), POPULATION * GENERATIONS
    lines += _wrap(
        f"Cost: {masks:,} masks x about {examples:,} search examples, and once the test splits. Not yet "
        "run here for want of a network to fetch weights and data." + suite.cost
    )
    if llama and method.published:
        before, after = method.published
        lines += _wrap(
            f"Published (paper of ENMP, average normalised accuracy in %): {before} merged, {after} "
            "with ENMP."
        )
    else:
        lines += _wrap("Published figures to compare with: see the paper of ENMP; none are recorded here.")
    if scale is None:
        lines += _wrap(
            "The reference has no settings for CART: its code's rank and coefficient, scale by search."
        )
    else:
        lines += _wrap(f"Settings: the reference's for {suite.scales_for}.")
    lines += _wrap(
        "Validation shares are the reference's; which rows they are is not (it keeps lists of indices). "
        "Half of them search, half select. Data sets that repeat an example lose it from search or "
        "selection, not from test."
    )
    lines += _wrap("Needs pip install 'enmp-jax[hf]' for the hf: data" + _GATED[llama])
    lines += ["", "base:", f"  model: {suite.base}", f"  dtype: {suite.dtype}", "", "tasks:"]
    for task, data in suite.tasks.items():
        lines += _task(task, data, suite)
    settings = {**method.merge, **more, "scale": scale or "auto"}
    lines += ["", "merge:", *(f"  {key}: {value}" for key, value in settings.items())]
    lines += [
        "", "search:", "  strategy: cma_es", f"  population: {POPULATION}", f"  generations: {GENERATIONS}",
        "  sigma0: 0.5", "  max_pruned: 0.2", "  fitness: accuracy", "",
        "evaluation:", f"  batch_size: {suite.batch}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


_GATED = {True: ", and access to the gated base model (HF_TOKEN).", False: "."}


def _task(task: str, data: Data, suite: Suite) -> list[str]:
    search, selection, test = data.splits
    prompts = f", prompts: {task}" if suite.head == "zero-shot" else ""
    length = ", max_length: 2000" if suite.tasks is LLAMA else ""
    note = f"  # {data.note}" if data.note else ""
    return [
        f"  - name: {task}{note}",
        f"    adapter: {suite.adapter.format(task)}",
        f'    data: {{source: "{data.source}", search: "{search}", selection: "{selection}", test: "{test}"'
        f"{data.more}{length}, duplicates: drop}}",
        f"    head: {{source: {suite.head}{prompts}{data.head}}}",
    ]


def _wrap(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 108, initial_indent="# ", subsequent_indent="# ")


def main() -> None:
    """Write the files beside this one."""
    for name, content in files().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
