"""A disk on FUSE that passes everything on to a folder and, as it is told to, fails, is slow to show or cannot.

It is served by a separate process:

    with faulty_disk(tmp_path, [DiskFault("write", "EIO", times=1)]) as disk:
        ...

python -m tests.faults.disk FOLDER MOUNT PLAN
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

MOUNT_S = 120.0
IN_ORDER = "in order"


@dataclass(frozen=True)
class DiskFault:
    """What fails."""

    operation: str
    """As FUSE calls it: write, read, open, create, rename, link, unlink, fsync, fsyncdir, flush, getattr, statfs; or
    IN_ORDER, by which a write elsewhere than at the file's end is refused."""
    error: str = "EIO"
    """As errno names it."""
    times: int = 1_000_000
    """How often it fails."""
    name: str = ""
    """Part of the path of the files that it concerns."""
    after: int = 0
    """How often it succeeds before."""
    old: bool = False
    """Whether it concerns those files only that were there when the disk was mounted."""
    during: str = ""
    """A file: it fails only while that is there."""


@contextlib.contextmanager
def faulty_disk(folder: Path, faults: Sequence[DiskFault]) -> Iterator[Path]:
    """The mount point of a disk over `folder`/disk. Skips the test where FUSE cannot be used."""
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:  # the package, or the library that it loads
        pytest.skip(f"FUSE is not installed ({error}); `make system` and the dev packages bring it")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is missing or may not be opened")
    backing, mount = folder / "disk", folder / "mount"
    backing.mkdir(exist_ok=True)
    mount.mkdir()
    plan = json.dumps([asdict(fault) for fault in faults])
    command = [sys.executable, "-m", "tests.faults.disk", str(backing), str(mount), plan]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + MOUNT_S
        while not os.path.ismount(mount):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                assert process.stderr is not None
                pytest.skip(f"nothing can be mounted here: {process.stderr.read().decode()[-200:]}")
            time.sleep(0.02)
        yield mount
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(mount)], check=False, stderr=subprocess.DEVNULL)
        process.terminate()
        process.wait(MOUNT_S)
        if process.stderr is not None:
            process.stderr.close()


def serve(backing: str, mount: str, plan: Sequence[dict[str, Any]]) -> None:
    """Serve the disk until it is unmounted."""
    import mfusepy

    faults = [DiskFault(**each) for each in plan]
    met = [0] * len(faults)
    # Held open, so that no new file gets the number of one that is deleted.
    old = {os.fstat(os.open(path, os.O_RDONLY)).st_ino for path in Path(backing).rglob("*")}

    def check(operation: str, path: str | None) -> None:
        for i, fault in enumerate(faults):
            if fault.operation != operation or fault.name not in (path or ""):
                continue
            if fault.during and not os.path.exists(fault.during):
                continue
            if not fault.old or (os.path.exists(backing + str(path)) and os.stat(backing + str(path)).st_ino in old):
                met[i] += 1
                if fault.after < met[i] <= fault.after + fault.times:
                    raise mfusepy.FuseOSError(getattr(errno, fault.error))

    class Disk(mfusepy.Operations):  # type: ignore[misc]
        """Each method is one of FUSE's."""

        use_ns = True

        def _real(self, path: str) -> str:
            return backing + path

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            found = os.lstat(self._real(path))
            names = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid", "st_ino")
            times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
            return {name: getattr(found, name) for name in names} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(self._real(path))]

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(self._real(path), mode)

        def rmdir(self, path: str) -> None:
            os.rmdir(self._real(path))

        def unlink(self, path: str) -> None:
            os.unlink(self._real(path))

        def rename(self, old: str, new: str, flags: int = 0) -> None:
            os.replace(self._real(old), self._real(new))

        def link(self, target: str, source: str) -> None:
            os.link(self._real(source), self._real(target))

        def utimens(self, path: str, times: Any = None) -> None:
            os.utime(self._real(path), ns=times)

        def chmod(self, path: str, mode: int) -> None:
            os.chmod(self._real(path), mode)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            os.truncate(self._real(path), length)

        def open(self, path: str, flags: int) -> int:
            return os.open(self._real(path), flags)

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            if offset != os.fstat(fh).st_size:
                check(IN_ORDER, path)
            return os.pwrite(fh, data, offset)

        def flush(self, path: str, fh: int) -> int:
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            os.fsync(fh)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(backing)
            names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_namemax")
            return {name: getattr(found, name) for name in names} | dict.fromkeys(("f_ffree", "f_favail"), 10**6)

    def failing(operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Disk, path: str, *arguments: Any, **named: Any) -> Any:
            check(operation, path)
            return method(self, path, *arguments, **named)

        return call

    for operation in [name for name in vars(Disk) if not name.startswith("_") and name != "use_ns"]:
        setattr(Disk, operation, failing(operation, getattr(Disk, operation)))
    mfusepy.FUSE(Disk(), mount, foreground=True, nothreads=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
