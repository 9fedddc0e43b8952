"""Mutants of the shipped kernels that need not be caught, each with the reason.

No run can tell them from the original, but for two (_RARE) that need an order that none of the
schedules has met.

mutate.py expects them to survive: it complains when one is caught, and when an entry fits no
mutant or more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .mutants import Mutant


@dataclass(frozen=True)
class Equivalent:
    """One mutant that need not be caught."""

    file: str
    edit: str  # as mutate.py --list shows it
    near: str  # code on its line or a neighbouring one, which tells it from others
    reason: str

    def fits(self, mutant: Mutant) -> bool:
        """Whether this is the mutant meant."""
        return (self.file, self.edit) == (mutant.file, mutant.edit) and self.near in mutant.context


_WORD_IS_ALL = (
    "The flag's word is all that is handed over: the sum beside its two state bits. What the other "
    "block wrote before is never read through it, so nothing needs the order. Acquire and release "
    "all the same: csrc/ has no other kind of flag."
)

_RARE = "Wrong only in a rare order: "
_SAME_WORD = "All other lanes write the same word, one after the other, instead of one lane."
_OWN_COUNTER = "Either of the two kernels has a counter to itself, as before."
_OTHER_WAY = "At the limit another way to the same mask is taken, which has tests of its own."

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent(
        "capturable.cuh",
        "< -> <=",
        "first < step.num_rows",
        "One launch more where the rows fill the last one, without a row.",
    ),
    Equivalent("sparse_adam.h", ">= -> >", "adam_maximum", "Of two equal moments either will do."),
    Equivalent(
        "topk_mask.cu",
        "- 1 -> nothing",
        "num_bins = 1 << digit.bits",
        "Every thread takes one bin more, and the last ones none.",
    ),
    Equivalent(
        "topk_mask.cu",
        "max(0, highest - bins_per_thread + 1) -> (0)",
        "lowest",
        "The first thread then adds up all bins and finds the same one; no other has a rank left.",
    ),
    Equivalent(
        "topk_mask.cu",
        "max(0, highest - bins_per_thread + 1) -> (highest - bins_per_thread + 1)",
        "lowest",
        "Of 3 bits only: threads past the last bin read the digit before. Nothing is left to them.",
    ),
    Equivalent("topk_mask.cu", "<= -> <", "stream_length <= work.stream_capacity", _OTHER_WAY),
    Equivalent("topk_mask.cu", "== -> !=", "&state.next_emit[", _OWN_COUNTER),
    Equivalent("topk_mask.cu", "> -> >=", "params.max_shared_bytes > 0", _OTHER_WAY),
    Equivalent("topk_mask.cu", ">= -> >", "wide_card = shared_bytes_ >=", _OTHER_WAY),
    Equivalent(
        "topk_mask.cu",
        "> -> >=",
        "launch_count<StreamSource>",
        "One launch more, over a stream that has no tile yet.",
    ),
    Equivalent(
        "topk_mask.cu",
        "> -> >=",
        "num_digits > 1",
        "One launch more, which returns: after the last digit nothing is set aside.",
    ),
    Equivalent(
        "topk_mask_count.cuh",
        "== -> !=",
        "__launch_bounds__(kCountThreads, Source::kWhen",
        "Says how many registers a thread may have on the card, and nothing about the result.",
    ),
    Equivalent(
        "topk_mask_count.cuh", "== -> !=", "next_count[digit_number][Source::kWhen", _OWN_COUNTER
    ),
    Equivalent(
        "topk_mask_count.cuh",
        ">= -> >",
        "if (first >= num_tiles) break;",
        "One turn more, without a tile.",
    ),
    Equivalent(
        "topk_mask_count.cuh",
        "< -> <=",
        "++j) { const int offset",
        "One turn more, which ends where it begins: that offset is past the end of every tile.",
    ),
    *(
        Equivalent("topk_mask_count.cuh", "> -> >=", near, "Adds 0 to a counter.")
        for near in (
            "histogram.add(run_bin, run_length); run_bin = bin;",
            "} if (run_length > 0)",
            "histogram.add(0, zeros); }",
        )
    ),
    Equivalent(
        "topk_mask_count.cuh",
        "< -> <=",
        "before + count >= kHalf",
        _RARE + "one thread between another's addition and subtraction, at exactly half the range.",
    ),
    Equivalent(
        "topk_mask_source.cuh",
        "- 1 -> nothing",
        "work.state->stream_length",
        _RARE + "one tile more, an empty one, where the stream fills its last. With all scores in "
        "the stream its word is another tile's, who may still be waited for.",
    ),
    Equivalent(
        "ordered_scan.cuh", "< -> <=", "distance < 32", "One step more, in which no lane adds."
    ),
    Equivalent("ordered_scan.cuh", "== -> !=", "kOwnSum | own", _SAME_WORD),
    Equivalent("ordered_scan.cuh", "== -> !=", "kPrefixSum | (before + own)", _SAME_WORD),
    Equivalent(
        "ordered_scan.cuh",
        "> -> >=",
        "kOwnSum | own",
        "The first tile publishes its sum as its own, too; before it there is nothing to add.",
    ),
    Equivalent(
        "ordered_scan.cuh",
        "< -> <=",
        "__any_sync(kAllLanes, word < kOwnSum)",
        "Where a tile's own sum is 0 its prefix is waited for, which comes.",
    ),
    Equivalent(
        "ordered_scan.cuh",
        "st_release -> mutants::relaxed_store",
        "kOwnSum | own",
        _WORD_IS_ALL,
    ),
    Equivalent(
        "ordered_scan.cuh",
        "st_release -> mutants::relaxed_store",
        "kPrefixSum | (before + own)",
        _WORD_IS_ALL,
    ),
    Equivalent(
        "ordered_scan.cuh",
        "ld_acquire -> mutants::relaxed_load",
        "other >= 0",
        _WORD_IS_ALL,
    ),
)
