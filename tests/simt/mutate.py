"""Break the shipped CUDA kernels, one small edit at a time: each must be caught by their checks.

::

    make mutants                                        # all of them
    python tests/simt/mutate.py --list                  # what they are
    python tests/simt/mutate.py --sample 3 --seed 7     # three, the same ones for the same seed
    python tests/simt/mutate.py topk_mask --only 1/4    # one kernel; every fourth mutant

A mutant is compiled and run by check.py until something fails: a few schedules in each mode of
build.py first, which catch nearly all, and then as many as the kernel itself passes in CI.
Survivors are listed and make the exit status 1; equivalent_mutants.py names those that may live.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if __package__ is None or __package__ == "":  # started as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simt.build import CSRC, HERE, compile_kernel, compile_runtime, link
from simt.check import DEFECT_FOUND, api_of, shipped_stems
from simt.equivalent_mutants import EQUIVALENT, Equivalent
from simt.mutants import ARITHMETIC, SYNCHRONISATION, Mutant, find_mutants
from simt.run import command_and_environment
from simt.schedules import NUM_SCHEDULES

# Modes and numbers of schedules, in the order of their chance to catch something for their cost.
_ALL_SCHEDULES = tuple(NUM_SCHEDULES.items())
TRIALS = {
    SYNCHRONISATION: (("plain", 18), ("tsan", 6), ("asan", 9), *_ALL_SCHEDULES),
    ARITHMETIC: (("plain", 36), ("asan", 9), ("tsan", 6), *_ALL_SCHEDULES),
}
# CPU seconds that one schedule may take, many times what it does: a mutant may never end. By the
# clock a busy machine would catch it.
_SECONDS_PER_SCHEDULE = {"plain": 0.5, "asan": 5, "tsan": 10}
_HANG_GUARD = 1800  # seconds by the clock, of a mutant that sleeps


@dataclass(frozen=True)
class Target:
    """One kernel file, the files it is linked with, and the check that judges it."""

    stem: str
    source: Path
    linked_with: tuple[Path, ...]

    def mutants(self) -> list[Mutant]:
        """Return the mutants of the kernel file and of the kernel headers that it includes."""
        return [
            mutant
            for path in self.mutated_files()
            for mutant in find_mutants(path.name, path.read_text())
        ]

    def mutated_files(self) -> list[Path]:
        """Return the source, its .cuh headers and the header with its own arithmetic.

        platform.cuh is left out: what it is for the simulator is not what it is for the card.
        """
        files = [self.source]
        for path in files:  # grows
            for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
                header = path.parent / name
                ours = header.suffix == ".cuh" or header.name == f"{self.stem}.h"
                if ours and name != "platform.cuh" and header.exists() and header not in files:
                    files.append(header)
        return files


def target_of(stem: str) -> Target:
    """Return a shipped kernel, or the runtime's own samples, by name."""
    if stem == "samples":
        bugs = (HERE / "planted_bugs.cu", HERE / "planted_bugs_api.cpp")
        return Target(stem, HERE / "samples.cu", bugs)
    return Target(stem, CSRC / f"{stem}.cu", (api_of(stem),))


@dataclass(frozen=True)
class Verdict:
    """Whether a mutant was caught."""

    target: Target
    mutant: Mutant
    caught_by: str  # the mode and what it said; empty for a survivor
    seconds: float


class BrokenCheck(Exception):
    """The check itself is wrong: it fails without a mutant, or for a reason of its own."""


