"""Files from a path, a pipe or a URL: opened once, and read from that one descriptor."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import OpenFile, OpenFiles
from fsspec.implementations.local import LocalFileSystem

from ray_sampler.errors import RequestError, redact, require

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".bin")
"""How names of checkpoints end."""

ATTEMPTS = 3
CHUNK = 2**20


@dataclass(frozen=True)
class Source:
    """A file that is open for reading."""

    file: BinaryIO
    """Seekable and buffered."""
    size: int
    """In bytes, when it was opened."""
    fetched: bool
    """Whether it came over a network."""
    note: str | None
    """What the user should know of how it was fetched."""
    discard: Callable[[], None]
    """Takes it out of the cache."""

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal digits."""
        digest = hashlib.sha256()
        self.file.seek(0)
        while part := self.file.read(CHUNK):
            digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True)
class Folder:
    """A directory, and how a file in it is addressed."""

    url: str
    names: tuple[str, ...]
    """Of the files in it."""

    def join(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"


@contextlib.contextmanager
def open_source(url: str, flag: str = "--model") -> Iterator[Source | Folder]:
    """The file at a path or any fsspec URL, or the directory that is there.

    A pipe, and a file of another machine, are copied to a temporary file first, and http(s) into the user's cache.

    Raises:
        RequestError: there is none, or it cannot be reached or read; the file changed before the context was left.
    """
    shown = str(redact(url))
    with contextlib.ExitStack() as stack:
        try:
            found = _local(Path(url).expanduser(), stack) if "://" not in url else _remote(url, stack)
        except RequestError as error:
            raise RequestError(f"{flag} is {shown}; {error}") from None
        except FileNotFoundError:
            reach = "no such file can be reached" if "://" in url else not_there(url, flag)
            raise RequestError(f"{flag} is {shown}; {reach}") from None
        except Exception as error:  # filesystems raise different exceptions
            # The address may be spelled anew in it, signature and all: %2F becomes a slash.
            said = re.sub(r"[\w+.-]+://[^\s'\"]+", lambda _: shown, str(error).replace(url, shown))
            if isinstance(error, OSError) and error.strerror and "://" not in url:
                raise RequestError(f"{flag} is {shown}; it cannot be read ({error.strerror})") from None
            raise RequestError(
                f"{flag} is {shown}; it cannot be read ({type(error).__name__}: {said.strip().partition(chr(10))[0]}); "
                "check its address and your credentials"
            ) from None
        before = _state(found)
        yield found
        require(
            before == _state(found),
            f"{flag} is {shown}; it changed while it was read; try again when it is written to the end",
        )


def not_there(name: str, flag: str) -> str:
    """What to do about a file that is not where its path says, as a user of other samplers may have given it."""
    network = flag in ("--model", "--guide")
    if network and re.fullmatch(r"(DiT|SiT)-(S|B|L|XL)/[248]", name):
        return "there is no such file; give the path of the checkpoint, whose size is read from its weights"
    if re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+", name) and Path(name).suffix.lower() not in (*SUFFIXES, ".npz"):
        return (
            "there is no such file; where that is a repository of a hub, download the file or folder that is meant and "
            "give its path" + " (pipelines of diffusers cannot be sampled)" * network
        )
    return "there is no such file"


def _state(found: Source | Folder) -> tuple[int, int] | None:
    if isinstance(found, Folder):
        return None
    status = os.fstat(found.file.fileno())
    return status.st_size, status.st_mtime_ns


def _local(path: Path, stack: contextlib.ExitStack) -> Source | Folder:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return Folder(str(path), tuple(sorted(entry.name for entry in path.iterdir() if not entry.is_dir())))
    piped = not stat.S_ISREG(mode)
    require(not piped or stat.S_ISFIFO(mode), "it is a device or a socket; name a file, a pipe or a directory")
    file = stack.enter_context(path.open("rb"))
    return _source(_spooled(file, stack.enter_context(tempfile.TemporaryFile())) if piped else file)


def _spooled(pipe: BinaryIO, file: Any) -> Any:
    """`file` with all that comes through the pipe, which can only be read once and in order."""
    shutil.copyfileobj(pipe, file, CHUNK)
    file.flush()
    return file


def _source(
    file: Any, fetched: bool = False, note: str | None = None, discard: Callable[[], None] = lambda: None
) -> Source:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return Source(file, size, fetched, note, discard)


def _remote(url: str, stack: contextlib.ExitStack) -> Source | Folder:
    fs, path = fsspec.core.url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        return _local(Path(path), stack)
    if re.match(r"https?://", url) and redact(url) == re.sub(
        r"\?download=true$", "", url
    ):  # what has no credential in it
        cache = _Cache(url, fs, path)
        with contextlib.ExitStack() as locked:
            reason = cache.prepare(locked)
            if reason is None:
                return _source(stack.enter_context(cache.open()), True, None, cache.discard)
        note = (
            f"{cache.folder.parent} cannot be written ({reason}), so the file is not kept there; "
            "XDG_CACHE_HOME chooses another folder"
        )
    else:
        note = None
    info = fs.info(path)
    if info["type"] == "directory":
        names = (str(name).rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False))
        return Folder(url, tuple(sorted(names)))
    target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights"
    _again(lambda: fs.get_file(path, str(target)))
    _complete(target.stat().st_size, info.get("size"))
    return _source(stack.enter_context(target.open("rb")), True, note)


