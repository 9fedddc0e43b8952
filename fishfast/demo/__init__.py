"""`fishfast demo`: FISH against other ways to train few weights, on real data, in about a minute.

A conv net that was pre-trained on handwritten digits 0-4 gets a new head and learns digits 5-9 from
fifty images. Everything goes through the public API; every run's file is put on the base again and
must give the same logits, bit for bit.
"""

from fishfast.demo.comparison import (
    EPOCHS,
    PRETRAIN_EPOCHS,
    SEEDS,
    choose_learning_rates,
    compare,
)
from fishfast.demo.methods import METHODS, ReloadMismatch, Run
from fishfast.demo.pictures import draw_pictures
from fishfast.demo.report import describe_choice, describe_comparison, describe_task
from fishfast.demo.task import DemoUnavailable

__all__ = [
    "EPOCHS",
    "METHODS",
    "PRETRAIN_EPOCHS",
    "SEEDS",
    "DemoUnavailable",
    "ReloadMismatch",
    "Run",
    "choose_learning_rates",
    "compare",
    "describe_choice",
    "describe_comparison",
    "describe_task",
    "draw_pictures",
]
