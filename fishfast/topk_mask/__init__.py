"""Stage 2: the k largest scores of the whole model.

mask, split   the calls: `top_k_mask`, `split_mask`
stored        `open_scores`: scores in a file
plan          arguments, checked (checks, budget, shards)
radix         the selection itself, over batches of pieces
select_*      the passes over the scores, in C++ and in torch; all of it in CUDA
ranks         the same over several processes
"""

from fishfast.topk_mask.mask import top_k_mask
from fishfast.topk_mask.split import split_mask
from fishfast.topk_mask.stored import ScoreFile, open_scores

__all__ = ["ScoreFile", "open_scores", "split_mask", "top_k_mask"]
