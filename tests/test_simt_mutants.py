"""Three mutants of the shipped kernels, other ones in each run, are caught by their checks.

`make mutants` runs them all.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from simt.build import HERE
from simt.check import shipped_stems
from simt.equivalent_mutants import Equivalent
from simt.mutants import ARITHMETIC, SYNCHRONISATION, find_mutants
from simt.mutate import Judge, Target, all_cases, misfits, run, sample, target_of

SEED = int(os.environ.get("FISHFAST_MUTANT_SEED") or random.SystemRandom().randrange(10**6))

KERNEL = """\
#include "platform.cuh"
static_assert(kThreads - 1 < 256);
// __syncthreads(); in a comment
__global__ void kernel(const int* in, unsigned* flag, int64_t n) {
  __syncthreads();
  if (__syncthreads_or(in[0] == 3)) return;
  const int64_t end = min(n, limit(n, 2));
  for (int64_t i = 0; i < end; ++i) st_release(&flag[i + 1], 1u);
  __syncwarp(0xffu); __threadfence();
  const int x = i < n && ld_acquire(&flag[0]) > 0 ? in[i] : 0;
}
"""
MUTANTS = [
    "5: __syncthreads() -> ((void)0)",
    "6: if (__syncthreads_or(in[0] == 3)) -> if (false)",
    "6: __syncthreads_or(in[0] == 3) -> ((in[0] == 3) != 0)",
    "6: == -> !=",
    "7: min(n, limit(n, 2)) -> (limit(n, 2))",
    "7: min(n, limit(n, 2)) -> (n)",
    "8: < -> <=",
    "8: st_release -> mutants::plain_store",
    "8: st_release -> mutants::relaxed_store",
    "8: + 1 -> nothing",
    "9: __syncwarp(0xffu) -> ((void)0)",
    "9: __threadfence() -> ((void)0)",
    "10: i < n -> true",
    "10: < -> <=",
    "10: ld_acquire -> mutants::plain_load",
    "10: ld_acquire -> mutants::relaxed_load",
    "10: > -> >=",
]


def test_three_mutants_are_caught() -> None:
    cases = sample(all_cases([target_of(stem) for stem in shipped_stems()]), 3, SEED)
    print(f"repeat with FISHFAST_MUTANT_SEED={SEED}")  # pytest shows it when the test fails
    assert len({mutant for _, mutant in cases}) == 3
    survivors = [
        str(verdict.mutant) for verdict in run(cases, control=False) if not verdict.caught_by
    ]
    assert not survivors, f"FISHFAST_MUTANT_SEED={SEED}"


def test_every_entry_of_the_equivalent_ones_fits_one_mutant() -> None:
    assert misfits(all_cases([target_of(stem) for stem in shipped_stems()])) == []


def test_every_kind_of_edit_is_found() -> None:
    found = find_mutants("a.cu", KERNEL)
    assert [str(mutant) for mutant in found] == [f"a.cu:{line}" for line in MUTANTS]
    for mutant in found:
        assert mutant.apply(KERNEL).count("\n") == KERNEL.count("\n")
        assert mutant.apply(KERNEL) != KERNEL


def test_an_entry_must_say_which_mutant_it_means() -> None:
    target = target_of("samples")
    cases = [(target, mutant) for mutant in find_mutants("a.cu", KERNEL)]
    fits = Equivalent("a.cu", "< -> <=", "i < end", "")
    for_two = Equivalent("a.cu", "< -> <=", "i", "")
    for_none = Equivalent("a.cu", "__syncthreads() -> ((void)0)", "no such code", "")
    assert misfits(cases, [fits, for_two, for_none]) == [for_two, for_none]


def test_sample_depends_on_the_seed_and_prefers_synchronisation() -> None:
    cases = all_cases([target_of("samples")])
    assert sample(cases, 3, seed=1) == sample(cases, 3, seed=1)
    assert len({tuple(sample(cases, 3, seed)) for seed in range(20)}) > 10
    groups = [mutant.group for _, mutant in sample(cases, 3, seed=1)]
    assert groups == [SYNCHRONISATION, SYNCHRONISATION, ARITHMETIC]


def test_caught_and_surviving_mutants_are_told_apart(tmp_path: Path) -> None:
    """In samples.cu a barrier that matters, and one of two that stand in a row."""
    samples = HERE / "samples.cu"
    source = tmp_path / samples.name
    for header in HERE.glob("samples.h"):
        (tmp_path / header.name).write_text(header.read_text())
    barrier = "  if (with_barrier) __syncthreads();\n"
    assert samples.read_text().count(barrier) == 1
    source.write_text(samples.read_text().replace(barrier, barrier + "  __syncthreads();\n"))
    target = Target("samples", source, target_of("samples").linked_with)
    line = source.read_text().splitlines().index(barrier.rstrip()) + 1
    redundant, needed = (
        next(
            mutant
            for mutant in target.mutants()
            if mutant.line >= number and mutant.group == SYNCHRONISATION
        )
        for number in (line + 1, line + 2)
    )
    judge = Judge(tmp_path, trials={SYNCHRONISATION: [("plain", 2)]})
    assert judge.judge(target, redundant).caught_by == ""
    assert judge.judge(target, needed).caught_by == "plain: wrong result"


@pytest.mark.parametrize("text", ["a || b", "a < b"])
def test_mutants_of_a_fragment_leave_the_rest_alone(text: str) -> None:
    for mutant in find_mutants("a.cu", f"bool f() {{ return {text}; }}\n"):
        assert mutant.apply(f"bool f() {{ return {text}; }}\n").startswith("bool f() { return a")
