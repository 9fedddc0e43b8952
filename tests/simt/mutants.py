"""Find the places where a kernel source can be made subtly wrong: one small edit each.

Every barrier, fence, warp sync, acquire and release is removed or weakened in turn; comparisons,
bounds checks and off-by-ones are shifted. Only text is read: `clang-format`, which CI enforces,
makes that safe (a binary `<` has spaces around it, a template's has none).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SYNCHRONISATION = "synchronisation"
ARITHMETIC = "arithmetic"


@dataclass(frozen=True)
class Mutant:
    """One edit: `text[start:end]` of a file becomes `replacement`."""

    file: str
    line: int
    group: str  # SYNCHRONISATION or ARITHMETIC
    start: int
    end: int
    original: str
    replacement: str
    context: str  # the code of its line and both neighbours, in one line

    @property
    def edit(self) -> str:
        """What becomes what."""
        return f"{' '.join(self.original.split())} -> {self.replacement or 'nothing'}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.edit}"

    def apply(self, text: str) -> str:
        """Return the source with this edit."""
        return text[: self.start] + self.replacement + text[self.end :]


def find_mutants(file: str, text: str) -> list[Mutant]:
    """Return all mutants of a source, in the order of the text.

    Args:
        file: Its name, for the reports.
        text: The source, formatted by clang-format.
    """
    code = blank_static_asserts(blank_comments(text))
    lines = code.splitlines()
    edits = [(SYNCHRONISATION, *edit) for edit in _synchronisation_edits(code)]
    edits += [(ARITHMETIC, *edit) for edit in _arithmetic_edits(code)]
    mutants = []
    for group, start, end, replacement in sorted(edits, key=lambda edit: edit[1:]):
        line = text.count("\n", 0, start) + 1
        context = " ".join(" ".join(lines[max(0, line - 2) : line + 1]).split())
        mutants.append(Mutant(file, line, group, start, end, text[start:end], replacement, context))
    return mutants


def blank_comments(text: str) -> str:
    """Replace comments, strings and preprocessor lines by spaces; positions stay."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#(?:\\\n|[^\n])*"
    return re.sub(pattern, _spaces, text, flags=re.DOTALL | re.MULTILINE)


def blank_static_asserts(code: str) -> str:
    """Replace static assertions by spaces: wrong ones are the compiler's business."""
    for start, _, end in list(_calls(code, r"static_assert")):
        code = code[:start] + " " * (end - start) + code[end:]
    return code


def _spaces(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def split_arguments(code: str, open_parenthesis: int) -> tuple[list[str], int]:
    """Split a call at its commas; returns the arguments and the position after it."""
    arguments, depth, begin = [], 0, open_parenthesis + 1
    for position in range(open_parenthesis, len(code)):
        character = code[position]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if depth == 0 or (depth == 1 and character == ","):
            arguments.append(code[begin:position].strip())
            begin = position + 1
        if depth == 0:
            return arguments, position + 1
    raise ValueError(
        f"unbalanced parentheses at {code[open_parenthesis : open_parenthesis + 60]!r}"
    )


Edit = tuple[int, int, str]  # start, end, replacement


def _calls(code: str, names: str) -> Iterator[tuple[int, list[str], int]]:
    for match in re.finditer(rf"(?<![\w:.])(?:{names})\s*\(", code):
        arguments, end = split_arguments(code, match.end() - 1)
        yield match.start(), arguments, end


def _synchronisation_edits(code: str) -> Iterator[Edit]:
    removed = r"__syncthreads|__syncwarp|__threadfence(?:_block|_system)?"
    for start, _, end in _calls(code, removed):
        yield start, end, "((void)0)"
    # The barrier goes, the thread's own predicate stays.
    for start, arguments, end in _calls(code, r"__syncthreads_(?:or|and|count)"):
        yield start, end, f"(({arguments[0]}) != 0)"
    for name, weaker in [("ld_acquire", "load"), ("st_release", "store")]:
        for start, _, _ in _calls(code, name):
            for kind in ("plain", "relaxed"):
                yield start, start + len(name), f"mutants::{kind}_{weaker}"


# The neighbours of each comparison.
_SHIFTED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def _arithmetic_edits(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"(?<= )(<|<=|>|>=|==|!=)(?=[ \n])", code):
        yield match.start(), match.end(), _SHIFTED[match.group()]
    # Off by one.
    for match in re.finditer(r" [+-] 1(?:u|ull|LL)?\b(?!\.)", code):
        yield match.start(), match.end(), ""
    # A bound that is not respected.
    for start, arguments, end in _calls(code, r"min|max"):
        if len(arguments) == 2:
            for argument in arguments:
                yield start, end, f"({argument})"
    for match in re.finditer(r"[\w.\[\]]+ < [\w.]+(?=\s(?:&&|\?)\s)", code):
        yield match.start(), match.end(), "true"
    # Nothing is skipped.
    for start, _, end in _calls(code, r"if"):
        if re.match(r"\s+(return|continue)\b", code[end:]):
            yield start, end, "if (false)"
