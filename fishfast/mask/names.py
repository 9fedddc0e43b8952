"""Names of parameters: how ``keep`` and ``exclude`` select them, and their natural order."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["match_names", "natural", "split_by_rule"]


def match_names(
    entries: str | Iterable[str],
    names: Sequence[str],
    argument: str,
    aliases: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the parameter names that the entries select, in the order of ``names``.

    An entry is a path ("classifier" is every parameter under that module, "classifier.bias" is
    one parameter) or a glob on full names ("*.bias"). A path is never a substring: "fc" does not
    match "mlp.fc1.weight".

    Args:
        entries: one entry or several.
        names: all parameter names.
        argument: what the caller calls the entries, for the error message.
        aliases: further names of tied parameters -> the one of ``names``; entries may use them.

    Returns:
        The matching names.

    Raises:
        TypeError: no string and no iterable of strings.
        ValueError: an entry that matches nothing.
    """
    if not isinstance(entries, Iterable):
        raise TypeError(
            f"{argument} must be a path, a glob or an iterable of them; got {entries!r}; "
            f"leave {argument} out to name nothing"
        )
    aliases = aliases or {}
    known = [*names, *aliases]
    matched: set[str] = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} entries must be strings; got {entry!r}")
        found = _under_path(entry, known)
        if not found and any(character in entry for character in "*?["):
            found = set(fnmatch.filter(known, entry))
        if not found:
            modules = {name.rpartition(".")[0] for name in names}
            near = difflib.get_close_matches(entry, [*names, *sorted(modules - {""})], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"{argument} entry {entry!r} matches no parameter (a module or parameter path, or "
                "a glob on full names such as '*.bias'; a tied weight goes by its first name)"
                f"{hint}"
            )
        matched |= {aliases.get(name, name) for name in found}
    return [name for name in names if name in matched]


def _under_path(path: str, names: Sequence[str]) -> set[str]:
    """Return the names that are ``path`` itself or lie under the module ``path``."""
    return {name for name in names if name == path or name.startswith(path + ".")}


def split_by_rule(
    names: Sequence[str],
    keep: str | Iterable[str],
    exclude: str | Iterable[str],
    aliases: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Return the names that are always in the mask and those that compete for the rest.

    Args:
        names: all parameter names.
        keep: entries that are always in the mask.
        exclude: entries that are never in it.
        aliases: as in `match_names`.

    Returns:
        ``(kept, eligible)``, each in the order of ``names``.

    Raises:
        ValueError: a name that is both kept and excluded.
    """
    kept = match_names(keep, names, "keep", aliases)
    excluded = match_names(exclude, names, "exclude", aliases)
    if both := [name for name in kept if name in set(excluded)]:
        raise ValueError(f"keep and exclude must not overlap; both match {both[0]!r}")
    taken = {*kept, *excluded}
    return kept, [name for name in names if name not in taken]


def natural(name: str) -> list[Any]:
    """Return a key that sorts ``layer.2`` before ``layer.10``: a file has lost the model's order.

    Args:
        name: of a parameter.

    Returns:
        Its parts, numbers as numbers.
    """
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]
