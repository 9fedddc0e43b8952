"""Ground truth in float64 and plain loops: shares no code with what it judges."""

from __future__ import annotations
