"""The command line: `ray-sampler sample|status|verify|merge|preview|inspect|presets`."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table

from ray_sampler import run_folder
from ray_sampler.config import FLAGS, GROUPS, Composed, RunConfig, dry_run
from ray_sampler.errors import RequestError, RunError, printable
from ray_sampler.interrupts import interruptible
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.options import flags_of, pick
from ray_sampler.presets import BUNDLED, PRESETS, ModelOptions, Preset
from ray_sampler.sampling.solvers import SOLVERS
from ray_sampler.streams import OutputLost, sturdy_streams
from ray_sampler.synonyms import SYNONYMS

DONE, FAILED, WRONG = 0, 1, 2

BOOLEANS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}
"""What the original script accepts as a boolean."""


class Command(NamedTuple):
    """One command of `ray-sampler`."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
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
            return complain(error, code or FAILED) if error.wanted else code
    return code


def answer(argv: Sequence[str]) -> int:
    """Do what a command line asks for, and say in one sentence why where that cannot be done."""
    received: list[int] = []
    try:
        with interruptible(received, interrupted(argv)):
            command, arguments = parse(argv)
            return command.execute(arguments)
    except RequestError as error:
        return complain(error, WRONG)
    except RunError as error:
        return complain(error, FAILED)
    except OutputLost:
        raise
    except BaseException as error:
        if received:  # whatever a library made of the handler's KeyboardInterrupt
            return complain(interrupted(argv), 128 + received[0])
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return complain(f"{'the disk is full' if full else 'the system refused'}: {error}", FAILED)


def complain(error: Exception | str, code: int) -> int:
    print(f"ray-sampler: {printable(error, None)}", file=sys.stderr)
    return code


def interrupted(argv: Sequence[str]) -> str:
    again = "run the same command again to go on" if argv[:1] == ["sample"] else "run it again"
    return f"interrupted; what was finished is kept: {again}"


class Parser(argparse.ArgumentParser):
    """A parser that says in one sentence what is wrong."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(
            prog=f"ray-sampler {name}",
            usage=f"ray-sampler {name} {command.usage}".rstrip(),
            description=command.help,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
            allow_abbrev=False,
            exit_on_error=False,
        )

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


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
    name, *rest = argv
    if name not in COMMANDS:
        if name.startswith("-"):
            raise RequestError(f"{name} is no flag of ray-sampler; `ray-sampler --help` lists the commands")
        raise RequestError(f"{name!r} is no command; it must be one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    parser = Parser(name, command)
    command.declare(parser)
    try:
        arguments, unknown = parser.parse_known_args(spelled(rest, parser))
    except argparse.ArgumentError as error:
        raise RequestError(without_value(error, parser)) from None
    if unknown:
        raise RequestError(unknown_argument(name, parser, unknown[0]))
    return command, arguments


def spelled(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The arguments as argparse reads them.

    Flags get underscores in their names, where they may have hyphens, and values that begin with a minus, as lists of
    numbers may, are joined to their flags.
    """
    valued = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, separator, value = argument[2:].partition("=")
            argument = f"--{name.replace('-', '_')}{separator}{value}"
        elif result and result[-1] in valued and re.match(r"-(\d|\.|inf)", argument):
            argument = f"{result.pop()}={argument}"
        result.append(argument)
    return result


def without_value(error: argparse.ArgumentError, parser: argparse.ArgumentParser) -> str:
    """What is wrong with a flag that has no value and needs one, or has one and takes none."""
    action = next((a for a in parser._actions if error.argument_name in a.option_strings), None)
    if action is None:
        return str(error)
    if action.nargs == 0:
        return f"{error.argument_name} takes no value; give it alone or leave it out"
    return f"{error.argument_name} needs a value of the form {action.metavar}"


def overview() -> str:
    lines = [f"  {name:<9} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: ray-sampler COMMAND ...",
            "",
            "Draw large sample sets from diffusion and consistency models.",
            "",
            *lines,
            "",
            "`ray-sampler COMMAND --help` lists its flags.",
        )
    )


def unknown_argument(command: str, parser: argparse.ArgumentParser, token: str) -> str:
    """What is wrong with an argument that no flag takes."""
    if not token.startswith("-"):
        return f"{token!r} is one argument too many; `ray-sampler {command} --help` lists what there is"
    flag = token.partition("=")[0]
    synonym = SYNONYMS.get(flag.lstrip("-").replace("-", "_")) if command == "sample" else None
    if synonym:
        return f"{flag} is no flag of {command}; it is called {synonym} here"
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches("--" + flag.lstrip("-").replace("-", "_"), known, 1)
    hint = f"did you mean {close[0]}?" if close else f"`ray-sampler {command} --help` lists the flags"
    return f"{flag} is no flag of {command}; {hint}"


def declare_sample(parser: argparse.ArgumentParser) -> None:
    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for component in group.components:
            for name in flags_of(component):
                declare_flag(section, FLAGS[name])


def declare_flag(section: argparse._ActionsContainer, composed: Composed) -> None:
    """Add a flag of `sample`."""
    flag = composed.flag
    shown = "" if flag.default is None else f" ({flag.default if flag.default != '' else 'empty'})"
    details: dict[str, Any] = {"default": None, "help": flag.help.rstrip(".").replace("%", "%%") + shown}
    if flag.kind is bool:
        details |= {"nargs": "?", "const": True, "metavar": "True|False"}
    elif flag.choices:
        details["metavar"] = "|".join(map(str, flag.choices))
    else:
        details["metavar"] = {int: "INT", float: "FLOAT"}.get(flag.kind, "TEXT")
    section.add_argument(f"--{flag.name}", type=str, **details)


