"""FISH Mask training: score every weight, keep the k most important, train only those.

fisher = estimate_fisher(model, loader, num_samples=256)
mask   = top_k_mask(fisher, density=0.005, keep=["classifier"])
tuned  = train_only(model, mask)
opt    = AdamW(tuned.parameters(), lr=5e-5)
...
save_delta(tuned, "task.safetensors")
"""

from fishfast._backend import build_info
from fishfast.baseline_masks import bias_mask, magnitude_scores, random_mask
from fishfast.checkpoints import apply_to_checkpoint, diff_checkpoints
from fishfast.config import FishConfig
from fishfast.delta import Delta, load_delta, save_delta
from fishfast.fish_model import FishTuning, from_pretrained, get_fish_model
from fishfast.fisher import Fisher, estimate_fisher
from fishfast.inspection import inspect_file
from fishfast.mask import SparseMask
from fishfast.sparse_adam import Adam, AdamW
from fishfast.sparse_sgd import SGD
from fishfast.topk_mask import open_scores, split_mask, top_k_mask
from fishfast.train_only import train_only
from fishfast.tuning import SparseTuning

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Delta",
    "FishConfig",
    "FishTuning",
    "Fisher",
    "SparseMask",
    "SparseTuning",
    "apply_to_checkpoint",
    "bias_mask",
    "build_info",
    "diff_checkpoints",
    "estimate_fisher",
    "from_pretrained",
    "get_fish_model",
    "inspect_file",
    "load_delta",
    "magnitude_scores",
    "open_scores",
    "random_mask",
    "save_delta",
    "split_mask",
    "top_k_mask",
    "train_only",
]
