"""The test files with cases for a card, what matters most first: ``python bench/gpu_tests.py``.

Found by what they import, helpers included: where a marker ``gpu`` is, and whether a package that
the file cannot be imported without is missing. Such files are named on the standard error and left
out; what a test imports when it runs is not looked at.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path

__all__ = ["files", "missing"]

_ROOT = Path(__file__).resolve().parents[1]
# The time may end before the tests do, and most of it goes into compiling Triton's kernels.
_FIRST = (
    "test_cuda.py", "test_topk_mask_cuda.py", "test_capturable_cuda.py", "test_masked_grad.py",
    "test_masked_grad_roads.py", "test_fisher_cuda.py",
)  # fmt: skip


def files(tests: Path) -> list[Path]:
    """Return every test file that has cases for a card, in the order in which they are to run.

    Args:
        tests: the folder of the tests.
    """
    found = [file for file in tests.glob("test_*.py") if any(map(_is_marked, _local(file, tests)))]
    order = {name: place for place, name in enumerate(_FIRST)}
    return sorted(found, key=lambda file: (order.get(file.name, len(order)), file.name))


def missing(file: Path, tests: Path) -> list[str]:
    """Return the packages that a test file cannot be imported without, and that are not installed.

    Args:
        file: one of `files`.
        tests: the folder of the tests.
    """
    names = {name for module in _local(file, tests) for name in _imported(module, tests)}
    outside = {name.split(".")[0] for name in names if not _modules(name, tests)}
    return sorted(name for name in outside if importlib.util.find_spec(name) is None)


def _local(file: Path, tests: Path) -> dict[Path, None]:
    """Return a test file and all of the helpers that it imports, directly or not."""
    seen, waiting = {}, [file]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen[module] = None
            waiting += [m for name in _imported(module, tests) for m in _modules(name, tests)]
    return seen


@functools.cache
def _imported(module: Path, tests: Path) -> list[str]:
    """Return the full names that a module imports whenever it is imported."""
    package = module.relative_to(tests).parent.parts
    names = []
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            names.append(base)
            if _modules(base, tests):  # a name may be a module, too
                names += [f"{base}.{alias.name}" for alias in node.names]
    return names


@functools.cache
def _modules(name: str, tests: Path) -> list[Path]:
    """Return the files behind a name, its packages' included; none if it is not in the folder."""
    parts = name.split(".")
    places = [tests.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    both = [file for p in places for file in (p / "__init__.py", p.with_suffix(".py"))]
    return [file for file in both if file.is_file()]


@functools.cache
def _is_marked(module: Path) -> bool:
    mark = "pytest.mark.gpu"
    return mark in module.read_text() and any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == mark
        for node in ast.walk(_tree(module))
    )


@functools.cache
def _tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text())


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    for path in files(_ROOT / "tests"):
        if lacking := missing(path, _ROOT / "tests"):
            needs = f"{path.name} needs {', '.join(lacking)}, which is not installed"
            print(f"not run: {needs}", file=sys.stderr)
        else:
            print(path.relative_to(_ROOT))
