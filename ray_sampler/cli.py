"""The command line: `ray-sampler COMMAND ...`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import ray_sampler
from ray_sampler.commands import (
    declare_export,
    declare_folder,
    declare_inspect,
    declare_reference,
    declare_resume,
    declare_score,
    declare_spot,
    declare_status,
    execute_export,
    execute_inspect,
    execute_merge,
    execute_presets,
    execute_preview,
    execute_reference,
    execute_score,
    execute_spot,
    execute_status,
    execute_verify,
    folder_of,
    request_of,
)
from ray_sampler.errors import RequestError, RunError, debugging, printable, show_traceback
from ray_sampler.flags import Parser, flags_among, given_values, spelled, unknown_argument, without_value
from ray_sampler.process import OutputLost, end_now, interruptible, sturdy_streams

if TYPE_CHECKING:
    from ray_sampler.config import RunConfig

DONE, FAILED, WRONG = 0, 1, 2

REFUSALS = ("start new thread", "failed to map segment", "annot allocate memory")
"""What the system says, through errors of many kinds, where a limit on memory or processes is reached."""


EXAMPLES = """\
Defaults are those of the bundled digits model; other models and presets bring
their own. Flags may have underscores in place of hyphens.

examples:
  # 1,000 digits on this machine
  ray-sampler sample --num-samples 1000

  # a published checkpoint with its published settings, into a bucket
  ray-sampler sample --preset edm-imagenet64 --num-samples 50000 \\
      --output s3://bucket/edm

  # your own network (a function that returns a ray_sampler.Model), guided
  ray-sampler sample --model python:nets:build --weights ema.pt \\
      --guidance 1.5 --labels balanced --output runs/mine

  # on a Ray cluster, with an FID at the end
  ray-sampler sample --model ema.pt --address auto --score reference.npz \\
      --output s3://bucket/run"""
"""The text below the flags in `sample --help`."""


class Command(NamedTuple):
    """One command of `ray-sampler`."""

    help: str
    declare: Callable[[Parser], None]
    """Adds its arguments."""
    execute: Callable[[argparse.Namespace], int]
    """Returns the exit code."""
    usage: str = ""
    """Its arguments, in short."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 failed or incomplete, 2 a wrong request, 130 and 143 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    code = DONE
    with sturdy_streams():
        try:
            try:
                code = answer(argv)
            finally:  # of --help too, which exits
                sys.stdout.flush()
        except OutputLost as error:
            if error.wanted:
                say(str(error))
                return code or FAILED
    return code


def answer(argv: Sequence[str]) -> int:
    """Do what a command line asks for, and say in one sentence why where that cannot be done."""
    received: list[int] = []
    code = DONE
    try:
        with interruptible(received, interrupted(argv)):
            command, arguments = parse(argv)
            code = command.execute(arguments)
    except OutputLost:
        raise
    except BaseException as error:
        if not received:
            return complain(error)
    if received:  # whatever a library made of the handler's KeyboardInterrupt
        say(interrupted(argv))
        return leave(128 + received[0])
    return code


def entry(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line as this process's only task, and end it.

    Whoever interrupts it may kill it soon, and Ray and torch take seconds to tidy what the system takes back anyway.
    """
    code = main(argv)
    if code > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        end_now(code)
    sys.exit(code)


def complain(error: BaseException) -> int:
    """Say in one sentence what went wrong; returns the exit code. Raises what is a fault of this program."""
    sentence = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        sentence = f"the disk is full: {error}"
    elif isinstance(error, OSError):  # of the system, or of a fault of ours
        hint = "" if debugging() else " (RAY_SAMPLER_DEBUG=1 shows where)"
        sentence = f"the system refused: {error}{hint}"
    elif isinstance(error, MemoryError) or any(said in sentence for said in REFUSALS):
        sentence = f"the system refused what the program needs: {sentence or 'memory'}"
    elif not isinstance(error, RequestError | RunError):
        raise error
    show_traceback(error)
    say(sentence)
    return leave(WRONG if isinstance(error, RequestError) else FAILED)


def say(sentence: str) -> None:
    """One sentence on standard error."""
    print(f"ray-sampler: {printable(sentence, None)}", file=sys.stderr)


def leave(code: int) -> int:
    """The exit code; where a Ray that did not come up is still being started, the process ends here."""
    if any(thread.name == "ray" for thread in threading.enumerate()):
        sys.stderr.flush()
        end_now(code)
    return code


def interrupted(argv: Sequence[str]) -> str:
    again = "run the same command again to resume" if argv[:1] in (["sample"], ["resume"]) else "run it again"
    return f"interrupted; finished samples are kept: {again}"


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that `argv` means, and its arguments.

    Raises:
        RequestError: no such command, flag or value.
    """
    if not argv or argv[0] in ("-h", "--help"):
        if not argv:
            raise RequestError(f"a command is missing; it must be one of {', '.join(COMMANDS)}")
        print(overview())
        sys.exit(DONE)
    if argv[0] == "--version":
        print(version())
        sys.exit(DONE)
    name, *rest = argv
    if name not in COMMANDS:
        if name.startswith("-"):
            raise RequestError(f"{name} is not a flag of ray-sampler; `ray-sampler --help` lists the commands")
        raise RequestError(f"{name!r} is not a command; it must be one of {', '.join(COMMANDS)}")
    check_place()
    command = COMMANDS[name]
    parser = Parser(name, command.usage, command.help)
    command.declare(parser)
    parser.declare_help()
    try:
        arguments, unknown = parser.parse_known_args(spelled(rest, parser))
    except argparse.ArgumentError as error:
        raise RequestError(without_value(error, parser)) from None
    if unknown:
        raise RequestError(unknown_argument(name, parser, unknown[0]))
    return command, arguments


def check_place() -> None:
    """Raises RequestError: the working directory is gone, without which torch ends the process at its import."""
    try:
        os.getcwd()
    except OSError as error:
        raise RequestError(
            f"the working directory cannot be found ({error.strerror}); change to a folder that exists"
        ) from error


def version() -> str:
    """This package's version, with those of what it computes and runs with; nothing is imported for it."""
    others = []
    for name in ("torch", "ray"):
        with suppress(metadata.PackageNotFoundError):
            others.append(f"{name} {metadata.version(name)}")
    return f"ray-sampler {ray_sampler.__version__} ({', '.join((*others, f'Python {platform.python_version()}'))})"


