"""The command line: `ray-sampler sample|status|verify|merge|preview|inspect|presets`."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import platform
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import ray_sampler
from ray_sampler import run_folder
from ray_sampler.errors import RequestError, RunError, printable
from ray_sampler.interrupts import end_now, interruptible
from ray_sampler.networks.adm_options import AdmOptions, TrainingOptions
from ray_sampler.options import Flag, flags_of, pick
from ray_sampler.presets import BUNDLED, PRESETS, ModelOptions, Preset
from ray_sampler.streams import OutputLost, sturdy_streams

if TYPE_CHECKING:
    from ray_sampler.config import RunConfig

DONE, FAILED, WRONG = 0, 1, 2

REFUSALS = ("start new thread", "failed to map segment", "annot allocate memory")
"""What the system says, through errors of many kinds, where a limit on memory or processes is reached."""

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
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        sentence = f"{'the disk is full' if full else 'the system refused'}: {error}"
    elif isinstance(error, MemoryError) or any(said in sentence for said in REFUSALS):
        sentence = f"the system refused what the program needs: {sentence or 'memory'}"
    elif not isinstance(error, RequestError | RunError):
        raise error
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
    if argv[0] == "--version":
        print(version())
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


def version() -> str:
    """This package's version, with those of what it computes and runs with; nothing is imported for it."""
    others = []
    for name in ("torch", "ray"):
        with suppress(metadata.PackageNotFoundError):
            others.append(f"{name} {metadata.version(name)}")
    return f"ray-sampler {ray_sampler.__version__} ({', '.join((*others, f'Python {platform.python_version()}'))})"


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
            "`ray-sampler COMMAND --help` lists its flags; `ray-sampler --version` prints the version.",
        )
    )


SYNONYMS = {
    **dict.fromkeys(("ckpt", "ckpt_path", "checkpoint", "network", "net", "network_pkl", "weights_path"), "--model"),
    **dict.fromkeys(("outdir", "out_dir", "output_dir", "out", "sample_dir", "save_dir", "logdir"), "--output"),
    **dict.fromkeys(("num_sampling_steps", "num_steps", "num_inference_steps", "sampling_steps", "nfe"), "--steps"),
    **dict.fromkeys(("cfg_scale", "cfg", "guidance_scale", "w"), "--guidance"),
    **dict.fromkeys(("class", "class_idx", "class_labels", "class_label", "classes"), "--labels"),
    **dict.fromkeys(("num", "n", "num_fid_samples", "n_samples", "number"), "--num_samples"),
    **dict.fromkeys(("batch", "per_proc_batch_size", "max_batch_size", "bs"), "--batch_size"),
    **dict.fromkeys(("global_seed", "random_seed"), "--seed"),
    **dict.fromkeys(("gnet", "guidance_network"), "--guide"),
    **dict.fromkeys(("solver", "sampler_type", "sampling_method", "scheduler", "mode"), "--sampler"),
    **dict.fromkeys(("S_churn", "S_min", "S_max", "S_noise"), "--s_churn, --s_tmin, --s_tmax or --s_noise"),
    **dict.fromkeys(("seeds", "seed_range"), "--generator edm --seed"),
    "vae": "--decoder",
}
"""What other samplers call our flags. `--seeds 0-49999` is `--generator edm --seed 0 --num_samples 50000` here."""


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
    from ray_sampler.config import FLAGS, GROUPS  # brings torch, which the other commands do without

    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for component in group.components:
            for name in flags_of(component):
                declare_flag(section, FLAGS[name].flag)


def declare_flag(section: argparse._ActionsContainer, flag: Flag) -> None:
    """Add a flag of `sample`."""
    shown = "" if flag.default is None else f" ({flag.default if flag.default != '' else 'empty'})"
    details: dict[str, Any] = {"default": None, "help": flag.help.rstrip(".").replace("%", "%%") + shown}
    if flag.kind is bool:
        details |= {"nargs": "?", "const": True, "metavar": "True|False"}
    elif flag.choices:
        details["metavar"] = "|".join(map(str, flag.choices))
    else:
        details["metavar"] = {int: "INT", float: "FLOAT"}.get(flag.kind, "TEXT")
    section.add_argument(f"--{flag.name}", type=str, **details)


