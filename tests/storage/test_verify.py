from __future__ import annotations

import pytest

from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import DamagedFragment, FragmentName
from ray_sampler.storage.run_dir import RunDir
from tests.storage.fill import FINGERPRINT, NAME, fill, make_samples, names_in


def test_whole_fragments_stay_and_others_are_rejected_with_reasons(output):
    run_dir = RunDir(output)
    names = [FragmentName(i, i + 4, "parquet" if i % 8 else "npz") for i in range(0, 24, 4)]
    records = fill(run_dir, names)
    whole = run_dir._store.read(f"fragments/{names[1].filename}")
    assert whole is not None
    damaged = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    run_dir.fragments.write(names[1], damaged[: len(damaged) // 2])
    run_dir.fragments.write(names[3], whole)
    run_dir.fragments.write(names[4], encode(make_samples(16, 20), "cd" * 32, {}, "npz")[0])
    run_dir._store.put("fragments/notes.txt", b"mine")
    found = run_dir.fragments.verify(FINGERPRINT)
    assert found.records == {name: records[name] for name in (names[0], names[2], names[5])}
    reasons = dict(found.rejected)
    assert set(reasons) == {names[1].filename, names[3].filename, names[4].filename}
    assert "another run" in reasons[names[4].filename]
    listing = run_dir.fragments.list()
    assert set(listing.fragments) == set(found.records)
    assert run_dir._store.read("fragments/notes.txt") == b"mine"
    for filename, reason in found.rejected:
        assert run_dir._store.read(f"rejected/{filename}") is not None
        assert run_dir._store.read(f"rejected/{filename}.reason.txt") == f"{reason}\n".encode()
    assert run_dir.fragments.verify(FINGERPRINT).rejected == []


def test_a_damaged_file_that_cannot_be_moved_is_known_until_a_whole_one_replaces_it(tmp_path, monkeypatch):
    run_dir, ranges = RunDir(str(tmp_path)), RunDir(str(tmp_path)).ranges()
    names = [FragmentName(0, 4, "parquet"), FragmentName(4, 8, "parquet")]
    fill(run_dir, names)
    assert ranges.noted() == {}
    monkeypatch.setattr(type(run_dir._store), "move", lambda *paths: None)
    for damaged in (b"first", b"second"):
        run_dir.fragments.write(names[1], damaged)
        assert list(RunDir(str(tmp_path)).fragments.verify(FINGERPRINT).records) == names[:1]
        assert list(ranges.noted()) == [names[1]]
        assert run_dir._store.read(f"fragments/{names[1].filename}") == damaged
    fill(run_dir, names[1:])
    assert list(RunDir(str(tmp_path)).fragments.verify(FINGERPRINT).records) == names
    assert ranges.noted() == {}


def test_a_moved_file_is_not_known_as_one_that_stayed_though_another_came_after_it(tmp_path):
    run_dir = RunDir(str(tmp_path))
    for _ in range(2):
        run_dir.fragments.write(NAME, b"damaged")
        run_dir.fragments.verify(FINGERPRINT)
    fill(run_dir, [NAME])
    assert len(names_in(run_dir, "rejected")) == 4
    assert run_dir.ranges().noted() == {}


def test_many_rejected_files_are_listed_once(tmp_path, monkeypatch):
    run_dir, listed = RunDir(str(tmp_path)), []
    names = [FragmentName(i, i + 1, "parquet") for i in range(20)]
    for name in names:
        run_dir.fragments.write(name, b"damaged")
    real = run_dir._store.list

    def counted(path, *times):
        listed.append(path)
        return real(path, *times)

    monkeypatch.setattr(run_dir._store, "list", counted)
    for name in names:
        run_dir.fragments.reject(name.filename, "damaged")
    assert listed == ["rejected"]
    assert len(names_in(run_dir, "rejected")) == 40


def test_one_fragment_is_checked_by_itself(tmp_path):
    run_dir = RunDir(str(tmp_path))
    name = FragmentName(0, 4, "parquet")
    records = fill(run_dir, [name])
    assert run_dir.fragments.read(name, FINGERPRINT).record == records[name]
    with pytest.raises(DamagedFragment, match="not there"):
        run_dir.fragments.read(FragmentName(4, 8, "parquet"), FINGERPRINT)
