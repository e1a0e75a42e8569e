from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memd.errors import ConfigError
from memd.tiers.files import BLOCK_BYTES, AnonymousFile, read_whole, write_whole
from memd.tiers.testing import FakeFile

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 64 * BLOCK_BYTES


def block(value: int = 0) -> memoryview:
    """A block that begins at a memory page."""
    memory = mmap.mmap(-1, BLOCK_BYTES)
    memory[:] = bytes([value]) * BLOCK_BYTES
    return memoryview(memory)


def inode_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks for path in directory.iterdir()) * 512


class TestAnonymousFile:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        with AnonymousFile(tmp_path, SIZE) as file:
            write_whole(file, [block(1), block(2)], 3 * BLOCK_BYTES)
            parts = [block(), block(), block()]
            read_whole(file, parts, 2 * BLOCK_BYTES)
            assert [part[17] for part in parts] == [0, 1, 2]

    def test_it_has_no_name_and_nobody_elses_rights(self, tmp_path: Path) -> None:
        with AnonymousFile(tmp_path, SIZE) as file:
            assert not list(tmp_path.iterdir())
            status = os.fstat(file._fd)
            assert status.st_nlink == 0
            assert status.st_mode & 0o777 == 0o600
            assert not os.get_inheritable(file._fd)

    def test_all_its_space_is_taken_at_once(self, tmp_path: Path) -> None:
        with AnonymousFile(tmp_path, SIZE) as file:
            status = os.fstat(file._fd)
            assert status.st_size == SIZE
            assert status.st_blocks * 512 >= SIZE

    def test_it_can_be_closed_twice(self, tmp_path: Path) -> None:
        file = AnonymousFile(tmp_path, SIZE)
        file.close()
        file.close()
        with pytest.raises(OSError):
            file.pwritev([block()], 0)

    def test_a_file_system_that_only_knows_names_is_used_without_leaving_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_open = os.open

        def open_named(path: Any, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no files without a name")
            return real_open(path, flags, mode)

        monkeypatch.setattr(os, "open", open_named)
        with AnonymousFile(tmp_path, SIZE) as file:
            assert not list(tmp_path.iterdir())
            assert os.fstat(file._fd).st_mode & 0o777 == 0o600
            write_whole(file, [block(7)], 0)

    def test_a_file_system_with_a_page_cache_only_is_used_through_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "O_DIRECT", 0)
        real_preadv, calls = os.preadv, []

        def refuse_first(*args: Any) -> int:
            calls.append(args)
            if len(calls) == 1:
                raise OSError(errno.EINVAL, "no direct reads")
            return real_preadv(*args)

        monkeypatch.setattr(os, "preadv", refuse_first)
        with AnonymousFile(tmp_path, SIZE) as file:
            assert not file.is_direct
            write_whole(file, [memoryview(b"unaligned")], 5)
            found = memoryview(bytearray(9))
            read_whole(file, [found], 5)
            assert bytes(found) == b"unaligned"

    def test_more_than_the_disk_has_is_refused_with_what_would_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"ask for at most --disk-bytes \d+$") as caught:
            AnonymousFile(tmp_path, 1 << 60)
        fitting = int(str(caught.value).rsplit(" ", 1)[1])
        status = os.statvfs(tmp_path)
        assert fitting % BLOCK_BYTES == 0
        assert fitting == pytest.approx(status.f_bavail * status.f_frsize, rel=0.2)
        assert not list(tmp_path.iterdir())

    @pytest.mark.usefixtures("_small_files_only")
    def test_a_limit_below_the_free_space_is_found_too(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"at most --disk-bytes 1048576$"):
            AnonymousFile(tmp_path, 3 << 20)
        AnonymousFile(tmp_path, 1 << 20).close()

    @pytest.fixture
    def _small_files_only(self) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def test_a_directory_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--disk-dir .* cannot hold pages: No such file"):
            AnonymousFile(tmp_path / "absent", SIZE)

    def test_a_file_in_place_of_the_directory_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="cannot hold pages: Not a directory"):
            AnonymousFile(tmp_path / "file", SIZE)

    def test_a_killed_process_leaves_nothing(self, tmp_path: Path) -> None:
        script = (
            "import sys, time; from pathlib import Path\n"
            "from memd.tiers.files import AnonymousFile\n"
            "file = AnonymousFile(Path(sys.argv[1]), 1 << 20)\n"
            "print('made', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path.cwd()) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"made\n"
            assert not list(tmp_path.iterdir())
            child.send_signal(signal.SIGKILL)
            child.wait(10)
        assert inode_bytes(tmp_path) == 0


class TestWhole:
    @pytest.mark.parametrize("most_bytes", [1, 3, 4, 5, 9, None])
    def test_calls_that_do_less_are_gone_on_with(self, most_bytes: int | None) -> None:
        file = FakeFile(32)
        file.most_bytes = most_bytes
        write_whole(file, [memoryview(b"abcd"), memoryview(b""), memoryview(b"efghi")], 7)
        assert bytes(file.data[7:16]) == b"abcdefghi"
        parts = [memoryview(bytearray(2)), memoryview(bytearray(7))]
        read_whole(file, parts, 7)
        assert [bytes(part) for part in parts] == [b"ab", b"cdefghi"]

    def test_a_file_that_ends_too_early_is_an_error(self) -> None:
        file = FakeFile(8)
        for move in (read_whole, write_whole):
            with pytest.raises(OSError, match="ends before"):
                move(file, [memoryview(bytearray(9))], 0)

    def test_errors_are_passed_on(self) -> None:
        file = FakeFile(8)
        file.read_errors.append(errno.EIO)
        file.write_errors.append(errno.ENOSPC)
        with pytest.raises(OSError, match="Input/output"):
            read_whole(file, [memoryview(bytearray(1))], 0)
        with pytest.raises(OSError, match="No space"):
            write_whole(file, [memoryview(bytearray(1))], 0)
