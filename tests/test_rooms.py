"""The house stands: every import goes down, and no two modules import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "enmp_jax"

# Rooms of one line may not import each other; a room may import those of the lines above its own.
ROOMS = (
    ("errors", "version"),
    ("io", "config", "devices", "module_paths"),
    ("lora", "deltas", "masks", "report"),
    ("merges", "models", "search"),
    ("adapters", "data"),
    ("evaluation",),
    ("training",),
    ("runs",),
    ("integrations",),
    ("cli", "api"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# deltas are made of LoRA pairs, masks choose among them; downloads are told by progress bars
WITHIN = {("deltas", "lora"), ("masks", "lora"), ("config", "io"), ("devices", "io")}
OUTSIDE = ("suites",)  # scripts that made what is packaged; no room imports them


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in OUTSIDE and parts != ("__init__",):
            yield ".".join(("enmp_jax", *parts)).removesuffix(".__init__"), path


def imports(path):
    """Modules of the package that a file imports, those inside functions and TYPE_CHECKING included."""
    known = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "enmp_jax")


GRAPH = {name: sorted(set(imports(path)) - {name}) for name, path in modules()}


def backward(graph):
    """Imports against the order of the rooms."""
    found = []
    for name, targets in graph.items():
        for target in targets:
            here, there = name.split(".")[1], [*target.split("."), "__init__"][1]
            if here == there:
                continue
            if LEVEL.get(there, 99) >= LEVEL[here] and (here, there) not in WITHIN:
                found.append(f"{name} imports {target}")
    return found


def test_every_room_has_its_place():
    rooms = {name.split(".")[1] for name in GRAPH}
    assert rooms == set(LEVEL)


def test_imports_go_down_only():
    assert backward(GRAPH) == []


def test_no_module_imports_itself_through_others():
    # a package's face (its __init__) may name its own modules, which import each other directly
    graph = {name: [t for t in targets if not name.startswith(t + ".")] for name, targets in GRAPH.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_check_sees_an_import_that_goes_up():
    assert backward({"enmp_jax.merges.ties": ["enmp_jax.runs.search"]}) == [
        "enmp_jax.merges.ties imports enmp_jax.runs.search"
    ]
