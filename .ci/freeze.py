"""Prints constraints.txt: the versions in the environment that runs it, but for what torch chooses.

    make constraints

torch comes by itself (TORCH in the Makefile), and each of its builds asks for a triton, a sympy and
CUDA packages of its own: pinned here they would refuse every other torch. A version that does not
support Python 3.10 gets a marker; older Pythons take what pip finds for them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OF_TORCH = re.compile(r"torch|triton|sympy|mpmath|setuptools|nvidia-.*|cuda-.*")
NOT_OF_TESTS = re.compile(r"pip|wheel|fishfast")


def pins() -> dict[str, str]:
    """Return name -> line."""
    lines = {}
    for found in importlib.metadata.distributions():
        name = canonicalize_name(found.metadata["Name"])
        if OF_TORCH.fullmatch(name) or NOT_OF_TESTS.fullmatch(name):
            continue
        allowed = SpecifierSet(found.metadata["Requires-Python"] or "")
        first = next(python for python in PYTHONS if allowed.contains(f"{python}.99"))
        marker = f' ; python_version >= "{first}"' if first != PYTHONS[0] else ""
        lines[name] = f"{name}=={Version(found.version).public}{marker}"
    return lines


def main() -> None:
    """Print the head and the lines, in order of names."""
    torch, triton = map(importlib.metadata.version, ("torch", "triton"))
    python = platform.python_version()
    print("# The versions that the tests were run with: pip install -c constraints.txt ...")
    print(f"# Made by `make constraints`, {datetime.date.today()}, Python {python},")
    print(f"# torch {torch}, triton {triton}; these two are not in it: .ci/freeze.py says why.")
    for _, line in sorted(pins().items()):
        print(line)


if __name__ == "__main__":
    main()
