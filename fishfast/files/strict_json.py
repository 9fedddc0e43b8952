"""JSON that names nothing twice: the standard library keeps the last value and says nothing."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["names_once"]


def names_once(
    problem: Callable[[str], str],
) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    """Return an ``object_pairs_hook`` for `json.loads` that refuses a name that is there twice.

    Args:
        problem: gives the error's text for a name; the hook raises ValueError with it.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries: dict[str, object] = {}
        for name, value in pairs:
            if name in entries:
                raise ValueError(problem(name))
            entries[name] = value
        return entries

    return unique
