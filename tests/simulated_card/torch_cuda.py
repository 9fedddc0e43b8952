"""What `torch.cuda` answers where the card is simulated: two devices, one stream, no waiting."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

_MEMORY = 1 << 30


class Stream:
    """The one stream."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def wait_stream(self, stream: Any) -> None:
        """Return: whatever was asked for has run."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Return, likewise."""

    def query(self) -> bool:
        """Say so."""
        return True

    def record_event(self, event: Any = None) -> Event:
        """Return an event that has passed."""
        return Event()


class Event:
    """An event that has passed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None:
        """Return: it has passed."""

    wait = record

    def synchronize(self) -> None:
        """Return, likewise."""

    def query(self) -> bool:
        """Say so."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Return a time that means nothing."""
        return 1.0


def install(card: Any) -> None:
    """Exchange what asks the driver, for the whole process.

    Args:
        card: the module of device.cpp.
    """

    class Device:
        """A context in which another device is the current one."""

        def __init__(self, device: Any) -> None:
            self.index = _index(device, card)

        def __enter__(self) -> None:
            self.before = card.current_device()
            card.set_device(self.index)

        def __exit__(self, *_: Any) -> None:
            card.set_device(self.before)

    def device_of(tensor: torch.Tensor) -> Any:
        return Device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

    facts = SimpleNamespace(
        name="simulated card", major=9, minor=0, multi_processor_count=8, total_memory=_MEMORY,
        L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "is_initialized": True, "device_count": card.num_devices,
        "is_current_stream_capturing": False, "get_device_capability": (9, 0),
        "get_device_name": facts.name, "get_device_properties": facts,
        "mem_get_info": (_MEMORY, _MEMORY), "memory_allocated": 0, "max_memory_allocated": 0,
        "memory_reserved": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)] * card.num_devices,
        **dict.fromkeys((
            "_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all",
            "set_sync_debug_mode", "set_rng_state", "set_rng_state_all", "reset_peak_memory_stats",
            "reset_accumulated_memory_stats", "_sleep",
        )),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name, own in {
        "Stream": Stream, "Event": Event, "device": Device, "device_of": device_of,
        "current_device": card.current_device, "stream": lambda stream: contextlib.nullcontext(),
        "set_device": lambda device: card.set_device(_index(device, card)),
        "current_stream": Stream, "default_stream": Stream,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, own)
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    empty = torch.empty
    torch.empty = lambda *sizes, pin_memory=False, **options: empty(*sizes, **options)  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment]
    torch.Tensor.is_pinned = lambda tensor, *_: True  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    _patch_storages()


def _index(device: Any, card: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return card.current_device() if index is None else index


def _patch_storages() -> None:
    """Let torch.save and deepcopy read and write memory that torch's storages have no code for."""
    storage = torch.UntypedStorage
    to_cpu, copy_ = storage.cpu, storage.copy_

    def as_bytes(held: Any) -> torch.Tensor:
        flat = torch.empty(0, dtype=torch.uint8, device=held.device)
        return flat.set_(held, 0, (held.nbytes(),), (1,))

    def cpu(held: Any) -> Any:
        is_cuda = held.device.type == "cuda"
        return as_bytes(held).cpu().untyped_storage() if is_cuda else to_cpu(held)

    def copy(held: Any, other: Any, non_blocking: bool = False) -> Any:
        if "cuda" not in (held.device.type, other.device.type):
            return copy_(held, other, non_blocking)
        as_bytes(held).copy_(as_bytes(other))
        return held

    def clone(held: Any) -> Any:
        return as_bytes(held).clone().untyped_storage()

    def cuda(held: Any, device: Any = None, non_blocking: bool = False) -> Any:
        return as_bytes(held).to(device or "cuda").untyped_storage()

    for name, own in {"cpu": cpu, "copy_": copy, "cuda": cuda, "clone": clone}.items():
        setattr(storage, name, own)