@dataclass
class Judge:
    """Builds and runs mutants. Objects that no mutant changes are compiled once."""

    folder: Path
    trials: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=lambda: TRIALS)
    # Whether to try the unchanged kernel first. Not where other tests do so.
    control: bool = True
    _unchanged: dict[tuple[str, str], list[Path]] = field(default_factory=dict)
    _controlled: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    # The runtime takes 2 GB under TSan.
    _one_tsan: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, target: Target, mutant: Mutant) -> Verdict:
        """Try the mutant until a check fails."""
        started = time.monotonic()
        caught_by = ""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            source = self._write(target, mutant, Path(name))
            for mode, count in self.trials[mutant.group]:
                self._require_right_without_mutant(target, mode)
                what = self._defect(target, mode, count, source)
                if what:
                    caught_by = f"{mode}: {what}"
                    break
        return Verdict(target, mutant, caught_by, time.monotonic() - started)

    def _write(self, target: Target, mutant: Mutant | None, folder: Path) -> Path:
        # All headers, since a quoted #include looks beside the file first.
        for path in target.source.parent.iterdir():
            if path.suffix in {".cu", ".cuh", ".h"}:
                text = path.read_text()
                if mutant and path.name == mutant.file:
                    text = mutant.apply(text)
                (folder / path.name).write_text(text)
        return folder / target.source.name

    def _build(self, target: Target, mode: str, source: Path) -> Path:
        """Compile a mutant, once for a mode."""
        library = source.with_suffix(f".{mode}.so")
        if not library.exists():
            flags = ("-w", "-include", str(HERE / "mutants.h"))
            compiled = compile_kernel(source, source.with_suffix(".o"), mode, more_flags=flags)
            link([*self._unchanged_objects(target, mode), compiled], library, mode)
        return library

    def _defect(self, target: Target, mode: str, count: int, source: Path) -> str:
        """What the check found in a mutant under one mode; empty if nothing."""
        try:
            library = self._build(target, mode, source)
        except RuntimeError as error:
            if "static assertion failed" in str(error):
                return "static assertion"
            raise BrokenCheck(f"a mutant of {source.name} does not compile:\n{error}") from error
        limit = math.ceil(20 + count * _SECONDS_PER_SCHEDULE[mode])
        arguments = ["-m", "simt.check", target.stem, str(library), str(count), str(limit)]
        command, environment = command_and_environment(mode, arguments)
        lock = self._one_tsan if mode == "tsan" else threading.Lock()
        with lock:
            try:
                result = subprocess.run(
                    command,
                    env=environment,
                    cwd=HERE.parent,
                    capture_output=True,
                    text=True,
                    timeout=_HANG_GUARD,
                )
            except subprocess.TimeoutExpired as error:
                raise BrokenCheck(f"no verdict on {source} under {mode}: {error}") from error
        if result.returncode == -signal.SIGXCPU:
            if mode != "plain":  # it did end without a sanitizer
                raise BrokenCheck(f"no verdict on {source} under {mode} after {limit} CPU seconds")
            return f"still running after {limit} CPU seconds"
        return _what_failed(result)

    def _unchanged_objects(self, target: Target, mode: str) -> list[Path]:
        with self._lock:
            key = (target.stem, mode)
            if key not in self._unchanged:
                folder = self.folder / f"{target.stem}-{mode}"
                folder.mkdir()
                self._unchanged[key] = [compile_runtime(folder / "runtime.o", mode)]
                for path in target.linked_with:
                    self._unchanged[key].append(
                        compile_kernel(path, folder / f"{path.stem}.o", mode)
                    )
            return self._unchanged[key]

    def _require_right_without_mutant(self, target: Target, mode: str) -> None:
        """Try the unchanged kernel, whose check must pass: else every mutant would be caught."""
        with self._lock:
            if not self.control or (target.stem, mode) in self._controlled:
                return
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                source = self._write(target, None, Path(name))
                what = self._defect(target, mode, NUM_SCHEDULES[mode], source)
            if what:
                raise BrokenCheck(f"{target.stem} fails without a mutant, {mode}: {what}")
            self._controlled.add((target.stem, mode))


def _what_failed(result: subprocess.CompletedProcess[str]) -> str:
    """One line on why a check failed; empty if it passed."""
    errors = result.stderr
    if result.returncode == 0:
        return ""
    for pattern in (r"SUMMARY: (ThreadSanitizer: [\w ]+)", r"(AddressSanitizer: [\w-]+)"):
        if found := re.search(pattern, errors):
            return found.group(1)
    if found := re.search(r"runtime error: (.*)", errors):
        return found.group(1)
    if result.returncode == DEFECT_FOUND:
        named = re.search(r"RuntimeError: simt: ([^\n]*)", errors)
        return named.group(1) if named else "wrong result"
    if result.returncode < 0:
        return f"signal {-result.returncode}"
    raise BrokenCheck(f"a check ended with status {result.returncode}:\n{errors[-3000:]}")


