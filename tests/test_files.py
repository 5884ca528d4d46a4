"""Files that are whole or absent, and the lock."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hostile import memory

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.read import read_run
from rsd_trt.files import check_folder, check_whole, locked, read_bounded, replacing, write_atomically


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()


def test_a_block_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())


def hold(path: Path, ready: multiprocessing.synchronize.Event, done: multiprocessing.synchronize.Event) -> None:
    def never() -> None:
        raise AssertionError

    with locked(path, never):
        ready.set()
        done.wait(30)


def test_a_second_process_is_told_and_may_wait_or_leave(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / ".lock", ready, done))
    process.start()
    assert ready.wait(30)

    def leave() -> None:
        raise RuntimeError("busy")

    with pytest.raises(RuntimeError, match="busy"), locked(tmp_path / ".lock", leave):
        pass
    with locked(tmp_path / ".lock", done.set):
        assert done.is_set()
    process.join(30)


def test_a_file_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    """As large as it says, however little of it is on the disk."""
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(4 << 30)
    before = memory(anew=True)
    with pytest.raises(UserError, match=r"config.json holds more than 67,108,864 bytes: no such file does"):
        Bundle.open(tmp_path)
    assert memory() - before < 8 << 20
    assert read_bounded(Path("/proc/self/status"))  # which says that it has none
    (tmp_path / "nine").write_bytes(b"123456789")
    assert read_bounded(tmp_path / "nine", 9) == b"123456789"
    with pytest.raises(UserError, match="more than 9 bytes"):
        read_bounded(Path("/proc/self/status"), 9)


def test_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(UserError, match=rf"{name} is (a symbolic link|no regular file)"):  # noqa: SIM117
            with locked(tmp_path / name, lambda: None):
                pass
    for read in (read_bounded, check_whole, read_run):
        with pytest.raises(UserError, match="pipe is no regular file"):
            read(tmp_path / "pipe")
    assert (tmp_path / "kept").read_text() == "content"


def test_where_no_folder_can_be_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    check_folder(tmp_path / "a" / "b")
    for name in ("file", "file/a/b", "loop"):
        with pytest.raises(UserError, match=rf"{name} cannot be made: .*(file|loop) is no folder"):
            check_folder(tmp_path / name)
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK | os.X_OK)
    with pytest.raises(UserError, match="may not be written into"):
        check_folder(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}
