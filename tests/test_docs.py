"""What README and docs say can be typed, called and opened: commands, flags, files, links and code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_sampler import cli
from ray_sampler.commands import request_of
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.flags import SYNONYMS
from ray_sampler.storage.record import FragmentName
from ray_sampler.storage.run_dir import RunDir
from tests.storage.fill import fill, make_samples

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("ray-sampler", "python jobs/sample.py", "mpiexec -n 8 python image_sample.py")
"""How a command of ours begins, in the original's command line as well, which runs with its launcher replaced."""
FOREIGN = {
    "--follow": "ray job logs",
    "--generate": "ray get-auth-token",
    "--working-dir": "ray job submit",
    "--dashboard-agent-listen-port": "ray start",
    "--head": "ray start",
    "--port": "ray start",
    "--metrics-export-port": "ray start",
}
"""Flags of Ray's commands that the pages name."""
SCRIPTS = """--ckpt --image-size --num-classes --num-sampling-steps --cfg-scale --num-fid-samples
--per-proc-batch-size --global-seed --vae --sample-dir --tf32 --diffusion-form --last-step --last-step-size
--sampling-method --path-type --resolution --encoder-depth --projector-embed-dims --qk-norm --mode --num-steps --heun
--guidance-low --guidance-high --net --gnet --seeds --class --batch --outdir"""
"""Flags of the scripts of DiT, SiT, REPA and EDM2."""

