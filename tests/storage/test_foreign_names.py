"""Names, keys and links that others put into a run directory: left alone, or moved where they are in the way."""

from __future__ import annotations

import os
import uuid

import pytest

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.record import DamagedFragment, FragmentName
from ray_sampler.storage.run_dir import RunDir
from tests.faults.servers import client as s3_client
from tests.storage.fill import FINGERPRINT, NAME, fill, names_in


def test_what_is_not_a_fragment_is_foreign_and_never_followed(tmp_path):
    run_dir = RunDir(str(tmp_path))
    fill(run_dir, [NAME])
    secret = tmp_path / "secret.parquet"
    secret.write_bytes((tmp_path / "fragments" / NAME.filename).read_bytes())
    link = FragmentName(4, 8, "parquet")
    (tmp_path / "fragments" / link.filename).symlink_to(secret)
    (tmp_path / "fragments" / "000000000008-000000000012.parquet").mkdir()
    (tmp_path / "fragments" / "notes").write_text("mine")
    (tmp_path / "fragments" / f".{NAME.filename}.00.tmp").write_text("unfinished")
    listing = run_dir.fragments.list()
    assert listing.fragments == [NAME]
    assert listing.foreign == [link.filename, "000000000008-000000000012.parquet"]
    with pytest.raises((DamagedFragment, RunError)):
        run_dir.fragments.read(link, None)
    for name in listing.foreign:
        run_dir.fragments.reject(name, "foreign")
    assert run_dir.fragments.list()[:2] == ([NAME], [])
    assert secret.exists()
    assert (tmp_path / "fragments" / "notes").read_text() == "mine"
    assert (tmp_path / "rejected" / link.filename).is_symlink()


def test_rejected_names_stay_apart_and_inside(output):
    run_dir = RunDir(output)
    for reason in ("first", "second"):
        run_dir.fragments.write(NAME, reason.encode())
        run_dir.fragments.reject(NAME.filename, reason)
    run_dir.fragments.reject(NAME.filename, "third, of nothing")
    rejected = names_in(run_dir, "rejected")
    whole = {name for name in rejected if not name.endswith(".reason.txt")}
    assert {run_dir._store.read(f"rejected/{name}") for name in whole} == {b"first", b"second"}
    for name in whole:
        content = run_dir._store.read(f"rejected/{name}")
        assert content is not None
        assert run_dir._store.read(f"rejected/{name}.reason.txt") == content + b"\n"
    run_dir.write_file("run.json", b"{}")
    for escaping in ("../run.json", "..", ".", "", "a/../../run.json", "/etc/hostname"):
        run_dir.fragments.reject(escaping, "no")
    assert run_dir.read_run() == {}
    odd = "ümlaut ;name"
    run_dir._store.put(f"fragments/{odd}", b"x")
    run_dir.fragments.reject(odd, "odd")
    assert names_in(run_dir, "fragments") == set()


def test_delete_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.create_run({})
    (tmp_path / "run" / "fragments").symlink_to(tmp_path / "elsewhere")
    run_dir.delete()
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("folder", ["fragments", "rejected", ".probe"])
def test_a_link_in_place_of_a_folder_leads_nowhere(tmp_path, folder):
    """Who may write to a shared directory must not have another user's run write, move or read elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / NAME.filename).write_text("theirs")
    (outside / "driver").write_text("theirs")
    run_dir = RunDir(str(tmp_path / "run"))
    fill(run_dir, [] if folder == "fragments" else [NAME])
    run_dir.create_run({})
    (tmp_path / "run" / folder).symlink_to(outside)
    requests = {
        "fragments": (
            lambda: run_dir.fragments.write(NAME, b"x"),
            lambda: run_dir.fragments.read(NAME, None),
            run_dir.fragments.list,
            lambda: run_dir.fragments.reject(NAME.filename, "x"),
            lambda: run_dir._store.clear_abandoned("fragments"),
        ),
        "rejected": (lambda: run_dir.fragments.reject(NAME.filename, "x"),),
        ".probe": (lambda: run_dir.probe_write("driver"), lambda: run_dir.probe_seen("driver"), run_dir.probes_clear),
    }
    for request in requests[folder]:
        with pytest.raises(RequestError, match="is a link"):
            request()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {NAME.filename: "theirs", "driver": "theirs"}
    if folder == "rejected":
        assert run_dir.fragments.list().fragments == [NAME]


def test_a_link_in_place_of_a_file_is_replaced_and_what_it_names_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.create_run({})
    archive = "samples_1x1x1x1.npz"
    for name in (archive, "preview.png", "summary.json"):
        (tmp_path / "run" / name).symlink_to(outside)
        assert not run_dir.has(name)
    with pytest.raises(FileNotFoundError), run_dir.open_file(archive):
        pass
    run_dir.write_archive(archive, [b"ours"])
    run_dir.write_file("preview.png", b"ours")
    assert run_dir.read_file("preview.png") == run_dir.read_file(archive) == b"ours"
    with pytest.raises(RunError, match="a link is in the place"):
        run_dir.read_file("summary.json")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "run.json").symlink_to(outside)
    with pytest.raises(RunError):
        run_dir.create_run({})
    assert outside.read_bytes() == b"theirs"


def test_keys_that_no_folder_could_hold_are_left_where_they_are(moto):
    """In a bucket, fragments/../run.json is a key like any other, and no path."""
    prefix = uuid.uuid4().hex
    run_dir = RunDir(f"s3://samples/{prefix}")
    run_dir.create_run({"seed": 1})
    fill(run_dir, [NAME])
    client = s3_client(moto)
    odd = [f"{prefix}/fragments/../run.json", f"{prefix}/fragments//{NAME.filename}", f"{prefix}/fragments/./x"]
    for key in odd:
        client.put_object(Bucket="samples", Key=key, Body=b"theirs")
    client.put_object(Bucket="samples", Key=f"{prefix}/fragments/sub/x", Body=b"theirs")
    listing = run_dir.fragments.list()
    assert listing.fragments == [NAME]
    assert listing.foreign == []
    run_dir.fragments.verify(FINGERPRINT)
    assert run_dir.read_run() == {"seed": 1}
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="samples", Prefix=prefix)["Contents"]}
    assert {*odd, f"{prefix}/run.json", f"{prefix}/fragments/sub/x"} <= keys
    assert all(key.startswith(f"{prefix}/") for key in keys)


def test_a_file_of_another_name_is_left_alone_whatever_its_bytes(tmp_path):
    run_dir = RunDir(str(tmp_path))
    fill(run_dir, [NAME])
    others = (b".nfs01", b"\xff\xfe.parquet", b"line\nbreak", b"\x1b[2J", b"%2e%2e%2frun.json", b"x" * 255)
    for name in others:
        (tmp_path / "fragments" / os.fsdecode(name)).write_bytes(b"x")
    assert run_dir.fragments.verify(FINGERPRINT).rejected == []
    assert run_dir.fragments.list()[:2] == ([NAME], [])
    assert not (tmp_path / "rejected").exists()
    assert {os.fsencode(path.name) for path in (tmp_path / "fragments").iterdir()} == {*others, NAME.filename.encode()}
