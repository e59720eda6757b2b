"""The command line: `ray-sampler sample|status|verify|merge|preview|presets`."""

from __future__ import annotations

import difflib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from types import FrameType
from typing import Annotated, Any, Literal, get_args, get_origin

import psutil
import tyro
from rich.console import Console
from rich.table import Table
from tyro import _errors as parse_errors
from tyro.conf import FlagConversionOff, OmitArgPrefixes, Positional, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ray_sampler import inspect_run
from ray_sampler.config import RequestError, RunConfig, RunError
from ray_sampler.flags import (
    ArchitectureFlags,
    FleetFlags,
    ModelFlags,
    OutputFlags,
    ReportingFlags,
    SampleSetFlags,
    SamplingFlags,
    TrainingFlags,
)
from ray_sampler.models.presets import BUNDLED, PRESETS, Bundled, Preset

DONE, FAILED, WRONG = 0, 1, 2

WIND_UP_S = 10.0
"""What an interrupted run may take to end its actors and its Ray."""


@dataclass(frozen=True)
class Sample:
    """Fill an archive with samples of a model; run again after any stop, it goes on."""

    model: ModelFlags
    samples: SampleSetFlags
    sampling: SamplingFlags
    architecture: ArchitectureFlags
    output: OutputFlags
    fleet: FleetFlags
    reporting: ReportingFlags
    training: TrainingFlags

    def config(self) -> RunConfig:
        groups = [getattr(self, f.name) for f in fields(self)]
        return RunConfig(**{name: value for group in groups for name, value in vars(group).items()})


@dataclass(frozen=True)
class Status:
    """How far a run is, from its directory alone: no Ray, no GPU, from any machine."""

    url: Positional[str]
    """The run directory: a local path or any fsspec URL."""
    json: bool = False
    """Print JSON."""
    watch: bool = False
    """Print again every 10 seconds, until the run is complete."""


@dataclass(frozen=True)
class Verify:
    """Read and check every fragment; set aside what is damaged or foreign, so that the next run samples it again."""

    url: Positional[str]
    """The run directory: a local path or any fsspec URL."""


@dataclass(frozen=True)
class Merge:
    """Write the archive of a complete set of fragments, without Ray."""

    url: Positional[str]
    """The run directory: a local path or any fsspec URL."""


@dataclass(frozen=True)
class Preview:
    """Draw preview.png from the fragments that are there."""

    url: Positional[str]
    """The run directory: a local path or any fsspec URL."""


@dataclass(frozen=True)
class Presets:
    """List the models that are known by name, and what they need."""


