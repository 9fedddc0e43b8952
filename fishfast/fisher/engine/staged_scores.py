"""Scores that live on another device than their parameters: in memory that is larger.

A weight's scores come to its device when a gradient is there, are added to as they would be anyway
(so that they have the same bits), and go back once others need the room. Both ways lead through two
page-locked buffers of one chunk each, on a stream of their own: while one is copied, the device
computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["StagedScores"]

# Bytes of scores that stay on a device between calls. Weights that are used again at once, such as
# those of a layer and its bias, are not moved twice. A call's own scores are there in any case.
_HELD = 2**28
_CHUNK = 2**23  # elements: 32 MB


class StagedScores(Mapping[str, Tensor]):
    """Scores by name: on the device of their parameter while they are added to.

    What is given by name is valid until `trim` or `settle` is called.

    Args:
        kept: the scores where they live, dense.
        devices: those of the parameters, by name.
        held: bytes that may stay on a device after `trim`; default: 256 MB.

    Attributes:
        kept: as given, up to date after `settle`.
    """

    def __init__(
        self, kept: Mapping[str, Tensor], devices: Mapping[str, torch.device],
        held: int | None = None,
    ) -> None:  # fmt: skip
        self.kept, self._devices = kept, devices
        self._limit = _HELD if held is None else held
        self._here: OrderedDict[str, Tensor] = OrderedDict()  # the least recently used first
        self._sums: list[tuple[str, Tensor]] = []
        self._ways: dict[torch.device, _Way] = {}

    def __getitem__(self, name: str) -> Tensor:
        found = self._here.get(name)
        if found is None:
            kept = self.kept[name]
            flat = self._way(name).bring(_flat(kept))
            found = self._here[name] = flat.as_strided(kept.shape, kept.stride())
        self._here.move_to_end(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def _way(self, name: str) -> _Way:
        device = self._devices[name]
        if device not in self._ways:
            cuda = device.type == "cuda" and self.kept[name].device.type == "cpu"
            self._ways[device] = _CudaWay(device) if cuda else _Way(device)
        return self._ways[device]

    def trim(self) -> None:
        """Put scores back until few are left on the devices."""
        while sum(score.numel() * 4 for score in self._here.values()) > self._limit:
            self._put_back()

    def settle(self) -> bool:
        """Put all scores back; return whether those that were added to are finite."""
        while self._here:
            self._put_back()
        sums, self._sums = self._sums, []
        finite = [bool(total.isfinite()) for _, total in sums]
        return all(
            is_finite or bool(self.kept[name].isfinite().all())  # a sum may overflow alone
            for (name, _), is_finite in zip(sums, finite, strict=True)
        )

    def _put_back(self) -> None:
        name, score = self._here.popitem(last=False)
        self._sums.append((name, self._way(name).put_back(_flat(score), _flat(self.kept[name]))))


def _flat(score: Tensor) -> Tensor:
    """Return a dense tensor's elements as they lie in memory."""
    return score.as_strided((score.numel(),), (1,), score.storage_offset())


class _Way:
    """Copies between a device and where scores live, each at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bring(self, kept: Tensor) -> Tensor:
        """Return a copy on the device."""
        return kept.to(self.device, copy=True)

    def put_back(self, score: Tensor, kept: Tensor) -> Tensor:
        """Copy back; return the sum, on the device."""
        kept.copy_(score)
        return score.sum()


class _CudaWay(_Way):
    """Copies between a GPU and the host's memory, while the GPU computes.

    Scores are allocated on this stream, so that their memory is used again in its order.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(_CHUNK, pin_memory=True) for _ in range(2)]
        self._free: list[Any] = [None, None]  # the event after which a buffer is free

    def _chunks(self, size: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield places, and the buffer for each, once what it held has been copied."""
        for number, start in enumerate(range(0, size, _CHUNK)):
            places, which = slice(start, min(size, start + _CHUNK)), number % 2
            if self._free[which] is not None:
                self._free[which].synchronize()
            yield places, which, self._buffers[which][: places.stop - start]

    def bring(self, kept: Tensor) -> Tensor:
        """Return a copy on the device, for which its present stream waits."""
        with torch.cuda.stream(self._stream):
            score = torch.empty(kept.numel(), device=self.device)
            for places, which, buffer in self._chunks(kept.numel()):
                buffer.copy_(kept[places])
                score[places].copy_(buffer, non_blocking=True)
                self._free[which] = self._stream.record_event()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return score

    def put_back(self, score: Tensor, kept: Tensor) -> Tensor:
        """Copy back what the present stream has added to; return the sum, on the device."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            total = score.sum()
            waiting: list[tuple[Any, Tensor, slice]] = []
            for places, which, buffer in self._chunks(kept.numel()):
                buffer.copy_(score[places], non_blocking=True)
                self._free[which] = self._stream.record_event()
                waiting.append((self._free[which], buffer, places))
                if len(waiting) == 2:  # the other buffer fills meanwhile
                    _finish(kept, *waiting.pop(0))
            for each in waiting:
                _finish(kept, *each)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return total


def _finish(kept: Tensor, event: Any, buffer: Tensor, places: slice) -> None:
    event.synchronize()
    kept[places].copy_(buffer)
