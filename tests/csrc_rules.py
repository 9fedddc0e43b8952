"""What a CUDA source must obey to mean the same on a card and on the simulator, by reading it.

Each rule takes the text of files and returns what breaks it. The text is clang-format's, which CI
enforces; comments, strings and preprocessor lines are blanked where only code counts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from simt.mutants import blank_comments, split_arguments

MACHINE_DEPENDENT = re.compile(
    r"<<<|\basm\b|__shared__|\bvolatile\b|__activemask|\bcudaLaunch\w*"
    r"|\b__atomic_\w+|\bstd::atomic\b|\bcuda::|\bcooperative_groups\b|\bthis_grid\b"
)
INCLUDES = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|cub|thrust|cooperative_groups|cuda)')
OWN_ROUNDING = (
    r"set_source_files_properties\(csrc/{}_cpu\.cpp "
    r"PROPERTIES COMPILE_OPTIONS -ffp-contract=fast\)"
)
COLLECTIVE = re.compile(r"\b(__sync(threads|warp)\w*|__\w+_sync)\s*\(")
DEVICE_ONLY = re.compile(
    r"\b(threadIdx|blockIdx|__threadfence\w*|__syncthreads\w*|__syncwarp|__\w+_sync|ld_acquire"
    r"|st_release)\b"
)


def machine_dependent_words(text: str) -> list[str]:
    """What only platform.cuh may say: launches, shared memory, assembly, other people's atomics."""
    return [match.group() for match in MACHINE_DEPENDENT.finditer(blank_comments(text))]


def foreign_includes(text: str) -> list[str]:
    """Headers that the simulator does not have, or that would tie the build to a torch."""
    return [match.group() for match in INCLUDES.finditer(re.sub(r"//[^\n]*", "", text))]


def device_code_outside_kernels(text: str) -> list[str]:
    """Device code, which must be in .cu and .cuh: mutate.py breaks only those."""
    return [match.group() for match in DEVICE_ONLY.finditer(blank_comments(text))]


@dataclass(frozen=True)
class Function:
    """A function definition found in the text."""

    name: str
    kernel: bool
    arguments: str
    body: str  # with its braces
    start: int  # of the body, in the file


def functions(code: str) -> Iterator[Function]:
    """Find function definitions; methods too. `code` has its comments blanked."""
    for match in re.finditer(r"\b(\w+)\(", code):
        if match.group(1) in {"if", "for", "while", "switch", "__launch_bounds__", "decltype"}:
            continue
        try:
            arguments, end = split_arguments(code, match.end() - 1)
        except ValueError:
            continue
        after = re.match(
            r"\s*(const\s*)?(noexcept\s*)?(:[^;{}]*(\{[^;{}]*\}[^;{}]*)*)?\{", code[end:]
        )
        if not after:
            continue
        start = end + after.end() - 1
        begin = max(code.rfind(character, 0, match.start()) for character in ";}")
        kernel = "__global__" in code[begin + 1 : match.start()]
        body = code[start : closing_brace(code, start) + 1]
        yield Function(match.group(1), kernel, ", ".join(arguments), body, start)


def closing_brace(code: str, start: int) -> int:
    """Return the position of the brace that closes the one at `start`."""
    depth = 0
    for position in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[position], 0)
        if depth == 0:
            return position
    raise ValueError("unbalanced braces")


def _reaching(found: Mapping[str, list[Function]], seeds: re.Pattern[str]) -> set[str]:
    """Names of functions from which one that matches is called, however deep."""
    reaching = {name for name, bodies in found.items() if any(seeds.search(f.body) for f in bodies)}
    while True:
        calls = re.compile(r"\b(" + "|".join(map(re.escape, reaching or {"$"})) + r")\b\s*[(<]")
        more = {name for name, bodies in found.items() if any(calls.search(f.body) for f in bodies)}
        if more <= reaching:
            return reaching
        reaching |= more


def _by_name(texts: Mapping[str, str]) -> dict[str, list[Function]]:
    found: dict[str, list[Function]] = {}
    for text in texts.values():
        for function in functions(blank_comments(text)):
            found.setdefault(function.name, []).append(function)
    return found


def block_index_where_blocks_wait(texts: Mapping[str, str]) -> list[str]:
    """Functions that wait for another block, at any depth, and know their block's number.

    Blocks start in any order: one that waits for a lower blockIdx may keep it from ever starting.
    """
    found = _by_name(texts)
    waiting = _reaching(found, re.compile(r"\bld_acquire\s*\("))
    return sorted(
        name
        for name in waiting
        if any(re.search(r"\bblockIdx\b", function.body) for function in found[name])
    )


def polled_atomics(text: str) -> list[str]:
    """Loops that wait on an atomic, which orders nothing: flags are acquired."""
    code = blank_comments(text)
    loops = re.finditer(r"\bwhile\s*\(", code)
    conditions = [", ".join(split_arguments(code, match.end() - 1)[0]) for match in loops]
    return [condition for condition in conditions if re.search(r"\batomic\w+\(", condition)]