def value_of(flag: Flag, text: Any) -> Any:
    """A flag's value from its text.

    Raises:
        RequestError: the text is no such value.
    """
    if flag.choices:
        if text not in flag.choices:
            raise RequestError(f"--{flag.name} is {text!r}; it must be one of {', '.join(flag.choices)}")
        return text
    if flag.kind is bool:
        if isinstance(text, str) and text.lower() not in BOOLEANS:
            raise RequestError(f"--{flag.name} is {text!r}; it must be True or False")
        return BOOLEANS[text.lower()] if isinstance(text, str) else text
    try:
        return flag.kind(text)
    except ValueError:
        form = "INT" if flag.kind is int else "FLOAT"
        raise RequestError(f"--{flag.name} is {text!r}; it must be of the form {form}") from None


def request_of(arguments: argparse.Namespace) -> RunConfig:
    """The request of `sample`'s arguments.

    Raises:
        RequestError: a value is none of its flag's kind.
    """
    from ray_sampler.config import FLAGS, RunConfig

    given = {name: text for name, text in vars(arguments).items() if text is not None}
    return RunConfig(**{name: value_of(FLAGS[name].flag, text) for name, text in given.items()})


def execute_sample(arguments: argparse.Namespace) -> int:
    config = request_of(arguments)
    if config.dry_run:
        from ray_sampler.resolved import dry_run

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
        declare_flag(parser, INSPECT_FLAGS[name])


INSPECT_FLAGS = {
    name: flag
    for component in (ModelOptions, TrainingOptions, AdmOptions)
    for name, flag in flags_of(component).items()
    if name not in ("model", "model_path", "use_checkpoint", "use_new_attention_order", "weight_schedule", "dropout")
}
"""Flags of `sample` that say what a model is."""


def execute_inspect(arguments: argparse.Namespace) -> int:
    from ray_sampler.inspection import print_inspection

    if arguments.model is None and arguments.preset is None:
        raise RequestError(
            "`ray-sampler inspect` needs a model: a bundled one, a checkpoint's path or URL, or --preset"
        )
    texts = {name: getattr(arguments, name) for name in INSPECT_FLAGS}
    given = {name: value_of(INSPECT_FLAGS[name], text) for name, text in texts.items() if text is not None}
    named = {name: given.pop(name) for name in tuple(given) if name in flags_of(ModelOptions)}
    return print_inspection(ModelOptions(model=arguments.model, **named), given, arguments.json)


COLUMNS = {
    "name": 0,
    "what it is": 120,
    "parameters": 95,
    "sampler": 0,
    "NFE": 0,
    "published": 0,
    "file": 170,
}
"""Of the table of presets, each with the width of a terminal that has room for it."""


def print_presets() -> int:
    room = Console().width if sys.stdout.isatty() else 200
    titles = [title for title, least in COLUMNS.items() if room >= least]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        right = title in ("parameters", "NFE")
        table.add_column(title, no_wrap=title != "what it is", justify="right" if right else "left")
    for name, model in (BUNDLED | PRESETS).items():
        cells = (
            name,
            model.description,
            f"{model.parameters / 1e6:,.1f} M",
            sampler_of(model.settings),
            str(evaluations_of(model.settings)),
            model.score if isinstance(model, Preset) else "",
            model.file if isinstance(model, Preset) else "in the package",
        )
        shown = dict(zip(COLUMNS, cells, strict=True))
        table.add_row(*(shown[title] for title in titles))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(
        "Use a preset as --preset NAME, which fetches its weights, or --preset NAME --model FILE where you have them, "
        "and a bundled model as --model NAME.",
        soft_wrap=True,
    )
    return DONE


def sampler_of(settings: Mapping[str, Any]) -> str:
    """A solver with its settings, in a few words."""
    ts = f" ts {settings['ts']}" if settings.get("ts") and settings["sampler"] == "multistep" else ""
    guidance = f", guidance {settings['guidance']:g}" if "guidance" in settings else ""
    churn = f", churn {settings['s_churn']:g}" if "s_churn" in settings else ""
    steps = "" if settings["sampler"] == "onestep" else f" {settings['steps']}"
    return f"{settings['sampler']}{steps}{ts}{churn}{guidance}"


def evaluations_of(settings: Mapping[str, Any]) -> int:
    """Network evaluations for one sample, those of a guide not counted."""
    from ray_sampler.sampling.solvers import SOLVERS

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
