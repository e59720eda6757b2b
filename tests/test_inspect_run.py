"""status, verify, merge and preview work on what is on disk, whole or damaged, without Ray."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_sampler.cli import main
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.local_store import LocalStore
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir
from tests.cluster.runs import ARCHIVE, contents, fragments, leave, part, savez
from tests.conftest import Configure

WHOLE = [(0, 16), (16, 32), (32, 40)]
PARTIAL = [(0, 8), (16, 24), (24, 32)]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


def name(start: int, stop: int) -> str:
    return f"{start:012d}-{stop:012d}.parquet"


def status_of(output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["status", str(output), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    status: dict[str, object] = json.loads(out)
    return status


def damage(output: Path, samples: Samples) -> None:
    """Cut one of WHOLE short, and put another run's fragment, a folder and a text file beside them."""
    folder = output / "fragments"
    (folder / name(16, 32)).write_bytes((folder / name(16, 32)).read_bytes()[:-100])
    (folder / name(40, 48)).write_bytes(encode(part(samples, 0, 8), "ab" * 32, {}, "parquet")[0])
    (folder / name(0, 40)).mkdir()
    (folder / "notes.txt").write_text("not a fragment")


# status


def test_status_reports_what_is_missing(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, PARTIAL)
    status = status_of(output, capsys)
    assert status["state"] == "sampling"
    assert (status["num_samples"], status["finished"]) == (40, 24)
    assert status["missing"] == [[8, 16], [32, 40]]
    assert status["archive"] is None
    assert status["devices"] == {"cpu": 24}
    assert status["mixed_numerics"] is False


def test_status_recognises_an_abandoned_run(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, PARTIAL)
    for path in (output / "fragments").iterdir():
        os.utime(path, (time.time() - 86400,) * 2)
    assert status_of(output, capsys)["state"] == "stopped"


def test_status_of_each_stage(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, [])
    assert status_of(output, capsys)["state"] == "empty"
    leave(configure(), samples, WHOLE)
    assert status_of(output, capsys)["state"] == "sampled"
    assert main(["merge", str(output)]) == 0
    capsys.readouterr()
    status = status_of(output, capsys)
    assert (status["state"], status["archive"], status["finished"]) == ("done", ARCHIVE, 40)


def test_status_for_people_says_the_same(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, PARTIAL)
    assert main(["status", str(output)]) == 0
    out = capsys.readouterr().out
    assert "24 of 40 samples" in out
    assert "8-15, 32-39" in out
    assert "not written yet" in out


