"""The run directory: every name below the output URL, and nothing else names one."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage import retry
from ray_sampler.storage.connect import open_store
from ray_sampler.storage.local_store import LocalStore
from ray_sampler.storage.ranges import RangeSet, housekeeping, is_plain
from ray_sampler.storage.record import Column, fingerprint
from ray_sampler.storage.retry import look_again
from ray_sampler.storage.store import Chunks, Read

logger = logging.getLogger(__name__)

RUN = "run.json"
FRAGMENTS = "fragments"
LATENTS, FEATURES = PRODUCTS = ("latents", "features")
"""Folders of other products: one, and one for each extractor."""
REJECTED = "rejected"
RUN_KINDS = {"fingerprint": str, "identity": dict, "num_samples": int, "labelled": bool, "settings": dict}
PROBE = ".probe"
PROBE_SECONDS = 3600.0
TRIAL_BYTES = b"ray-sampler"
SUMMARY, REPORT, SCORES = "summary.json", "report.html", "scores.json"
REFERENCES = "references"
"""Features of the pictures with which a run is compared."""
OUTCOME = ("preview.png", SUMMARY, REPORT, SCORES, REFERENCES)
ARCHIVE = re.compile(r"samples_[0-9]+x[0-9]+x[0-9]+x[0-9]+\.npz")


class RunDir:
    """A run's directory at a local path or any fsspec URL.

    Nothing is read or written until a method is called. It can be pickled.

    Raises:
        RequestError: the URL's protocol is unknown, needs a package that is not installed, or names a file.
    """

    def __init__(self, url: str) -> None:
        self._store = open_store(url)
        self.url = self._store.url
        self.fragments = self.ranges()
        """Those of the run itself."""
        if isinstance(self._store, LocalStore) and self._store.is_file():
            raise RequestError(f"{self.url} is a file; an output must be a folder")

    def __repr__(self) -> str:
        return f"RunDir({self.url!r})"

    def read_run(self) -> dict[str, Any] | None:
        """run.json, None where there is none.

        Raises:
            RunError: it is corrupt.
        """
        data = self._store.read(RUN)
        if data is None:
            return None
        try:
            run = json.loads(data)
        except (ValueError, RecursionError):
            run = None
        if not is_whole(run):
            raise RunError(
                f"{self.url}/{RUN} is corrupt; delete it and run the same command again (finished samples are kept)"
            )
        return dict(run)

    def create_run(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Write run.json unless there is one, and return its content: this one, or a rival's."""
        self._store.create(RUN, run_json(run))
        standing = look_again(self.read_run, f"{self.url}/{RUN}", retry.HIDDEN_S)
        if standing is None:
            raise RunError(
                f"{self.url}/{RUN} was written, and could not be read within {retry.HIDDEN_S:.0f} s after; "
                "is another run deleting this directory, or a cache between you and the store hiding it for longer?"
            )
        return standing

    def replace_run(self, run: Mapping[str, Any]) -> None:
        """Write run.json anew, as when num_samples grows."""
        self._store.put(RUN, run_json(run))

    def ranges(self, folder: str = FRAGMENTS, holds: Mapping[str, Column | None] | None = None) -> RangeSet:
        """A folder of ranges: the fragments, or another product of the run.

        Args:
            holds: columns without which a file is damaged: images in fragments, unless given.
        """
        images = {"image": None} if folder == FRAGMENTS else {}
        rejects = REJECTED if folder == FRAGMENTS else f"{REJECTED}/{folder}"
        return RangeSet(self._store, folder, rejects, images if holds is None else holds)

    def kept_latents(self) -> tuple[RangeSet, str] | None:
        """Where a run keeps what its solver gave, and as which column; None where it keeps nothing of the kind.

        They are (C, H, W) in the column latent, (H, W, C) in the column image.
        """
        run = self.read_run() or {}
        if LATENTS in self.products():
            return self.ranges(LATENTS), "latent"
        return (self.fragments, "image") if run.get("identity", {}).get("decoder") == "none" else None

    def products(self) -> list[str]:
        """The folders of ranges that are there beside the fragments."""
        top = {entry.name for entry in self._store.list("") if not entry.is_file}
        inside = [entry.name for entry in self._store.list(FEATURES) if not entry.is_file] if FEATURES in top else []
        return [LATENTS][: LATENTS in top] + sorted(f"{FEATURES}/{name}" for name in inside if is_plain(name))

    def write_file(self, name: str, data: bytes) -> None:
        """Write preview.png, summary.json or report.html, complete or absent."""
        self._store.put(name, data)

    def write_view(self, name: str, data: bytes) -> None:
        """Write preview.png or report.html, which a run can do without: there is a warning where that fails."""
        with housekeeping(f"{name} could not be written"):
            self.write_file(name, data)

    def read_file(self, name: str) -> bytes | None:
        """A file at the top of the directory, None where there is none."""
        return self._store.read(name)

    def path_of(self, name: str) -> str:
        """The path or URL of a file at the top of the directory, without a credential."""
        return f"{self.url}/{name}"

    def archive_name(self, num_samples: int, image_shape: tuple[int, int, int]) -> str:
        """The archive's name, as samples_50000x64x64x3.npz; `image_shape` is (H, W, C)."""
        return f"samples_{'x'.join(map(str, (num_samples, *image_shape)))}.npz"

    def write_archive(self, name: str, chunks: Chunks, size: int = 0) -> None:
        """Write the archive from its pieces, in order; it is complete or absent, absent after any exception.

        Args:
            size: bytes to come, as far as known; a store that takes a bounded number of parts makes them larger.

        Raises:
            NotCommitted: the store did not keep it; written anew, it may.
        """
        for folder in ("", FRAGMENTS):
            self._store.clear_abandoned(folder)
        self._store.upload(name, chunks, size)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name at the top of the directory."""
        return any(entry.name == name and entry.is_file for entry in self._store.list(""))

    def read_end(self, name: str, size: int) -> bytes | None:
        """The last bytes of a file at the top of the directory; as of a store."""
        return self._store.read_end(name, size)

    def open_file(self, name: str) -> AbstractContextManager[Read]:
        """Read a file at the top of the directory piece by piece. Raises FileNotFoundError."""
        return self._store.open(name)

    def probe_write(self, name: str) -> None:
        """Leave a tiny file that proves that its writer can write here."""
        self._store.put(f"{PROBE}/{name}", name.encode())

    def probe_seen(self, name: str, patience_s: float = 0.0) -> bool:
        """Whether a probe can be read from here, which is tried for `patience_s` seconds: caches hide new names."""
        path = f"{PROBE}/{name}"
        return look_again(lambda: self._store.read(path), f"{self.url}/{path}", patience_s) is not None

    def prove_rights(self) -> None:
        """Try all that a run needs before anything is computed: list, write, read, replace, and write in parts.

        The right to delete is not among it: without it a run leaves its probes behind.

        Raises:
            RequestError: a right is missing, or the mount cannot do it; says which.
            RunError: the store fails.
        """
        path = f"{PROBE}/rights-{secrets.token_hex(8)}"
        self._store.list(FRAGMENTS)
        try:
            self._store.put(path, TRIAL_BYTES)
            try:
                self._store.put(path, TRIAL_BYTES * 2)
            except RequestError as error:
                raise RequestError(
                    f"{error}; new files can be written there, but none replaced, which a run needs to redraw its "
                    "preview and to sample damaged fragments again"
                ) from error
            look_again(lambda: self._store.read(path), f"{self.url}/{path}", retry.HIDDEN_S)
            self._store.upload(path, [TRIAL_BYTES], len(TRIAL_BYTES))
        finally:
            with housekeeping("a probe could not be deleted"):
                self._store.remove(path)

    def probes_clear(self, prefix: str = "") -> None:
        """Remove the probes whose names begin with `prefix`, and those that a killed driver left an hour ago.

        Where that fails, there is a warning: probes do no harm.
        """
        with housekeeping("probes could not be deleted"):
            kept = 0
            for entry in self._store.list(PROBE, times=True):
                old = entry.modified is not None and entry.modified < time.time() - PROBE_SECONDS
                if entry.name.startswith(prefix) or old:
                    self._store.remove(f"{PROBE}/{entry.name}")
                else:
                    kept += 1
            if not kept:
                self._store.remove(PROBE)

    def deletable(self) -> list[str]:
        """What lies in the directory, if `delete` may be called.

        Raises:
            RequestError: the directory holds something, but no run.json.
        """
        names = [entry.name for entry in self._store.list("")]
        if RUN not in names and set(names) - {PROBE}:
            raise RequestError(
                f"{self.url} holds files but no {RUN}, so it is not a run's; --overwrite deletes nothing there"
            )
        return names

    def delete(self) -> None:
        """Remove the run and only what belongs to one; other files in the directory stay, and the probes of actors.

        Raises:
            RequestError: as of `deletable`.
        """
        names = self.deletable()
        # run.json is deleted last: while it exists, the same request can be repeated.
        for name in [n for n in names if n in (FRAGMENTS, *PRODUCTS, REJECTED, *OUTCOME) or ARCHIVE.fullmatch(n)]:
            self._store.remove(name)
        if RUN in names:
            self._store.clear_abandoned("", seconds=0)
            self._store.remove(RUN)


def is_whole(run: Any) -> bool:
    """Whether what was read as run.json is an object, and says of a run, if of any, what it must, unchanged."""
    if not isinstance(run, dict):
        return False
    if not run.keys() & {"fingerprint", "identity"}:
        return True  # another program's; whoever asks for a run finds none in it
    shape = run.get("image_shape")
    return (
        all(type(run.get(name)) is kind for name, kind in RUN_KINDS.items())
        and fingerprint(run["identity"]) == run["fingerprint"]
        and isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and n > 0 for n in (*shape, run["num_samples"]))
    )


def run_json(run: Mapping[str, Any]) -> bytes:
    return json.dumps(run, indent=2, sort_keys=True).encode() + b"\n"