def overview() -> str:
    width = max(shutil.get_terminal_size().columns - 2, 40)
    lines = [
        textwrap.fill(command.help, width, initial_indent=f"  {name:<9} ", subsequent_indent=12 * " ")
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        (
            "usage: ray-sampler COMMAND ...",
            "",
            "Draw large sample sets from diffusion and consistency models.",
            "",
            *lines,
            "",
            "`ray-sampler COMMAND --help` lists its flags.",
            "`ray-sampler --version` prints the version.",
        )
    )


def declare_sample(parser: Parser) -> None:
    from ray_sampler.config import HEADINGS, RunConfig
    from ray_sampler.networks.families import ARCHITECTURE
    from ray_sampler.presets import model_of

    _, brought = model_of(RunConfig())
    defaults = {name: value for name, value in brought.items() if name not in ARCHITECTURE}
    inert = []
    for title, components in HEADINGS.items():
        flags = flags_among(components)
        parser.declare(title, [flag for flag in flags if not flag.inert], brief=True, defaults=defaults)
        inert += [flag for flag in flags if flag.inert]
    parser.declare("accepted, without effect", inert, brief=True)
    parser.epilog = EXAMPLES


def execute_sample(arguments: argparse.Namespace) -> int:
    return carry_out(request_of(arguments))


def execute_resume(arguments: argparse.Namespace) -> int:
    from ray_sampler.config import RunConfig
    from ray_sampler.run_folder import resumed

    return carry_out(resumed(folder_of("resume", arguments), given_values(arguments, RunConfig)))


def carry_out(config: RunConfig) -> int:
    """Run a request, or say what it would be; returns the exit code."""
    from ray_sampler.resolve import check, dry_run, missing_files, without_file

    check(config)  # what is wrong is said before torch and Ray are imported
    for sentence in missing_files(config):
        if not config.dry_run:
            raise RequestError(sentence)
        say(sentence)
    if config.dry_run:
        print(json.dumps(dry_run(config), indent=2))
        return DONE
    without_file(config)
    from ray_sampler.cluster.driver import run

    result = run(config)
    with suppress(OutputLost):  # the archive is complete all the same
        print(result.archive, flush=True)
    return DONE


COMMANDS: dict[str, Command] = {
    "sample": Command(
        "Sample a model into an archive; rerun the same command to resume.",
        declare_sample,
        execute_sample,
        "[--FLAG VALUE] ...",
    ),
    "resume": Command(
        "Resume the run in a directory: run the command that began it again.",
        declare_resume,
        execute_resume,
        "[--FLAG VALUE] ... URL",
    ),
    "status": Command(
        "Show the progress of a run, from its directory alone: no Ray, no GPU, from any machine.",
        declare_status,
        execute_status,
        "[--json] [--watch] URL",
    ),
    "verify": Command(
        "Check every fragment and the archive; move corrupt or foreign fragments to rejected/.",
        declare_folder,
        execute_verify,
        "URL",
    ),
    "merge": Command(
        "Write the archive from a complete set of fragments, without Ray.",
        declare_folder,
        execute_merge,
        "URL",
    ),
    "preview": Command(
        "Draw preview.png from the existing fragments.",
        declare_folder,
        execute_preview,
        "URL",
    ),
    "export": Command(
        "Write every picture of a run or archive as a PNG, and the labels as labels.csv.",
        declare_export,
        execute_export,
        "RUN|ARCHIVE --output DIR [--subdirs]",
    ),
    "score": Command(
        "Score pictures against a reference: FID, Inception Score, KID, precision and recall.",
        declare_score,
        execute_score,
        "[--FLAG VALUE] ... --reference REFERENCE SOURCE",
    ),
    "reference": Command(
        "Make a reference npz from your own pictures: mu, sigma and the first 10,000 pictures.",
        declare_reference,
        execute_reference,
        "IMAGES --output FILE.npz [--features EXTRACTOR]",
    ),
    "inspect": Command(
        "Describe a checkpoint and print a command that samples it.",
        declare_inspect,
        execute_inspect,
        "[--json] [--FLAG VALUE] ... MODEL",
    ),
    "spot": Command(
        "Wait for the cloud's notice that this spot node will be reclaimed, then drain it from Ray.",
        declare_spot,
        execute_spot,
        "aws|gcp|now [--seconds N] [--node-id ID]",
    ),
    "presets": Command("List the models that are known by name.", lambda parser: None, execute_presets),
}
