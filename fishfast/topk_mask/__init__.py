"""Stage 2: the k largest scores of the whole model."""

from fishfast.topk_mask.mask import top_k_mask

__all__ = ["top_k_mask"]
