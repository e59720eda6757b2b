"""What shared disks and mounts answer: one table of faults, exit codes and words, on a FUSE disk that fails."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from ray_sampler.errors import RequestError
from ray_sampler.run_folder import made_by
from ray_sampler.storage import retry
from ray_sampler.storage.archive import archive_intact, content_of, lay_out, merge
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName
from ray_sampler.storage.run_dir import RunDir
from tests.faults.disk import IN_ORDER, DiskFault, faulty_disk
from tests.faults.lives import ARCHIVE, NAMES, live
from tests.storage.fill import FINGERPRINT, fill


@dataclass(frozen=True)
class Case:
    """What a disk does, and what a run must make of it."""

    name: str
    faults: tuple[DiskFault, ...]
    code: int
    """Exit code."""
    word: str = ""
    """In the sentence, or in the log where the code is 0."""
    computed: bool | None = None
    """Whether it comes to the computing; None means that it does where the code is 0."""


def passing(operation: str, error: str, name: str) -> DiskFault:
    """One failure that is seen: after an ESTALE the kernel looks again by itself."""
    return DiskFault(operation, error, 2 if error == "ESTALE" else 1, name=name)


CASES = [
    # What passes.
    *(
        Case(
            f"one {error} while {operation}",
            (DiskFault(operation, error, 1 + (error == "ESTALE"), name=name),),
            0,
            "follows in",
        )
        for operation, error in (
            ("write", "ESTALE"),
            ("rename", "EIO"),
            ("fsync", "ETIMEDOUT"),
            ("create", "ESTALE"),
            ("write", "ESHUTDOWN"),
            ("create", "EHOSTUNREACH"),
        )
        for name in ("000000000004",)
    ),
    *(
        Case(f"one {error} while {operation} the archive", (passing(operation, error, ".npz"),), 0, word)
        for operation, error, word in (
            ("write", "EIO", "follows in"),
            ("rename", "ESTALE", "follows in"),
            ("fsync", "ETIMEDOUT", "written again"),
            ("fsync", "EIO", "written again"),
            ("read", "ESTALE", ""),
        )
    ),
    *(
        Case(
            f"one {error} while looking at {name or 'the output'}", (passing("getattr", error, name),), 0, "follows in"
        )
        for error, name in (("EIO", "/run"), ("ETIMEDOUT", "/fragments"), ("EIO", "/.probe"))
    ),
    Case("EIO that lasts while looking at a folder", (DiskFault("getattr", "EIO", name="/fragments"),), 1, "EIO"),
    Case(
        "a folder that may not be looked at",
        (DiskFault("getattr", "EACCES", name="/fragments"),),
        2,
        "permission denied",
    ),
    Case("an output that may not be looked at", (DiskFault("getattr", "EACCES", name="/run"),), 2, "permission denied"),
    Case("names that are too long", (DiskFault("create", "ENAMETOOLONG", name=".tmp"),), 2, "too long for that disk"),
    Case("EIO that lasts", (DiskFault("write", "EIO", name="000000000004"),), 1, "EIO", computed=True),
    # What a mount does not know.
    *(
        Case(f"hard links are refused with {error}", (DiskFault("link", error),), 0)
        for error in ("EPERM", "EOPNOTSUPP", "EIO")
    ),
    *(
        Case(f"a folder's fsync is refused with {error}", (DiskFault("fsyncdir", error),), 0)
        for error in ("EIO", "EINVAL")
    ),
    *(
        Case(f"writes in order only, else {error}", (DiskFault(IN_ORDER, error),), 0)
        for error in ("ESPIPE", "EOPNOTSUPP")
    ),
    *(
        Case(f"rename is refused with {error}", (DiskFault("rename", error),), 2, "such as renaming files")
        for error in ("ENOSYS", "EOPNOTSUPP", "EINVAL")
    ),
    Case(
        "neither links nor renames",
        (DiskFault("rename", "ENOSYS"), DiskFault("link", "EPERM")),
        2,
        "such as renaming files",
    ),
    # Causes.
    Case("a quota", (DiskFault("write", "EDQUOT", name="00000000"),), 1, "quota", computed=True),
    Case("a full disk", (DiskFault("write", "ENOSPC", name="00000000"),), 1, "the disk is full", computed=True),
    Case(
        "a quota that is found at the close",
        (DiskFault("flush", "EDQUOT", name="00000000"),),
        1,
        "quota",
        computed=True,
    ),
    Case(
        "files of 4 GB at most",
        (DiskFault("write", "EFBIG", name="00000000"),),
        1,
        "raise the limit, or choose an output on another disk",
        computed=True,
    ),
    Case("too many open files", (DiskFault("create", "EMFILE", name="00000000"),), 1, "`ulimit -n`", computed=True),
    Case("a read-only disk", (DiskFault("create", "EROFS"),), 2, "read-only"),
    Case("no right to write", (DiskFault("create", "EACCES"),), 2, "permission denied"),
    # House-keeping.
    Case("probes cannot be deleted", (DiskFault("unlink", "EBUSY", name="/.probe/"),), 0, "could not be deleted"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BACKOFF_S", 0.01), ("LONGEST_WAIT_S", 0.02), ("FIRST_LOOK_S", 0.01), ("HIDDEN_S", 30.0)):
        monkeypatch.setattr(retry, name, seconds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_disk_has_its_exit_code_and_its_words(case: Case, tmp_path, caplog):
    with faulty_disk(tmp_path, case.faults) as disk, caplog.at_level(logging.WARNING):
        life = live(str(disk / "run"))
    assert (life.code, life.said if life.code != case.code else "") == (case.code, "")
    assert case.word in (life.said if case.code else caplog.text)
    assert life.computed == (case.code == 0 if case.computed is None else case.computed)
    assert case.code != 1 or str(disk) in life.said


def test_an_archive_of_many_fragments_is_written_in_order(tmp_path):
    """Some mounts take small files in any order, which they hold in memory, and large ones in order only."""
    names = [FragmentName(i, i + 2, "parquet") for i in range(0, 80, 2)]
    archives = []
    with faulty_disk(tmp_path, [DiskFault(IN_ORDER, "EINVAL", name="samples_")]) as disk:
        for folder in (disk, tmp_path):
            run_dir = RunDir(str(folder / "run"))
            contents = {name: content_of(record) for name, record in fill(run_dir, names).items()}
            merge(run_dir, cover(names, 80), contents, 80, (8, 8, 3), True, FINGERPRINT)
            archives.append(run_dir.read_file(run_dir.archive_name(80, (8, 8, 3))))
    assert archives[0] is not None
    assert archives[0] == archives[1]


def test_a_finished_archive_that_may_not_be_read_is_one_sentence(tmp_path):
    with faulty_disk(tmp_path, [DiskFault("open", "EACCES", name=ARCHIVE)]) as disk:
        life = live(str(disk / "run"))
    assert life.code == 2
    assert f"cannot read {disk / 'run' / ARCHIVE}: permission denied" in life.said


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_a_fragment_that_cannot_be_read_is_rejected_and_sampled_again(tmp_path, error: str, moves: bool, caplog):
    bad = NAMES[0].filename
    faults = [DiskFault("read", error, name=bad, old=True), *([] if moves else [DiskFault("rename", "EIO", old=True)])]
    fill(RunDir(str(tmp_path / "disk" / "run")), NAMES[:1])
    with faulty_disk(tmp_path, faults) as disk:
        life = live(str(disk / "run"))
        assert (life.code, [name for name, _ in life.rejected]) == (0, [bad])
        assert (disk / "run" / "rejected" / bad).exists() == moves
        assert (disk / "run" / ARCHIVE).exists()
    assert ("could not be moved" in caplog.text) != moves


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_a_fragment_that_cannot_be_read_does_not_keep_the_others_from_being_looked_at(tmp_path, format):
    name = NAMES[0]._replace(format=format)
    fill(RunDir(str(tmp_path / "disk" / "run")), [name])
    with faulty_disk(tmp_path, [DiskFault("read", "EIO", name=name.filename)]) as disk:
        assert made_by(RunDir(str(disk / "run")), name, FINGERPRINT) == {}


def test_a_finished_archive_that_cannot_be_read_is_written_again(tmp_path, caplog):
    with faulty_disk(tmp_path, [DiskFault("read", "EIO", name=ARCHIVE)]) as disk:
        assert live(str(tmp_path / "disk" / "run")).code == 0
        run_dir = RunDir(str(disk / "run"))
        records = {name: run_dir.fragments.read(name, FINGERPRINT).record for name in NAMES}
        contents = {name: content_of(record) for name, record in records.items()}
        layout = lay_out(run_dir, cover(NAMES, 8), contents, 8, (8, 8, 3), True, FINGERPRINT)
        assert not archive_intact(run_dir, layout)
        assert f"cannot read {disk / 'run' / ARCHIVE}" in caplog.text
        assert "written again" in caplog.text


@pytest.mark.parametrize("name", ["preview.png", "report.html"])
def test_a_view_that_may_not_be_written_is_a_warning(tmp_path, name: str, caplog):
    with faulty_disk(tmp_path, [DiskFault("create", "EACCES", name=name)]) as disk, caplog.at_level(logging.WARNING):
        run_dir = RunDir(str(disk / "run"))
        run_dir.create_run({})
        run_dir.write_view(name, b"x")
        with pytest.raises(RequestError, match="permission denied"):
            run_dir.write_file(name, b"x")
        assert not run_dir.has(name)
    assert f"{name} could not be written: cannot write {disk / 'run' / name}: permission denied" in caplog.text


@pytest.mark.parametrize("name", [".nfs000000000004f2a100000001", ".fuse_hidden0000001"])
def test_what_a_mount_keeps_of_deleted_files_is_ignored(tmp_path, name: str):
    with faulty_disk(
        tmp_path, [DiskFault("unlink", "EBUSY", name=name), DiskFault("rename", "EBUSY", name=name)]
    ) as disk:
        (disk / "run" / "fragments").mkdir(parents=True)
        (disk / "run" / "fragments" / name).write_text("x")
        life = live(str(disk / "run"))
        assert (life.code, life.rejected) == (0, [])
        RunDir(str(disk / "run")).delete()
        assert RunDir(str(disk / "run")).read_run() is None


def test_a_busy_damaged_file_is_left_with_a_warning(tmp_path, caplog):
    name = "000000000000-000000000002.parquet"
    with faulty_disk(tmp_path, [DiskFault("rename", "EBUSY", name=name)]) as disk:
        (disk / "run" / "fragments").mkdir(parents=True)
        (disk / "run" / "fragments" / name).write_text("x")
        assert live(str(disk / "run")).code == 0
        assert (disk / "run" / "fragments" / name).exists()
    assert f"{name} could not be moved" in caplog.text


def test_a_probe_that_a_cache_hides_is_looked_for_again(tmp_path, caplog):
    faults = [DiskFault("getattr", "ENOENT", name="driver", times=4)]
    (tmp_path / "disk-run").mkdir()
    with faulty_disk(tmp_path, faults) as disk:
        RunDir(str(tmp_path / "disk" / "run")).probe_write("driver")
        actor = RunDir(str(disk / "run"))
        assert not actor.probe_seen("driver")
        assert actor.probe_seen("driver", 60.0)
    assert "not visible yet" in caplog.text
