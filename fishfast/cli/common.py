"""What the commands share: errors in one line, progress bars, paths."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

__all__ = ["FILE", "JSON", "PATH", "PROGRESS", "clean_errors", "wants_progress"]

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
