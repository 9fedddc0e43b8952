"""The tests that need a real card, and why."""

from __future__ import annotations

import re

__all__ = ["why_not"]

_REASONS: dict[str, tuple[str, ...]] = {
    "records a CUDA graph; test_capturable_simt.py replays the launches of one": (
        r"test_cuda\.py::test_step_in_a_graph_capture_is_refused",
        r"test_capturable_cuda\.py::test_(replayed|captured|capture_without|overflow|two_graphs)",
    ),
    "needs gigabytes": (r"test_cuda\.py::test_step_past_two_billion_weights",),
    "a hundred equal runs say something of a real card's timing alone": (
        r"test_topk_mask_cuda\.py::test_one_hundred_runs_are_equal",
    ),
    "the CPU has no kernel: fused recurrent cells, histc of integers": (
        r"test_fisher_cuda\.py::test_exact_per_sample\[(recurrent|lstm|gru)",
        r"test_fisher_cuda\.py::test_exact_per_sample\[(mixtral_grouped_mm|qwen3_moe|gpt_oss)",
    ),
    "the device keeps no conjugate bit": (r"test_exact_per_sample\[filters_in_the_frequency",),
    "sparse tensors of a card have a dispatch key of their own": (
        r"test_masked_grad\.py::test_gradient_of_an_embedding\[embedding, sparse",
    ),
}


def why_not(test: str) -> str:
    """Return why a test cannot run on the simulated card; empty where it can.

    Args:
        test: its id.
    """
    for reason, patterns in _REASONS.items():
        if any(re.search(pattern, test) for pattern in patterns):
            return reason
    return ""
