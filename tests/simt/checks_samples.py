"""The check of samples.cu, in the form of a shipped kernel's: tries out check.py and mutate.py."""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .samples import SAMPLES
from .schedules import Schedule


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Compare every sample with NumPy."""
    for name, sample in SAMPLES.items():
        got, expected = sample(lib, schedule.seed)
        np.testing.assert_array_equal(got, expected, err_msg=name)
