"""FISH Mask training: score every weight, keep the k most important, train only those.

fisher = estimate_fisher(model, loader, num_samples=256)
mask   = top_k_mask(fisher, density=0.005, keep=["classifier"])
tuned  = train_only(model, mask)
opt    = AdamW(tuned.parameters(), lr=5e-5)
...
save_delta(tuned, "task.safetensors")
"""

from fishfast._backend import build_info
from fishfast._version import __version__
from fishfast.delta.apply import apply_to_checkpoint
from fishfast.delta.delta import Delta, load_delta, save_delta
from fishfast.delta.diff import diff_checkpoints
from fishfast.fisher import Fisher, estimate_fisher
from fishfast.hub.config import FishConfig
from fishfast.hub.fish_model import FishTuning, from_pretrained, get_fish_model
from fishfast.mask.baselines import bias_mask, magnitude_scores, random_mask
from fishfast.mask.score_file import open_scores
from fishfast.mask.sparse_mask import SparseMask
from fishfast.mask.split import split_mask
from fishfast.mask.topk_mask import top_k_mask
from fishfast.optim.sparse_adam import Adam, AdamW
from fishfast.optim.sparse_sgd import SGD
from fishfast.report.inspection import inspect_file
from fishfast.training.handle import SparseTuning
from fishfast.training.train_only import train_only

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
    "__version__",
]
