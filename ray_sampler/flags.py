"""Flags and their values in a command line, and what is wrong with one that we do not know."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from ray_sampler.errors import RequestError
from ray_sampler.options import KINDS, Flag, flags_of

BOOLEANS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}
"""What the original script accepts as a boolean."""


DASHES = tuple("\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}")
"""What text processors and web pages make of hyphens."""

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
"""The placeholder for a flag's value in `--help`."""

SIMILAR = 0.7
"""How similar a flag must be, from 0 to 1, to one that we do not know for it to be suggested: a typo, not a guess."""


class Parser(argparse.ArgumentParser):
    """A parser that says in one sentence what is wrong.

    Attributes:
        declared: its flags.
        rare: those that `--help` leaves to `--help-all`.
    """

    def __init__(self, command: str, usage: str, description: str) -> None:
        self.declared: list[argparse.Action] = []
        self.rare: list[argparse.Action] = []
        super().__init__(
            prog=f"ray-sampler {command}",
            usage=f"ray-sampler {command} {usage}".rstrip(),
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
            allow_abbrev=False,
            exit_on_error=False,
            add_help=False,
        )

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.declared.append(action)
        return action

    def declare(
        self,
        title: str,
        flags: Iterable[Flag],
        brief: bool = False,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Add flags of options under a title, common ones first.

        Args:
            brief: whether `--help` leaves out those that are not common.
            defaults: that are not those of the options, by flag name.
        """
        section = self.add_argument_group(title)
        for flag in sorted(flags, key=lambda flag: not flag.common):
            details = details_of(flag, defaults.get(flag.name, flag.default))
            action = section.add_argument(f"--{flag.name.replace('_', '-')}", type=str, **details)
            self.declared.append(action)
            self.rare += [action] if brief and not flag.common else []

    def declare_help(self) -> None:
        """Add `--help`, and `--help-all` where that says more."""
        section = self.add_argument_group("help")
        section.add_argument("-h", "--help", action=ShowHelp, nargs=0, help="show this help and exit")
        if self.rare:
            section.add_argument("--help-all", action=ShowHelp, nargs=0, help="show every flag and exit")

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


class ShowHelp(argparse.Action):
    """Prints the flags, by `--help` only those that most runs use, and ends the command."""

    def __call__(self, parser: Any, namespace: object, values: object, option_string: str | None = None) -> None:
        for action in () if option_string == "--help-all" else parser.rare:
            action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def flags_among(components: Iterable[type], leave_out: Sequence[str] = ()) -> list[Flag]:
    """The flags of options classes."""
    flags = {name: flag for component in components for name, flag in flags_of(component).items()}
    return [flag for name, flag in flags.items() if name not in leave_out]


def spelled(arguments: Sequence[str], parser: Parser) -> list[str]:
    """The arguments as argparse reads them.

    Flags get hyphens in their names, where they may have underscores, and values that begin with a minus, as lists of
    numbers may, are joined to their flags.

    Raises:
        RequestError: a flag begins with a dash that is not a hyphen.
    """
    known = {name for action in parser.declared for name in action.option_strings}
    valued = {name for action in parser.declared if action.nargs is None for name in action.option_strings}
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, separator, value = argument.partition("=")
            if name.replace("_", "-") in known:
                argument = f"{name.replace('_', '-')}{separator}{value}"
        elif result and result[-1] in valued and re.match(r"-(\d|\.|inf)", argument):
            argument = f"{result.pop()}={argument}"
        elif argument.startswith(DASHES):
            flag = "--" + argument.partition("=")[0].lstrip("-" + "".join(DASHES)).replace("_", "-")
            if flag in known:
                raise RequestError(
                    f"{argument} begins with a dash that is not a hyphen; write --{flag[2:].replace('-', '_')}"
                )
        result.append(argument)
    return result


def without_value(error: argparse.ArgumentError, parser: Parser) -> str:
    """What is wrong with a flag that has no value and needs one, or has one and takes none."""
    action = next((a for a in parser.declared if error.argument_name in a.option_strings), None)
    if action is None:
        return str(error)
    if action.nargs == 0:
        return f"--{action.dest} takes no value; give it alone or leave it out"
    wanted = {METAVARS[kind]: KINDS[kind] for kind in METAVARS}
    choices = f"one of {str(action.metavar).replace('|', ', ')}"
    return f"--{action.dest} needs a value: {wanted.get(str(action.metavar), choices)}"


def details_of(flag: Flag, default: Any) -> dict[str, Any]:
    """What argparse needs to know of a flag."""
    shown = "" if default in (None, "", False) else f" (default: {default})"
    details: dict[str, Any] = {"default": None, "help": flag.help.rstrip(".").replace("%", "%%") + shown}
    if flag.kind is bool:
        details |= {"nargs": "?", "const": True, "metavar": "True|False"}
    elif flag.choices:
        details["metavar"] = "|".join(map(str, flag.choices))
    else:
        details["metavar"] = METAVARS[flag.kind]
    return details


def value_of(flag: Flag, text: Any) -> Any:
    """A flag's value from its text; True for a boolean flag without one.

    Raises:
        RequestError: the text is not such a value.
    """
    try:
        return BOOLEANS[str(text).lower()] if flag.kind is bool else flag.kind(text)
    except (KeyError, ValueError):
        raise RequestError(f"--{flag.name} is {text!r}; it must be {KINDS[flag.kind]}") from None


def given_values(arguments: argparse.Namespace, request: type) -> dict[str, Any]:
    """The options of a request that are among the arguments, by name.

    Raises:
        RequestError: a value is not of its flag's kind.
    """
    flags = flags_of(request)
    given = {name: text for name, text in vars(arguments).items() if name in flags and text is not None}
    return {name: value_of(flags[name], text) for name, text in given.items()}


SYNONYMS = {
    **dict.fromkeys(("ckpt", "ckpt_path", "checkpoint", "checkpoint_path", "weights_path"), "use --model"),
    **dict.fromkeys(("network", "net", "network_pkl", "pretrained_model_name_or_path", "model_id"), "use --model"),
    **dict.fromkeys(("outdir", "out_dir", "output_dir", "out", "sample_dir", "save_dir", "logdir"), "use --output"),
    **dict.fromkeys(("num_sampling_steps", "num_steps", "num_inference_steps", "sampling_steps"), "use --steps"),
    "timestep_respacing": "use --steps",
    "use_ddim": "use --sampler euler, which is DDIM without noise",
    **dict.fromkeys(("cfg_scale", "cfg", "guidance_scale", "w"), "use --guidance"),
    **dict.fromkeys(("class", "class_idx", "class_labels", "class_label", "classes"), "use --labels"),
    **dict.fromkeys(("num", "n", "num_fid_samples", "n_samples", "number", "samples"), "use --num_samples"),
    "num_images_per_prompt": "use --num_samples",
    **dict.fromkeys(("batch", "per_proc_batch_size", "max_batch_size", "bs"), "use --batch_size"),
    **dict.fromkeys(("global_seed", "random_seed"), "use --seed"),
    **dict.fromkeys(("gnet", "guidance_network"), "use --guide"),
    **dict.fromkeys(("solver", "sampler_type", "sampling_method", "mode"), "use --sampler"),
    "scheduler": "use --sampler for the solver, and --schedule for the spacing of the noise levels",
    **dict.fromkeys(("disc", "discretization"), "use --schedule"),
    "S_churn": "use --s_churn",
    "S_min": "use --s_tmin",
    "S_max": "use --s_tmax",
    "S_noise": "use --s_noise",
    **dict.fromkeys(("seeds", "seed_range"), "use --generator edm --seed FIRST --num_samples COUNT"),
    **dict.fromkeys(("fp16", "half", "amp"), "use --precision fp16"),
    **dict.fromkeys(("bf16", "use_bf16"), "use --precision bf16"),
    **dict.fromkeys(("fp32", "tf32", "no_half"), "use --precision fp32"),
    **dict.fromkeys(("dtype", "torch_dtype", "mixed_precision"), "use --precision"),
    **dict.fromkeys(("device", "cuda", "cpu"), "GPUs are used where there are any; --gpus_per_actor 0 takes CPUs"),
    **dict.fromkeys(
        ("gpus", "num_gpus", "n_gpus", "ngpu", "devices", "num_workers", "workers", "nproc_per_node", "world_size"),
        "use --max_actors, of which each takes one GPU; without it all are used",
    ),
    **dict.fromkeys(
        ("resume", "resume_from", "resume_from_checkpoint", "continue"),
        "running the same command again resumes, and so does `ray-sampler resume DIR`",
    ),
    **dict.fromkeys(("force", "replace"), "use --overwrite, which deletes the earlier run in --output"),
    **dict.fromkeys(("quiet", "silent", "q", "no_progress"), "use --progress none"),
    **dict.fromkeys(("verbose", "v", "debug"), "set RAY_SAMPLER_DEBUG=1 in the environment to see tracebacks"),
    **dict.fromkeys(("ema", "use_ema"), "averaged (EMA) weights are used where a file has them; --weights_key chooses"),
    **dict.fromkeys(("config", "cfg_file", "config_file", "yaml"), "there are no configuration files: give flags"),
    **dict.fromkeys(("prompt", "prompts", "negative_prompt"), "there are no text prompts: models take class --labels"),
    **dict.fromkeys(("height", "width", "resolution", "size"), "the model decides the size of its pictures"),
    **dict.fromkeys(("compile_mode", "torch_compile"), "use --compile"),
    **dict.fromkeys(("fid", "eval", "ref", "ref_batch", "reference"), "use --score"),
    **dict.fromkeys(("name", "run_name", "exp_name"), "use --output"),
    "subdirs": "the pictures become files by `ray-sampler export RUN --output DIR --subdirs`",
    "vae": "use --decoder",
}
"""What is to be done for flags of other samplers: guided-diffusion's, EDM's, DiT's, diffusers'."""


def unknown_argument(command: str, parser: Parser, token: str) -> str:
    """What is wrong with an argument that no flag takes."""
    if not token.startswith("-"):
        return f"{token!r} is not expected here; `ray-sampler {command} --help` shows the usage"
    from ray_sampler.config import RunConfig

    flag = token.partition("=")[0]
    name = flag.lstrip("-").replace("-", "_")
    if command == "sample" and name in SYNONYMS:
        return f"{flag} is not a flag of {command}; {SYNONYMS[name]}"
    if command == "resume" and name in flags_of(RunConfig):
        return (
            f"{flag} is not a flag of resume, which repeats the recorded command; to change or extend the run, "
            f"give `ray-sampler sample` its flags and {flag}"
        )
    known = [action.dest for action in parser.declared if action.option_strings]
    close = difflib.get_close_matches(name, known, 1, SIMILAR)
    hint = f"did you mean --{close[0]}?" if close else f"`ray-sampler {command} --help` lists the flags"
    return f"{flag} is not a flag of {command}; {hint}"
