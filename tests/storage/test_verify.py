from __future__ import annotations

import pytest

from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import DamagedFragment, FragmentName
from ray_sampler.storage.run_dir import RunDir
from ray_sampler.storage.verify import verify
from tests.storage.fill import FINGERPRINT, fill, make_samples


def test_whole_fragments_stay_and_others_are_set_aside_with_reasons(output):
    run_dir = RunDir(output)
    names = [FragmentName(i, i + 4, "parquet" if i % 8 else "npz") for i in range(0, 24, 4)]
    records = fill(run_dir, names)
    whole = run_dir._store.read(f"fragments/{names[1].filename}")
    assert whole is not None
    damaged = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    run_dir.write_fragment(names[1], damaged[: len(damaged) // 2])
    run_dir.write_fragment(names[3], whole)
    run_dir.write_fragment(names[4], encode(make_samples(16, 20), "cd" * 32, {}, "npz")[0])
    run_dir._store.put("fragments/notes.txt", b"mine")
    found = verify(run_dir, FINGERPRINT)
    assert found.records == {name: records[name] for name in (names[0], names[2], names[5])}
    reasons = dict(found.rejected)
    assert set(reasons) == {names[1].filename, names[3].filename, names[4].filename, "notes.txt"}
    assert "another run" in reasons[names[4].filename]
    listing = run_dir.fragments()
    assert set(listing.fragments) == set(found.records)
    assert listing.foreign == []
    for filename, reason in found.rejected:
        assert run_dir._store.read(f"rejected/{filename}") is not None
        assert run_dir._store.read(f"rejected/{filename}.reason.txt") == f"{reason}\n".encode()
    assert verify(run_dir, FINGERPRINT).rejected == []


def test_one_fragment_is_checked_by_itself(tmp_path):
    run_dir = RunDir(str(tmp_path))
    name = FragmentName(0, 4, "parquet")
    records = fill(run_dir, [name])
    assert run_dir.read_fragment(name, FINGERPRINT).record == records[name]
    with pytest.raises(DamagedFragment, match="not there"):
        run_dir.read_fragment(FragmentName(4, 8, "parquet"), FINGERPRINT)