Command = (
    Annotated[FlagConversionOff[Sample], subcommand("sample")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[Preview, subcommand("preview")]
    | Annotated[Presets, subcommand("presets")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 failed or incomplete, 2 a wrong request, 130 and 143 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    received: list[int] = []
    try:
        with interruptible(received, interrupted(argv)):
            return execute(parse(argv))
    except RequestError as error:
        return complain(error, WRONG)
    except RunError as error:
        return complain(error, FAILED)
    except BaseException as error:
        if received:  # whatever a library made of the handler's KeyboardInterrupt
            return complain(interrupted(argv), 128 + received[0])
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return complain(f"{'the disk is full' if full else 'the system refused'}: {error}", FAILED)


def complain(error: Exception | str, code: int) -> int:
    print(f"ray-sampler: {error}", file=sys.stderr)
    return code


@contextmanager
def interruptible(received: list[int], sentence: str) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and note in `received` which came.

    Winding up may take WIND_UP_S; when they are over, or at a second signal, the process says `sentence` and ends at
    once. That is safe, as a run may be killed anywhere. Only a main thread hears signals.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if received:
            end_now()
        received.append(number)
        patience.start()
        raise KeyboardInterrupt

    def end_now() -> None:
        cursor = "\033[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
        os.write(2, f"{cursor}ray-sampler: {sentence}\n".encode())
        for process in psutil.Process().children(recursive=True):  # a local Ray's
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(128 + received[0])

    patience = threading.Timer(WIND_UP_S, end_now)
    patience.daemon = True
    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    earlier = [signal.signal(each, interrupt) for each in handled]
    try:
        yield
    finally:
        patience.cancel()
        for each, handler in zip(handled, earlier, strict=True):
            signal.signal(each, handler)


def interrupted(argv: Sequence[str]) -> str:
    again = "run the same command again to go on" if argv[:1] == ["sample"] else "run it again"
    return f"interrupted; what was finished is kept: {again}"


def parse(argv: Sequence[str]) -> Any:
    """The command that `argv` means.

    Raises:
        RequestError: no such command, flag or value.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise RequestError(f"{argv[0]!r} is no command; it must be one of {', '.join(COMMANDS)}")
    registry = ConstructorRegistry()
    registry.primitive_rule(unset_is_none)
    with parse_errors.on_parse_error(partial(one_sentence, argv[0] if argv else "")):
        return tyro.cli(
            Command,
            prog="ray-sampler",
            description="Draw large sample sets from diffusion and consistency models.",
            args=spell_out(argv),
            use_underscores=True,
            config=(OmitArgPrefixes,),
            registry=registry,
        )


def unset_is_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read a flag of type X | None as an X: None is how the absence of the flag looks from inside."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if len(kinds) != 1 or type(None) not in get_args(info.type):
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["unset"] if value is None else spec.str_from_instance(value),
        choices=kinds[0].__args__ if get_origin(kinds[0]) is Literal else spec.choices,
    )


BOOLEANS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), "True"),
    **dict.fromkeys(("false", "no", "f", "n", "0"), "False"),
}
"""What the original script accepts as a boolean."""


def spell_out(argv: Sequence[str]) -> list[str]:
    """Write the boolean flags of `sample` as tyro reads them: a bare --flag means True; yes, 1, f are spelled out."""
    result = [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]
    if result[:1] != ["sample"]:
        return result
    booleans = {f.name for f in fields(RunConfig) if "bool" in str(f.type)}
    at = 0
    while at < len(result):
        token, at = result[at], at + 1
        if not token.startswith("--") or token[2:].replace("-", "_") not in booleans:
            continue
        if at < len(result) and not result[at].startswith("--"):
            result[at] = BOOLEANS.get(result[at].lower(), result[at])
        else:
            result.insert(at, "True")
        at += 1
    return result


def one_sentence(command: str, event: parse_errors.ParseErrorEvent) -> None:
    """Say in one sentence what tyro cannot parse.

    Raises:
        RequestError: always, for the events that are known.
    """
    match event:
        case parse_errors.UnrecognizedArgs(tokens=tokens):
            raise RequestError(unknown_argument(command, tokens[0]))
        case parse_errors.MissingArgs(unrecognized_tokens=[token, *_]):
            raise RequestError(unknown_argument(command, token))
        case parse_errors.MissingArgs():
            raise RequestError(f"`ray-sampler {command}` needs the path or URL of a run directory")
        case parse_errors.MissingSubcommand():
            raise RequestError(f"a command is missing; it must be one of {', '.join(COMMANDS)}")
        case parse_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            raise RequestError(f"{flag_of(argument)} is {value!r}; it must be one of {', '.join(choices)}")
        case parse_errors.BadValue(argument=argument):
            raise RequestError(f"{flag_of(argument)} needs a value of the form {argument.lowered.metavar}")
        case parse_errors.InstantiationFailure(argument=argument, message=message) if argument is not None:
            given = message.rpartition(":")[2].strip() if "literal" in message or "convert" in message else message
            raise RequestError(f"{flag_of(argument)} is {given}; it must be of the form {argument.lowered.metavar}")


COMMANDS = {
    "sample": RunConfig,
    "status": Status,
    "verify": Verify,
    "merge": Merge,
    "preview": Preview,
    "presets": Presets,
}
"""Whose fields are the flags of each command."""


def flag_of(argument: Any) -> str:
    return str(argument.lowered.name_or_flags[0]).replace("-", "_").replace("__", "--", 1)


def unknown_argument(command: str, token: str) -> str:
    usage = f"ray-sampler {command}" if command in COMMANDS else "ray-sampler"
    if not token.startswith("-"):
        return f"{token!r} is one argument too many; `{usage} --help` lists what there is"
    known = ["--" + f.name for f in fields(COMMANDS[command])] if command in COMMANDS else []
    close = difflib.get_close_matches("--" + token.lstrip("-").replace("-", "_"), known, 1)
    hint = f"did you mean {close[0]}?" if close else f"`{usage} --help` lists the flags"
    return f"{token} is no flag of {command if command in COMMANDS else 'ray-sampler'}; {hint}"


def execute(command: Any) -> int:
    """Carry out a parsed command; returns the exit code."""
    match command:
        case Sample():
            return sample(command.config())
        case Presets():
            print_presets()
            return DONE
        case Status(url, as_json, watch):
            return inspect_run.print_status(url, as_json, watch)
        case Verify(url):
            return inspect_run.verify_run(url)
        case Merge(url):
            return inspect_run.merge_run(url)
        case Preview(url):
            return inspect_run.preview_run(url)
    raise AssertionError(command)


def sample(config: RunConfig) -> int:
    if config.dry_run:
        from ray_sampler.cluster.prepare import resolve

        print(json.dumps(resolve(config).as_json(), indent=2))
        return DONE
    from ray_sampler.cluster.driver import run

    print(run(config).archive)
    return DONE


def print_presets() -> None:
    table = Table("name", "what it is", "what it needs", "parameters", "sampler")
    known: list[tuple[str, Bundled | Preset, str]]
    known = [(name, model, f"nothing: --model {name}") for name, model in BUNDLED.items()]
    known += [(name, preset, f"--preset {name} --model_path {preset.file}") for name, preset in PRESETS.items()]
    for name, model, needs in known:
        table.add_row(name, model.description, needs, f"{model.parameters:,}", sampler_of(model.settings))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def sampler_of(settings: Mapping[str, Any]) -> str:
    ts = f" ts {settings['ts']}" if settings.get("ts") and settings["sampler"] == "multistep" else ""
    return f"{settings['sampler']}, {settings['steps']} steps{ts}"