def _complete(arrived: int, size: int | None) -> None:
    require(size is None or arrived >= size, f"only {arrived} of its {size} bytes arrived; try again")


def _again(fetch: Callable[[], Any]) -> Any:
    """The result of `fetch`, begun anew after an interruption."""
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # filesystems raise different exceptions
            refused = 400 <= getattr(error, "status", 0) < 500
            if refused or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


class _Cache:
    """The copy of one http(s) file in the user's cache folder, which fsspec's filecache keeps there.

    A file is entered once it has arrived completely. One process fetches at a time; others wait for it.
    """

    def __init__(self, url: str, fs: Any, path: str) -> None:
        self.fs = fs
        self.path = path
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = Path(base).expanduser() / "ray-sampler" / hashlib.sha256(url.encode()).hexdigest()[:32]
        self.about = self.folder / "about.json"

    def prepare(self, stack: contextlib.ExitStack) -> str | None:
        """Makes the folder and locks it until the stack ends. Returns the reason where it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = stack.enter_context((self.folder / "lock").open("w"))
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            return error.strerror or type(error).__name__
        with contextlib.suppress(OSError):  # not every network filesystem has locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        self.files = fsspec.filesystem(
            "filecache", fs=self.fs, cache_storage=str(self.folder), expiry_time=None, skip_instance_cache=True
        )
        return None

    def open(self) -> BinaryIO:
        known = self.known()
        try:
            info = self.fs.info(self.path)
        except Exception:
            if known is None:
                raise
            info = known  # without a network, what is there is taken
        size = info.get("size")
        tags = {name: info[name] for name in ("ETag", "Last-Modified") if name in info}
        if known is not None and {"size": size, **tags} != known:
            self.discard()
        file = _again(self.fetch)
        arrived = os.fstat(file.fileno()).st_size
        if size is not None and arrived < size:
            file.close()
            self.discard()
            _complete(arrived, size)
        staged = self.folder / f"about.{os.getpid()}"
        staged.write_text(json.dumps({"size": size, **tags}))
        staged.replace(self.about)
        return file

    def fetch(self) -> Any:
        # The partial file of an interrupted transfer has no entry, so the next one overwrites it.
        return self.files.open_many(OpenFiles([OpenFile(self.files, self.path, "rb")], mode="rb", fs=self.files))[0]

    def known(self) -> dict[str, Any] | None:
        """What the server said of the file that is here, or None where there is none."""
        try:
            about = json.loads(self.about.read_text())
        except (OSError, ValueError):
            return None
        return about if isinstance(about, dict) else None

    def discard(self) -> None:
        self.about.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # one that is not there
            self.files.pop_from_cache(self.path)
