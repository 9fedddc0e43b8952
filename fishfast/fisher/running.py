"""Running scores on disk: stop early, go on later, and get what one run would have got."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fishfast.files.atomic import PathLike, refuse_unwritable
from fishfast.fisher.kind import ScoreKind
from fishfast.fisher.result import Fisher
from fishfast.fisher.score_files import read_scores, write_scores

__all__ = ["RunningScores"]

_STATE = "running_"  # prefix of the header's entries that a finished result does not have


class RunningScores:
    """Saves the scores of a run from time to time, and gives them back to a run that goes on.

    The file is one that `Fisher.load` reads: the scores so far. Its header also has what the next
    draw of ``fisher_type="sampled"`` depends on, so that a run that goes on equals one that was
    never stopped, bit for bit, if it gets the same batches. Save between batches only, and not
    after a batch of which a part was scored. In a process group every rank has a file of its own.

    Args:
        path: the file; its folder must exist.
        every_seconds: how long `maybe_save` waits from one save to the next; 0 saves every time.
        seed: of the draws, None where nothing is drawn; compared with the file's.
        num_label_samples: likewise.
        generator: what the draws come from; its state is saved and set.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the system refuses to write there.
        ValueError: ``every_seconds`` is negative, or ``path`` is no regular file.
    """

    def __init__(
        self,
        path: PathLike,
        every_seconds: float = 60.0,
        *,
        seed: int | None = None,
        num_label_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not every_seconds >= 0:
            raise ValueError(f"every_seconds must be at least 0; got {every_seconds!r}")
        refuse_unwritable(path)  # known before hours of scoring
        self.path, self.every_seconds = path, every_seconds
        self.generator = generator
        self._draws = {"seed": seed, "num_label_samples": num_label_samples}
        self._first_batch: str | None = None
        self._saved_at = time.monotonic()

    def compare_batch(self, shapes: str) -> None:
        """Refuse to go on with batches that are not those of the file, as far as shapes tell.

        Args:
            shapes: of the tensors of the first batch.

        Raises:
            ValueError: the file's first batch had others.
        """
        if self._first_batch is not None and shapes != self._first_batch:
            raise ValueError(
                f"{os.fspath(self.path)!r} must be of a run over the same batches; the first one "
                f"has shapes {shapes} in this run and {self._first_batch} in the file; give "
                "another path, or delete the file to start again"
            )
        self._first_batch = shapes

    def resume(self, scores: Mapping[str, Tensor], fisher_type: str, power: int) -> Fisher | None:
        """Take over what the file has, if there is one.

        Args:
            scores: name -> fp32 accumulators, overwritten with the file's.
            fisher_type: what they are.
            power: likewise.

        Returns:
            The run so far, on the given accumulators: ``num_batches`` is where to go on. None if
            there is no file.

        Raises:
            ValueError: another run's file, a finished result, or a damaged file. Nothing was
                changed.
        """
        if not os.path.exists(self.path):
            return None
        source = repr(os.fspath(self.path))
        saved, facts, header = read_scores(self.path)
        if not {_STATE + name for name in (*self._draws, "generator", "first_batch")} <= set(
            header
        ):
            raise ValueError(
                f"{source} must hold running scores; it is a finished result; give another path"
            )
        difference = ScoreKind.of(scores, fisher_type, power).difference(
            Fisher(saved, **facts).kind, "in this run", "in the file"
        )
        for name, value in self._draws.items():
            text = header[_STATE + name]
            if not difference and text != json.dumps(value):
                difference = f"{name} is {json.dumps(value)} in this run and {text} in the file"
        if difference:
            raise ValueError(
                f"{source} must be of the same run; {difference}; give another path, or delete the "
                "file to start again"
            )
        self._set_generator(header[_STATE + "generator"], source)
        self._first_batch = header[_STATE + "first_batch"] or None
        with torch.no_grad():
            for name, score in scores.items():
                score.copy_(saved[name])
        return Fisher(scores, **facts)

    def maybe_save(self, result: Callable[[], Fisher]) -> bool:
        """Save if the last save was long enough ago.

        Args:
            result: returns the run so far; called only if it is saved.

        Returns:
            Whether it was saved.
        """
        if time.monotonic() - self._saved_at < self.every_seconds:
            return False
        self.save_now(result())
        return True

    def save_now(self, fisher: Fisher) -> None:
        """Save the run so far, atomically.

        Args:
            fisher: the run so far.

        Raises:
            ValueError: scores that are not finite and at least 0.
        """
        state = {_STATE + name: json.dumps(value) for name, value in self._draws.items()}
        state[_STATE + "generator"] = (
            f"{self.generator.device.type} {bytes(self.generator.get_state().tolist()).hex()}"
            if self.generator is not None
            else ""
        )
        state[_STATE + "first_batch"] = self._first_batch or ""
        write_scores(self.path, fisher, fisher.facts(), state)
        self._saved_at = time.monotonic()

    def _set_generator(self, text: str, source: str) -> None:
        kind, _, state = text.partition(" ")
        expected = self.generator.device.type if self.generator is not None else ""
        if kind != expected:
            raise ValueError(
                f"{source} must be of the same run; its draws come from {kind or 'no'} generator, "
                f"this run's from {expected or 'none'}"
            )
        if self.generator is not None:
            try:
                found = torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
                self.generator.set_state(found)
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(f"{source} has a broken header: {error!r}") from error