OTHERS = {*SCRIPTS.split(), "--json", "--watch", "--cache", "--unseen", "--help", "--help-all"}
OTHERS |= {"--subdirs", "--reference"}
OTHERS |= {f"--{spelled}" for name in SYNONYMS for spelled in (name, name.replace("_", "-"))}
"""Flags of our other commands, of examples/digits/evaluate.py, and of other programs."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:60]}"


def blocks(*languages: str) -> list[Block]:
    found = [
        Block(page.name, language, text)
        for page in PAGES
        for language, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if block.language in languages]


def commands() -> list[tuple[str, str]]:
    """Every command of the shell blocks, with the name of its page."""
    return [
        (block.page, command.strip())
        for block in blocks("sh")
        for command in block.text.replace("\\\n", " ").splitlines()
        if command.strip() and not command.strip().startswith("#")
    ]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def ours() -> list[tuple[str, list[str]]]:
    """The arguments of each `ray-sampler` that the pages call, with the name of its page."""
    found = []
    for page, command in commands():
        for launcher in LAUNCHERS:
            before, launched, rest = command.partition(launcher)
            if launched and (not before or before.endswith(" -- ")):
                arguments = [word for word in words(rest) if word not in ("...", "&")]
                found.append((page, arguments if launcher == "ray-sampler" else ["sample", *arguments]))
    return found


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 30
    assert len(ours()) > 12
    assert {"sample", "status", "verify", "merge", "preview"} <= {arguments[0] for _, arguments in ours()}


@pytest.mark.parametrize(("page", "arguments"), ours(), ids=str)
def test_our_commands_are_taken(
    page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "levels.txt").write_text("80\n1\n")
    command, parsed = cli.parse(arguments)
    if command is cli.COMMANDS["sample"]:
        assert cli.main([*arguments, "--dry_run"]) == 0
        shown = json.loads(capsys.readouterr().out)
        given = request_of(parsed)
        assert shown["num_samples"] == (given.num_samples or 10_000)
        assert shown["output"] == given.output


@pytest.mark.parametrize(("page", "command"), [each for each in commands() if "make" in words(each[1])[:1]])
def test_make_has_the_targets(page: str, command: str) -> None:
    target, *variables = words(command)[1:]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    dry = subprocess.run(
        ["make", "--no-print-directory", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if target == "sample":
        started = re.sub(r"^.*jobs/sample\.py", "", dry.strip().splitlines()[-1])
        assert request_of(cli.parse(["sample", *shlex.split(started)])[1]).score == "digits"


def test_make_sample_and_the_plain_command_of_the_readme_are_the_same_request() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    dry = ["make", "--no-print-directory", "-n", "sample"]
    more = subprocess.run([*dry, "ARGS=--num-samples 5"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--output runs/digits" in more  # which this flag extends
    made = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    (plain,) = {
        tuple(words) for page, words in ours() if page == "README.md" and words[-2:] == ["--output", "runs/digits"]
    }
    requests = [request_of(cli.parse(["sample", *made.split("jobs/sample.py")[1].split()])[1])]
    requests.append(request_of(cli.parse([*plain])[1]))
    assert requests[0] == requests[1]


@pytest.mark.parametrize(("page", "command"), [each for each in commands() if each[1].startswith("ray ")])
def test_rays_commands_exist(page: str, command: str) -> None:
    """Their names and flags, as Ray's own command line knows them."""
    import click
    from ray.scripts.scripts import cli as ray_cli

    at: Any = ray_cli
    rest = [word for word in words(command.partition("&&")[0]) if word != "&"][1:]
    while isinstance(at, click.Group) and rest:
        assert rest[0] in at.commands, command
        at = at.commands[rest.pop(0)]
    given = {word for word in (rest[: rest.index("--")] if "--" in rest else rest) if word.startswith("--")}
    known = {option for parameter in at.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert given <= known, command


def test_flags_that_are_named_exist() -> None:
    own = {f"--{field.name}" for field in fields(RunConfig)}
    known = own | {flag.replace("_", "-") for flag in own} | set(FOREIGN) | OTHERS
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert flag in known, f"{page.name}: {code}"


def test_commands_have_their_flags_as_the_help_shows_them() -> None:
    """With hyphens; migrating.md has the command lines of another program."""
    for page, arguments in ours():
        if page != "migrating.md":
            assert not [word for word in arguments if re.match(r"--[a-z0-9-]*_", word)], f"{page}: {arguments}"


def test_subcommands_that_are_named_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`ray-sampler (\w+)", page.read_text()):
            assert name in cli.COMMANDS, f"{page.name}: ray-sampler {name}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"https?://", target):
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_of_the_checkout_that_are_named_exist() -> None:
    pattern = r"`((?:ray_sampler|tests|examples|deploy|docs|jobs|benchmarks)/[\w./-]*)`"
    named = {(page.name, path) for page in PAGES for path in re.findall(pattern, page.read_text())}
    assert named
    for page_name, path in named:
        assert (ROOT / path).exists(), f"{page_name}: {path}"
    for page_name, command in commands():
        for path in re.findall(r"(?<![\w/.])(?:examples|jobs|deploy)/[\w./-]+", command):
            assert (ROOT / path).exists(), f"{page_name}: {command}"


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, block.page, "exec")


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_blocks_are_json(block: Block) -> None:
    json.loads(block.text)


# What docs/storage.md shows, on fragments of 32 x 32 pixels.


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Images of a run in runs/digits, as docs/storage.md reads it, of 100 samples in two fragments."""
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir("runs/digits")
    fill(run_dir, [FragmentName(0, 25, "parquet"), FragmentName(25, 100, "parquet")], shape=(32, 32, 3))
    return make_samples(0, 100, shape=(32, 32, 3)).images


def storage_block(containing: str) -> str:
    (block,) = [each for each in blocks("python") if each.page == "storage.md" and containing in each.text]
    return block.text


def test_read_fragment_gives_what_its_comments_say(digits: np.ndarray) -> None:
    names: dict[str, Any] = {}
    exec(storage_block("fragment.samples.images"), names)
    fragment = names["fragment"]
    np.testing.assert_array_equal(fragment.samples.images, digits[:25])
    assert (fragment.samples.images.shape, fragment.samples.images.dtype) == ((25, 32, 32, 3), np.uint8)
    assert (fragment.samples.labels.shape, fragment.samples.labels.dtype) == ((25,), np.int32)
    assert fragment.record.computed_by["device"] == "cpu"


ONE_LINERS = [line for line in storage_block("duckdb").splitlines() if line.startswith("images(")]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("line", ONE_LINERS, ids=lambda line: line.removeprefix("images(").split("(")[0])
def test_each_line_turns_the_column_into_images(line: str, digits: np.ndarray) -> None:
    definitions = [each for each in storage_block("duckdb").splitlines() if not each.startswith("images(")]
    names: dict[str, Any] = {}
    exec("\n".join(definitions), names)
    names["folder"] = str(Path(names["folder"]).resolve())  # Ray's workers were started elsewhere
    np.testing.assert_array_equal(eval(line, names), digits)


def test_a_wrong_flag_in_a_command_would_be_seen() -> None:
    with pytest.raises(RequestError):
        cli.parse(["sample", "--num_sample", "5", "--nonsense"])