def value_of(name: str, text: Any) -> Any:
    """A flag's value from its text.

    Raises:
        RequestError: the text is no such value.
    """
    flag = FLAGS[name].flag
    if flag.choices:
        if text not in flag.choices:
            raise RequestError(f"--{name} is {text!r}; it must be one of {', '.join(flag.choices)}")
        return text
    if flag.kind is bool:
        if isinstance(text, str) and text.lower() not in BOOLEANS:
            raise RequestError(f"--{name} is {text!r}; it must be True or False")
        return BOOLEANS[text.lower()] if isinstance(text, str) else text
    try:
        return flag.kind(text)
    except ValueError:
        raise RequestError(
            f"--{name} is {text!r}; it must be of the form {'INT' if flag.kind is int else 'FLOAT'}"
        ) from None


def request_of(arguments: argparse.Namespace) -> RunConfig:
    """The request of `sample`'s arguments.

    Raises:
        RequestError: a value is none of its flag's kind.
    """
    return RunConfig(**{name: value_of(name, text) for name, text in vars(arguments).items() if text is not None})


def execute_sample(arguments: argparse.Namespace) -> int:
    config = request_of(arguments)
    if config.dry_run:
        print(json.dumps(dry_run(config), indent=2))
        return DONE
    from ray_sampler.cluster.driver import run

    result = run(config)
    with suppress(OutputLost):  # the archive stands all the same
        print(result.archive, flush=True)
    return DONE


def declare_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help="the run directory: a local path or any fsspec URL")


def declare_status(parser: argparse.ArgumentParser) -> None:
    declare_folder(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", action="store_true", help="print again every 10 seconds, until the run is complete")


def folder_of(command: str, arguments: argparse.Namespace) -> str:
    """Raises RequestError: the run directory is missing."""
    if arguments.url is None:
        raise RequestError(f"`ray-sampler {command}` needs the path or URL of a run directory")
    url: str = arguments.url
    return url


def declare_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a bundled model, a checkpoint or python:module:function"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    for name in INSPECT_FLAGS:
        declare_flag(parser, FLAGS[name])


INSPECT_FLAGS = ("preset", "weights_key", "weights", "tag", "training_mode", *flags_of(AdmOptions))
"""Flags of `sample` that say what a model is."""


def execute_inspect(arguments: argparse.Namespace) -> int:
    from ray_sampler.inspection import print_inspection

    if arguments.model is None and arguments.preset is None:
        raise RequestError(
            "`ray-sampler inspect` needs a model: a bundled one, a checkpoint's path or URL, or --preset"
        )
    texts = {name: getattr(arguments, name) for name in INSPECT_FLAGS}
    given = {name: value_of(name, text) for name, text in texts.items() if text is not None}
    named = {name: given.pop(name) for name in tuple(given) if name in flags_of(ModelOptions)}
    return print_inspection(ModelOptions(model=arguments.model, **named), given, arguments.json)


def print_presets() -> int:
    table = Table("name", "what it is", "parameters", "sampler", "NFE", "published", "file")
    for name, model in (BUNDLED | PRESETS).items():
        published = isinstance(model, Preset)
        table.add_row(
            name,
            model.description,
            f"{model.parameters:,}" if model.parameters else "",
            sampler_of(model.settings),
            str(evaluations_of(model.settings)),
            model.score if isinstance(model, Preset) else "",
            model.file if published else "in the package",
        )
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(
        "A preset is used as --preset NAME, which fetches its weights, or --preset NAME --model FILE where you have them; "
        "a bundled model as --model NAME.",
        soft_wrap=True,
    )
    return DONE


def sampler_of(settings: Mapping[str, Any]) -> str:
    """A solver with its settings, in a few words."""
    ts = f" ts {settings['ts']}" if settings.get("ts") and settings["sampler"] == "multistep" else ""
    guidance = f", guidance {settings['guidance']:g}" if "guidance" in settings else ""
    churn = f", churn {settings['s_churn']:g}" if "s_churn" in settings else ""
    return f"{settings['sampler']}, {settings['steps']} steps{ts}{churn}{guidance}"


def evaluations_of(settings: Mapping[str, Any]) -> int:
    """Network evaluations for one sample, those of a guide not counted."""
    solver = SOLVERS[settings["sampler"]]
    return solver.evaluations(settings["steps"], pick(solver.options, settings))


COMMANDS: dict[str, Command] = {
    "sample": Command(
        "Fill an archive with samples of a model; run again after any stop, it goes on.",
        declare_sample,
        execute_sample,
        "[--FLAG VALUE] ...",
    ),
    "status": Command(
        "How far a run is, from its directory alone: no Ray, no GPU, from any machine.",
        declare_status,
        lambda a: run_folder.print_status(folder_of("status", a), a.json, a.watch),
        "[--json] [--watch] URL",
    ),
    "verify": Command(
        "Read and check every fragment; set aside what is damaged or foreign, so that the next run samples it again.",
        declare_folder,
        lambda a: run_folder.verify_run(folder_of("verify", a)),
        "URL",
    ),
    "merge": Command(
        "Write the archive of a complete set of fragments, without Ray.",
        declare_folder,
        lambda a: run_folder.merge_run(folder_of("merge", a)),
        "URL",
    ),
    "preview": Command(
        "Draw preview.png from the fragments that are there.",
        declare_folder,
        lambda a: run_folder.preview_run(folder_of("preview", a)),
        "URL",
    ),
    "inspect": Command(
        "What a checkpoint is, and the command line that samples it.",
        declare_inspect,
        execute_inspect,
        "[--json] [--FLAG VALUE] ... MODEL",
    ),
    "presets": Command(
        "List the models that are known by name, and what they need.", lambda parser: None, lambda a: print_presets()
    ),
}