Case = tuple[Target, Mutant]


def all_cases(targets: Sequence[Target]) -> list[Case]:
    """Return every mutant once; one of a shared header with the first kernel that includes it."""
    cases: dict[Mutant, Target] = {}
    for target in targets:
        for mutant in target.mutants():
            cases.setdefault(mutant, target)
    return [(target, mutant) for mutant, target in cases.items()]


def reason_to_live(mutant: Mutant) -> str | None:
    """Return why a mutant is equivalent to the original, or None."""
    for entry in EQUIVALENT:
        if entry.fits(mutant):
            return entry.reason
    return None


def misfits(cases: Sequence[Case], entries: Sequence[Equivalent] = EQUIVALENT) -> list[Equivalent]:
    """Return the entries that do not fit exactly one mutant."""
    return [entry for entry in entries if sum(entry.fits(mutant) for _, mutant in cases) != 1]


def sample(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """Choose mutants that must be caught, two of synchronisation for one of arithmetic."""
    chooser = random.Random(seed)
    groups = {}
    for group in (SYNCHRONISATION, ARITHMETIC):
        members = [
            case for case in cases if case[1].group == group and reason_to_live(case[1]) is None
        ]
        groups[group] = chooser.sample(members, len(members))
    chosen: list[Case] = []
    while len(chosen) < count and any(groups.values()):
        preferred = ARITHMETIC if len(chosen) % 3 == 2 else SYNCHRONISATION
        group = groups[preferred] or next(members for members in groups.values() if members)
        chosen.append(group.pop())
    return chosen


def run(cases: Sequence[Case], jobs: int = 2, control: bool = True) -> Iterator[Verdict]:
    """Judge the mutants on `jobs` processes and yield what became of each, in their order."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        judge = Judge(folder, control=control)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield from pool.map(lambda case: judge.judge(*case), cases)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Report on all mutants or on a sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stems", nargs="*", help="kernels (all shipped ones), or samples")
    parser.add_argument("--list", action="store_true", help="list them and stop")
    parser.add_argument("--group", choices=(SYNCHRONISATION, ARITHMETIC))
    parser.add_argument("--only", default="0/1", metavar="I/N", help="every N-th, from the I-th")
    parser.add_argument("--sample", type=int, metavar="N", help="N that are chosen by the seed")
    parser.add_argument("--seed", type=int, help="for --sample; printed if none is given")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()

    cases = all_cases([target_of(stem) for stem in arguments.stems or shipped_stems()])
    wrong_entries = [] if arguments.stems else misfits(cases)
    if arguments.group:
        cases = [case for case in cases if case[1].group == arguments.group]
    first, step = map(int, arguments.only.split("/"))
    cases = cases[first::step]
    if arguments.sample is not None:
        seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
        print(f"--sample {arguments.sample} --seed {seed}")
        cases = sample(cases, arguments.sample, seed)
    if arguments.list:
        for _, mutant in cases:
            reason = reason_to_live(mutant)
            print(f"{mutant}{'' if reason is None else f'   (equivalent: {reason})'}")
        return
    bad = [f"fits not exactly one mutant: {entry}" for entry in wrong_entries]
    for verdict in run(cases, arguments.jobs):
        reason = reason_to_live(verdict.mutant)
        outcome = verdict.caught_by or ("lives, as it may" if reason else "SURVIVES")
        print(f"{verdict.seconds:6.1f} s  {verdict.mutant}  [{outcome}]", flush=True)
        if not verdict.caught_by and reason is None:
            bad.append(f"survives: {verdict.mutant}")
        if verdict.caught_by and reason is not None:
            bad.append(f"listed as equivalent, but caught: {verdict.mutant}")
    print(f"{len(cases)} mutants, {len(bad)} complaints", *bad, sep="\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
