"""How a process of a test leaves its group."""

from __future__ import annotations

import os

import torch.distributed as dist


def leave_group() -> None:
    """End this process, all others having come as far, without its destructors.

    Gloo's threads may outlive ``destroy_process_group`` where torch still holds the group, as a DDP
    model does, and now and then abort a process that is done.
    """
    dist.barrier()
    os._exit(0)