def uneven_blocks(text: str, headers: str = "") -> list[str]:
    """Launches whose block is not known to be a multiple of a warp; `headers` have constants."""
    code = blank_comments(text)
    constants = dict(
        re.findall(r"constexpr (?:int|unsigned|int64_t) (\w+) = ([^;]+);", headers + code)
    )
    bad = []
    for match in re.finditer(r"\bFF_LAUNCH\(", code):
        block = split_arguments(code, match.end() - 1)[0][2]
        size = re.sub(r"^dim3\((.*)\)$", r"\1", block)
        value = _evaluate(size, constants)
        if value is None or value <= 0 or value % 32 != 0:
            bad.append(block)
    return bad


def _evaluate(expression: str, constants: Mapping[str, str], depth: int = 0) -> int | None:
    """The value of an integer expression over constants of the file, or None."""
    if depth > 10:
        return None
    operators = {
        ast.Add: int.__add__,
        ast.Sub: int.__sub__,
        ast.Mult: int.__mul__,
        ast.LShift: int.__lshift__,
        ast.Div: int.__floordiv__,
    }

    def value(node: ast.expr) -> int | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in constants:
            return _evaluate(constants[node.id], constants, depth + 1)
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            left, right = value(node.left), value(node.right)
            if left is not None and right is not None:
                return operators[type(node.op)](left, right)
        return None

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


LAMBDA = re.compile(r"\[[^\[\]]*\]\s*(\([^()]*\))?\s*\{")


def returns_before_a_collective(texts: Mapping[str, str]) -> list[str]:
    """`return`s that can keep a thread from a barrier or warp collective behind them.

    A return counts as before a collective if it stands before it, or in a loop that has one. It is
    allowed where all threads of the block go together, which a comment on its line must say with
    the words "whole block" or "whole grid".
    """
    calling = _reaching(_by_name(texts), COLLECTIVE)
    names = "|".join(map(re.escape, calling or {"$"}))
    collective = re.compile(rf"{COLLECTIVE.pattern}|\b({names})\b\s*(<[^;()]*>)?\(")
    bad = []
    for file, text in texts.items():
        lines = text.splitlines()
        for function in functions(blank_comments(text)):
            if "FF_LAUNCH" in function.body:  # host code
                continue
            body = _without_lambdas(function.body)
            ends = [_end_of_loops(body, match.start()) for match in collective.finditer(body)]
            for match in re.finditer(r"\breturn\b", body):
                line = text.count("\n", 0, function.start + match.start())
                excused = re.search(r"//.*\bwhole (block|grid)\b", lines[line])
                statement_end = body.index(";", match.start())
                if any(statement_end < end for end in ends) and not excused:
                    bad.append(f"{file}:{line + 1}")
    return bad


def _without_lambdas(body: str) -> str:
    """Blank the `return`s of lambdas, which leave the lambda only."""
    for match in LAMBDA.finditer(body):
        start, end = match.end() - 1, closing_brace(body, match.end() - 1)
        inside = re.sub(r"\breturn\b", "      ", body[start:end])
        body = body[:start] + inside + body[end:]
    return body


def _end_of_loops(body: str, position: int) -> int:
    """The end of the outermost loop around a position; without one, the position."""
    for match in re.finditer(r"\b(for|while)\s*\(|\bdo\s*\{", body[:position]):
        opening = match.end() - 1
        if body[opening] == "(":
            _, opening = split_arguments(body, opening)
            opening += len(body[opening:]) - len(body[opening:].lstrip())
        if body[opening : opening + 1] == "{":
            end = closing_brace(body, opening)
        else:  # a loop of one statement
            end = body.index(";", opening)
        if opening < position < end:
            return end
    return position


def contractible_products(text: str) -> list[str]:
    """Infix products in a header of shared arithmetic, which nvcc could fuse with a sum.

    A header that includes rounding.h writes mul_rn and fma_rn; it has no business with `*`.
    """
    if '#include "rounding.h"' not in text:
        return []
    return re.findall(r"[\w)\]]\s+\*=?\s+[\w(&-]+", blank_comments(text))


def inexact_flags(cmake: str, kernels: Collection[str] = ()) -> list[str]:
    """Flags that let the machines round differently, or the absence of the one that does not.

    A C++ file whose operation is none of the CUDA kernels, "foo.cu", may fuse what it likes.
    """
    cmake = re.sub(r"#[^\n]*", "", cmake)
    for stem in re.findall(OWN_ROUNDING.format(r"(\w+)"), cmake):
        if f"{stem}.cu" not in kernels:
            cmake = re.sub(OWN_ROUNDING.format(stem), "", cmake)
    bad = re.findall(
        r"-?-use_fast_math|-ffast-math|-Ofast|-funsafe-math\S*|-ffp-contract=(?!off)\S*", cmake
    )
    bad += re.findall(r"--?(?:fmad|prec-div|prec-sqrt|ftz)=\S+", cmake)
    if not re.search(r"FISHFAST_CXX_FLAGS [^)]*-ffp-contract=off", cmake):
        bad.append("no -ffp-contract=off in FISHFAST_CXX_FLAGS")
    if not re.search(
        r"target_compile_options\(_C [^)]*COMPILE_LANGUAGE:CXX\S*FISHFAST_CXX_FLAGS", cmake
    ):
        bad.append("FISHFAST_CXX_FLAGS are not used")
    return bad