def test_status_watches_until_the_run_is_complete(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    main(["merge", str(output)])
    assert main(["status", str(output), "--watch"]) == 0


def test_status_reads_a_damaged_directory_and_changes_nothing(configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    damage(output, samples)
    before = contents(output)
    status = status_of(output, capsys)
    assert status["finished"] == 40  # by the names; `verify` reads them
    assert contents(output) == before


def test_a_damaged_fragment_that_could_not_be_moved_does_not_count_as_done(
    configure: Configure, output: Path, samples: Samples, capsys, monkeypatch
):
    leave(configure(), samples, WHOLE)
    path = output / "fragments" / name(0, 16)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "move", lambda *paths: None)
        assert main(["verify", str(output)]) == 1
    capsys.readouterr()
    before = contents(output)
    assert status_of(output, capsys)["finished"] == 24
    assert contents(output) == before
    path.write_bytes(whole)
    assert status_of(output, capsys)["finished"] == 40


# verify


def test_verify_of_a_whole_run_finds_nothing(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    before = contents(output)
    assert main(["verify", str(output)]) == 0
    assert "3 fragments OK, 0 rejected" in capsys.readouterr().out
    assert contents(output) == before


def test_verify_and_status_check_the_archive(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    assert main(["verify", str(output)]) == 0
    assert ARCHIVE not in capsys.readouterr().out
    assert main(["merge", str(output)]) == 0
    capsys.readouterr()
    assert main(["verify", str(output)]) == 0
    assert f"{ARCHIVE} OK" in capsys.readouterr().out
    archive = output / ARCHIVE
    right = archive.read_bytes()
    for wrong, known_by_size in (
        (right[:-1], True),
        (right[:1000], True),
        (right[:4000] + bytes(9) + right[4009:], False),
    ):
        archive.write_bytes(wrong)
        capsys.readouterr()
        status = status_of(output, capsys)
        assert (status["archive_damaged"], status["state"] == "done") == (known_by_size, not known_by_size)
        assert main(["verify", str(output)]) == 1
        assert "the archive is damaged" in capsys.readouterr().out
    assert main(["merge", str(output)]) == 0
    assert archive.read_bytes() == right


def test_verify_sets_aside_what_is_damaged_or_foreign_with_reasons(configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    damage(output, samples)
    assert main(["verify", str(output)]) == 1
    out = capsys.readouterr().out
    assert "2 fragments OK, 3 rejected" in out
    assert "16 of 40 samples are missing" in out
    for filename, reason in (
        (name(16, 32), "parquet"),
        (name(40, 48), "another run"),
        (name(0, 40), "a folder"),
    ):
        assert (output / "rejected" / filename).exists()
        assert reason in (output / "rejected" / f"{filename}.reason.txt").read_text()
        assert f"rejected {filename}: " in out
    assert fragments(output) == [name(0, 16), name(32, 40), "notes.txt"]
    assert main(["verify", str(output)]) == 1  # nothing more to reject, but samples are missing
    assert "2 fragments OK, 0 rejected" in capsys.readouterr().out


def test_verify_checks_every_product_of_a_run(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    run = json.loads((output / "run.json").read_text())
    ranges = RunDir(str(output)).ranges("latents")
    for start, stop in ((0, 16), (16, 24)):
        latents = Samples(start, {"latent": np.ones((stop - start, 4, 2, 2), np.float32)})
        data, _ = encode(latents, run["fingerprint"], {}, "parquet")
        ranges.write(FragmentName(start, stop, "parquet"), data)
    assert main(["verify", str(output)]) == 0
    assert "latents: 2 OK, 0 rejected" in capsys.readouterr().out
    path = output / "latents" / name(16, 24)
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["verify", str(output)]) == 1
    out = capsys.readouterr().out
    assert f"rejected latents/{name(16, 24)}: " in out
    assert "3 fragments OK, 0 rejected" in out
    assert (output / "rejected" / "latents" / name(16, 24)).exists()


def test_verify_says_when_several_numerics_keys_computed_a_run(configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    run = json.loads((output / "run.json").read_text())
    data, _ = encode(part(samples, 0, 16), run["fingerprint"], {"numerics_key": "another"}, "parquet")
    (output / "fragments" / name(0, 16)).write_bytes(data)
    assert main(["verify", str(output)]) == 0
    assert "2 numerics keys: a key; another" in capsys.readouterr().out
    assert status_of(output, capsys)["mixed_numerics"] is True


# merge


@pytest.mark.parametrize("ranges", [WHOLE, [(0, 40)], [(0, 24), (8, 12), (16, 40), (20, 60)]])
def test_merge_writes_what_savez_writes(configure: Configure, output: Path, samples: Samples, ranges, capsys):
    assert samples.labels is not None
    more = Samples.of(0, np.tile(samples.images, (2, 1, 1, 1)), np.tile(samples.labels, 2))
    leave(configure(), more, ranges)
    assert main(["merge", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / ARCHIVE)
    assert (output / ARCHIVE).read_bytes() == savez(samples)


def test_merge_refuses_an_incomplete_run_and_writes_nothing(configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, PARTIAL)
    before = contents(output)
    assert main(["merge", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ray-sampler: 16 of 40 samples are missing")
    assert contents(output) == before


def test_merge_refuses_a_damaged_run_and_keeps_an_earlier_archive(configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, WHOLE)
    main(["merge", str(output)])
    damage(output, samples)
    assert main(["merge", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ray-sampler: 16 of 40 samples are missing")
    assert (output / ARCHIVE).read_bytes() == savez(samples)


# preview


@pytest.mark.parametrize("ranges", [WHOLE, PARTIAL])
def test_preview_draws_what_is_there(configure: Configure, output: Path, samples: Samples, ranges, capsys):
    leave(configure(), samples, ranges)
    assert main(["preview", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / "preview.png")
    with Image.open(io.BytesIO((output / "preview.png").read_bytes())) as picture:
        picture.load()
        assert picture.format == "PNG"


def test_preview_leaves_damaged_fragments_out(configure: Configure, output: Path, samples: Samples):
    leave(configure(), samples, WHOLE)
    damage(output, samples)
    assert main(["preview", str(output)]) == 0


def test_preview_without_a_fragment_is_an_error(configure: Configure, output: Path, samples: Samples, capsys):
    leave(configure(), samples, [])
    assert main(["preview", str(output)]) == 1
    assert "no readable fragment" in capsys.readouterr().err
    assert not (output / "preview.png").exists()


# Directories that are not a run's


@pytest.mark.parametrize("command", ["status", "verify", "merge", "preview"])
@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        pytest.param(lambda output: None, 2, id="absent"),
        pytest.param(lambda output: output.mkdir(), 2, id="empty"),
        pytest.param(lambda output: output.write_text("a file"), 2, id="a file"),
        pytest.param(lambda output: (output.mkdir(), (output / "run.json").write_text("{")), 1, id="cut run.json"),
        pytest.param(lambda output: (output.mkdir(), (output / "run.json").write_text("{}")), 2, id="other JSON"),
    ],
)
def test_a_directory_that_holds_no_run_is_refused_in_one_sentence(output: Path, command, prepare, code, capsys):
    prepare(output)
    before = contents(output.parent)
    assert main([command, str(output)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ray-sampler: ")
    assert str(output) in line
    assert contents(output.parent) == before
