"""Files and folders written beside their place and put there when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = [
    "PathLike",
    "make_folder",
    "refuse_no_file",
    "refuse_unwritable",
    "replace_file",
    "write_text_atomically",
]

PathLike = str | os.PathLike[str]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text_atomically(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file as `write_atomically` writes tensors.

    Args:
        path: target; its folder must exist.
        text: the contents.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the target exists and is no regular file.
    """
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let a file be written beside its place, and put it there when it is whole and on the disk.

    Args:
        path: target; its folder must exist.
        write: writes the file that it is given.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the system refuses.
        ValueError: the target exists and is no regular file.
    """
    target = _file_target(path)
    temporary = _beside(target)
    try:
        with _naming(path, temporary):
            _create(temporary)
            mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            write(temporary)
        os.chmod(temporary, mode)
        _fsync(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _fsync(target.parent, os.O_RDONLY)


def refuse_unwritable(path: PathLike) -> None:
    """Refuse a file that `replace_file` could not put there, before the work that it is for.

    Args:
        path: target; it stays as it is.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the system refuses.
        ValueError: the target exists and is no regular file.
    """
    temporary = _beside(_file_target(path))
    with _naming(path, temporary):
        _create(temporary)
        os.unlink(temporary)


def _file_target(path: PathLike) -> Path:
    """Return where a file goes, links followed; refuse what has no folder or is no file."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {os.fspath(path)!r} must exist; create it first")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(target).st_mode):  # an OSError too where the name is too long
            raise ValueError(f"{os.fspath(path)!r} must be a regular file or not exist")
    return target


def _beside(target: Path) -> Path:
    return target.parent / f".fishfast-{secrets.token_hex(8)}.tmp"


def _create(path: Path) -> None:
    """Create an empty file with the mode that the umask gives; the library's own is 0600."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def make_folder(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let a folder be written beside its place, and put it there when it is whole and on the disk.

    Args:
        path: target; its parent must exist, itself not, unless it is empty.
        write: writes into the folder that it is given.

    Raises:
        FileNotFoundError: the parent does not exist.
        FileExistsError: the target is there and not an empty folder.
        OSError: the system refuses.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {os.fspath(path)!r} must exist; create it first")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{os.fspath(path)!r} must not exist yet, or be an empty folder")
    temporary = _beside(target)
    with _naming(path, temporary):
        temporary.mkdir()
    try:
        with _naming(path, temporary):
            write(temporary)
        for place in sorted(temporary.rglob("*")):
            _fsync(place, os.O_RDONLY)
        _fsync(temporary, os.O_RDONLY)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(target.parent, os.O_RDONLY)


@contextlib.contextmanager
def _naming(path: PathLike, temporary: Path) -> Iterator[None]:
    """Name the target where the system refuses.

    It would name the temporary file, which its user does not know, or, where the disk is full, no
    file at all.

    Raises:
        OSError: the system's own, with the other name.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or error.filename == str(temporary):
            error.filename = os.fspath(path)
        raise


def _fsync(path: PathLike, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_no_file(path: PathLike) -> None:
    """Refuse to read a folder, device or pipe: safetensors cannot map it, and its opening may hang.

    Args:
        path: what to read.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.fspath(path)!r} must be a regular file")
