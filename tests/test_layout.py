"""The house's rules, by reading: who imports whom, no circles, lengths, a stem per operation.

A package of fishfast/ imports only from packages above it in `FLOORS`. An import under
``if TYPE_CHECKING`` or within a function counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fishfast"
FLOORS = (
    "files", "mask", "fisher", "training", "optim", "delta", "hub", "report", "demo", "cli",
)  # fmt: skip
# What uses the package as its users do.
USERS = ("demo", "cli")
OPERATIONS = ("fisher", "masked_grad", "sparse_adam", "sparse_sgd", "topk_mask")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                if inside in known:
                    yield inside
                elif node.module in known:
                    yield node.module


GRAPH = {name: set(imports(path.read_text(), MODULES)) for name, path in MODULES.items()}


def floor(module: str) -> int:
    """Return how low a module's package is; -1 for what lies beside the packages."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else -1


def upward(graph: dict[str, set[str]]) -> list[str]:
    found = []
    for module, imported in graph.items():
        if module in ("fishfast", "fishfast.__main__"):
            continue
        for other in imported:
            as_a_user = other == "fishfast" and module.split(".")[1] in USERS
            if (other == "fishfast" and not as_a_user) or floor(other) > floor(module):
                found.append(f"{module} imports {other}")
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        reach[start] = seen
    groups = [{b for b in reach[a] if a in reach[b]} for a in graph if a in reach[a]]
    return [group for i, group in enumerate(groups) if group not in groups[:i]]


def test_every_package_has_its_floor() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(FLOORS)


def test_imports_go_upwards_only() -> None:
    assert upward(GRAPH) == []


def test_there_is_no_circle() -> None:
    inside = {m: {o for o in found if o != "fishfast"} for m, found in GRAPH.items()}
    del inside["fishfast"]
    assert circles(inside) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from fishfast.optim.base import SparseOptimizer", "fishfast.optim.base"),
        ("from fishfast.optim import base", "fishfast.optim.base"),
        ("if TYPE_CHECKING:\n    import fishfast.optim.base", "fishfast.optim.base"),
        ("def f():\n    from fishfast.optim import base", "fishfast.optim.base"),
    ],
)
def test_the_rules_see_every_kind_of_import(source: str, expected: str) -> None:
    found = set(imports(source, MODULES))
    assert found == {expected}
    assert upward({"fishfast.files.atomic": found}) == [f"fishfast.files.atomic imports {expected}"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


@pytest.mark.parametrize("folder", ["fishfast", "kernels", "csrc"])
def test_no_file_is_over_400_lines(folder: str) -> None:
    files = [
        p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}
    ]
    assert files
    long = {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_one_stem_in_every_room(operation: str) -> None:
    assert [*(ROOT / "csrc").glob(f"{operation}*"), *(ROOT / "kernels").glob(f"{operation}*.py")]
    homes = [*PACKAGE.rglob(f"{operation}.py"), *PACKAGE.glob(operation)]
    assert len(homes) == 1
    assert list((ROOT / "tests").glob(f"test_{operation}*.py"))
    if operation != "sparse_sgd":  # is timed beside AdamW, in bench_host_step.py
        assert list((ROOT / "bench").glob(f"bench_{operation}*.py"))


def test_nothing_lies_beside_the_packages_but_what_all_use() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py", "__main__.py", "_backend.py", "_lazy.py", "_processes.py", "_tables.py",
        "_version.py", "_wrappers.py",
    }  # fmt: skip
