"""Imports flow one way: no cycles between the modules of the package, none inside functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_tsc

ROOT = Path(hf_tsc.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = [
    "errors",
    "axes",
    "permutation",
    "activations",
    "matching",
    "passes",
    "curve",
    "curve_trainer",
    "tsc_trainer",
]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def imports(name: str) -> set[str]:
    """The modules of the package that a module names in its import statements, at any depth."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys() or {source}
    return found & MODULES.keys()


GRAPH = {name: imports(name) for name in MODULES}


def reachable(name: str) -> set[str]:
    return GRAPH[name].union(*(reachable(other) for other in GRAPH[name]))


def test_there_is_something_to_look_at():
    assert len(FILES) > 15
    assert GRAPH["hf_tsc.tsc_trainer"] >= {"hf_tsc.passes", "hf_tsc.curve"}
    assert "hf_tsc.axes" in reachable("hf_tsc.tsc_trainer")


def test_no_cycles():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError with the cycle


def test_lower_layers_know_nothing_of_upper_ones():
    for height, name in enumerate(LAYERS):
        assert reachable(f"hf_tsc.{name}") & {f"hf_tsc.{upper}" for upper in LAYERS[height:]} == set()


@pytest.mark.parametrize("name", MODULES)
def test_no_import_inside_a_function(name):
    functions = [
        n for n in ast.walk(MODULES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    inside = [f"line {n.lineno}" for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert inside == []


PRINTING = ("hf_tsc.cli", "hf_tsc.cli_arguments", "hf_tsc.demo")


@pytest.mark.parametrize("name", [name for name in MODULES if name not in PRINTING])
def test_only_the_command_line_prints(name):
    calls = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.Call)]
    assert [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"] == []
