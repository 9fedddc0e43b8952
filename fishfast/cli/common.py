"""What the commands share: errors in one line, progress bars, paths."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from safetensors import SafetensorError, safe_open

from fishfast.files.atomic import refuse_unwritable

__all__ = [
    "FILE",
    "JSON",
    "PATH",
    "PROGRESS",
    "check_output",
    "clean_errors",
    "wants_progress",
]

PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
PROGRESS = click.option(
    "--progress/--no-progress",
    default=None,
    help="Show a progress bar on stderr.  [default: if that is a terminal]",
)


def wants_progress(progress: bool | None) -> bool:
    """Return whether to show a progress bar."""
    return sys.stderr.isatty() if progress is None else progress


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Turn what a bad file or argument raises into one line on stderr and exit code 1.

    Raises:
        ClickException: in its place.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror + (f": {error.filename!r}" if error.filename else "")
        raise click.ClickException(" ".join(text.split())) from error


def check_output(out: Path, *inputs: Path) -> None:
    """Refuse an output that cannot be written, or takes the place of what a command reads.

    Before long work; nothing is written.

    Args:
        out: the file to write.
        inputs: files and folders that are read. Of a folder, files that fishfast wrote may be
            written again, such as a delta beside its checkpoint.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: the system refuses to write there.
        ValueError: it is one of them, or a file of another kind in one of them, or no file.
    """
    refuse_unwritable(out)
    for path in inputs if out.exists() else ():
        if path.exists() and os.path.samefile(out, path):
            raise ValueError(f"{str(out)!r} is read by this command and must not be its output too")
        if path.resolve() in out.resolve().parents and not _is_ours(out):
            raise ValueError(
                f"{str(out)!r} belongs to {str(path)!r}, which this command reads, and must not be "
                "its output too; name another file"
            )


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("fishfast.")
    except (SafetensorError, OSError):
        return False
