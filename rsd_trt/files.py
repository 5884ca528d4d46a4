"""Files that are whole or absent, and folders with one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rsd_trt.errors import UserError


def own(path: Path) -> Path:
    """`path`, unless it is a symbolic link (it may lead anywhere) or something that reading may hang on.

    Raises:
        UserError: with what to do.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which may lead anywhere", "Put the file itself in its place")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file", "Put the file itself in its place")
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read. A pipe is not waited for.

    Raises:
        UserError: it is no regular file.
        OSError: as `Path.open`.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise UserError(f"{path} is no regular file", "Put the file itself in its place")
        yield stream


MOST_BYTES = 1 << 26  # of a text file that is read as a whole: tokenizers have megabytes, all others less


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """What the file holds.

    Raises:
        UserError: it is larger, however little of that is on the disk, or no regular file.
        OSError: as `Path.read_bytes`.
    """
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise UserError(f"{path} holds more than {most:,} bytes: no such file does")
    return content


LFS = b"version https://git-lfs.github.com/spec/"


def check_whole(path: Path) -> None:
    """Raises UserError if git-lfs's pointer stands in the place of a file, as it does in a clone without git-lfs, or a
    folder, or a pipe, on which reading may hang."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    with contextlib.suppress(OSError), opened(path) as stream:
        if stream.read(len(LFS)) == LFS:
            raise UserError(f"{path} is git-lfs's pointer to the file, and not the file", "Fetch it: git lfs pull")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. It becomes `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises UserError where a file or folder, `path` if the error does not say which, cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Writes a whole file, text as UTF-8: `path` is what it was before until all of it is on the disk."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def locked(path: Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """One holder of the lock file `path` at a time; the lock dies with its process. When another process has it,
    `on_busy` is called: it raises, or returns to wait. What lies there is neither followed, emptied nor waited for.

    Raises:
        UserError: it is a link, or no regular file.
    """
    own(path)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and vanishes when it does not."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; choose another path or remove it first")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with writing(path):
            yield temporary
            for file in temporary.iterdir():  # mkdtemp and safetensors make what only the owner can read
                file.chmod(0o644)
            temporary.chmod(0o755)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """For before what takes long: whether there can be such a folder, and files be written into it.

    Raises:
        UserError: a file is in its place or on the way there, or what is there may not be written into.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{folder} cannot be made: {there} is no folder", "Choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: {there} may not be written into", "Choose another place")


def check_disk(path: Path, needed: int) -> None:
    """Raises UserError if the disk that `path` will lie on has fewer than `needed` bytes free."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{path} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")
