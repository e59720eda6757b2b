"""From a resolved request and its networks to the sample plan, and to the identity that a fingerprint is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ray_sampler.config import SAMPLING_VERSION, RunConfig
from ray_sampler.errors import printable, redact, require, shortened
from ray_sampler.networks.decoders import RULES, open_autoencoder
from ray_sampler.networks.family import Decodes, Network, NetworkSpec, Script
from ray_sampler.networks.opening import BUNDLED_FILES, open_network
from ray_sampler.options import of
from ray_sampler.sampling.conditions import Condition, LabelRule, listed_labels
from ray_sampler.sampling.decoding import DECODED_BY, DECODER, decoding
from ray_sampler.sampling.finish import FINISHERS, Finisher, pixels
from ray_sampler.sampling.guidance import check_channels
from ray_sampler.sampling.options import DecoderOptions, GuidanceOptions, NoiseOptions, interval_of
from ray_sampler.sampling.parameterisation import Parameterisation, Preconditioned
from ray_sampler.sampling.path_solvers import TableOptions
from ray_sampler.sampling.plan import GUIDE, MAIN, SamplePlan, parameterisation_of
from ray_sampler.sampling.solvers import SOLVERS, Churn
from ray_sampler.sampling.stepping import schedule_of
from ray_sampler.storage.number_file import read_labels
from ray_sampler.storage.ranges import cover, missing
from ray_sampler.storage.record import fingerprint
from ray_sampler.storage.run_dir import RunDir


def plan_of(config: RunConfig, specs: Mapping[str, NetworkSpec]) -> SamplePlan:
    """The sample plan of a resolved request.

    Args:
        specs: of its networks, by role.

    Raises:
        RequestError: a value is wrong, by itself or beside another.
    """
    spec, guide = specs[MAIN], specs.get(GUIDE)
    schedule, guidance = schedule_of(config), of(GuidanceOptions, config)
    solver = SOLVERS[config.sampler]
    solver_options: Any = of(solver.options, config)
    for each in specs.values():
        require(not each.lacks, each.lacks)
    config.check()
    check_guide(guidance, spec, guide)
    check_channels(guidance, spec.shape[0])
    kinds = {
        role: parameterisation_of(each, schedule.sigma_min) for role, each in specs.items() if role in (MAIN, GUIDE)
    }
    check_path(config, kinds)
    solver_options = as_network(solver_options, spec.script, kinds[MAIN])
    solver.check(schedule, solver_options)
    return SamplePlan(
        shape=spec.shape,
        parameterisation=kinds[MAIN],
        sampler=config.sampler,
        solver=solver,
        solver_options=solver_options,
        schedule=schedule,
        finisher=finisher_of(config, spec, specs.get(DECODER)),
        noise=of(NoiseOptions, config),
        num_samples=config.num_samples,
        condition=CONDITIONS[spec.condition](config, spec),
        clip_denoised=config.clip_denoised,
        state=config.state,
        guidance=guidance,
        guide=kinds.get(GUIDE),
        guide_conditioned=bool(guide and guide.num_classes),
        script=spec.script,
    )


def label_rule(config: RunConfig, spec: NetworkSpec) -> LabelRule | None:
    """The rule that resolved labels name; None for an unconditional network. Raises RequestError: the list is wrong."""
    labels = config.labels
    if labels is None:
        return None
    if labels in ("random", "balanced"):
        return LabelRule("balanced" if labels == "balanced" else "random", spec.num_classes, None, spec.null_label)
    rule = listed_labels(read_labels(labels), spec.num_classes, repr(shortened(labels)))
    return replace(rule, null_label=spec.null_label)


CONDITIONS: dict[str, Callable[[RunConfig, NetworkSpec], Condition | None]] = {"labels": label_rule}
"""By the name that a network's description has; another condition is one entry more here."""


def check_guide(guidance: GuidanceOptions, spec: NetworkSpec, guide: NetworkSpec | None) -> None:
    """Check that something can guide a network.

    Raises:
        RequestError: it has no null label and no guide, or the guide is of another shape or other classes.
    """
    if guidance.guidance == 1:
        return
    if guide is None:
        require(
            spec.null_label is not None,
            f"--guidance is {guidance.guidance:g}, but the network has no null label to guide it; "
            "give --guide MODEL, a second network",
        )
        return
    require(
        guide.shape == spec.shape and guide.num_classes in (0, spec.num_classes),
        f"--guide is {redact(guidance.guide)!r}, of {described(guide)}; it must have the same shape as --model, which "
        f"is of {described(spec)}, and as many classes or none",
    )


def described(spec: NetworkSpec) -> str:
    """A network's shape and classes, as a message shows them."""
    return f"shape {'x'.join(map(str, spec.shape))} and {spec.num_classes or 'no'} classes"


SAMPLED = {
    "flow": ("data_at", "flows, which --prediction velocity or a Model of kind velocity names"),
    "table": ("alphas", "networks of a table of alphas, as --prediction eps or a Model of kind eps, v or x0"),
}
"""By path: what a parameterisation has of it, and the networks that this means."""


def check_path(config: RunConfig, kinds: Mapping[str, Parameterisation]) -> None:
    """Check that a solver can sample a network, and ask its guide.

    Raises:
        RequestError: one computes something else; or it is to be clamped where nothing can be.
    """
    path = SOLVERS[config.sampler].path
    if path == "any":
        return
    named, meant = SAMPLED[path]
    for role, kind in kinds.items():
        flag, computes = "--guide" if role == GUIDE else "--model", kind.identity().get("preconditioning")
        require(
            getattr(kind, named, None) is not None or (role == GUIDE and path == "table"),
            f"--sampler is {config.sampler}, which samples {meant}; the network of {flag} is of kind {computes}; give "
            "another --sampler, for example heun",
        )
    require(
        path != "flow" or not config.clip_denoised,
        f"--clip_denoised is True, but --sampler {config.sampler} has no denoised picture to clamp; leave it out",
    )


def as_network(options: Any, script: Script, kind: Parameterisation) -> Any:
    """A solver's options with what the network decides: its table, and how its publication's script rounds."""
    if isinstance(options, TableOptions):
        return replace(options, alphas=getattr(kind, "alphas", None))
    return replace(options, as_edm=True) if isinstance(options, Churn) and script != "consistency-models" else options


def identity(
    config: RunConfig, plan: SamplePlan, specs: Mapping[str, NetworkSpec], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """All that decides a sample's content, flat, by effective value.

    Args:
        specs: of the networks, by role.
        hashes: of the networks, by role.
    """
    return (
        {"sampling_version": SAMPLING_VERSION, "precision": config.precision}
        | specs[MAIN].identity(hashes[MAIN])
        | plan.identity(hashes)
    )


def open_decoder(name: str, spec: NetworkSpec, size: int | None) -> Network:
    """The network that decodes latents: a bundled one, or that of a directory.

    Args:
        spec: of the network whose latents they are.
        size: as --image_size asks for; that of the latents or of their pictures.

    Raises:
        RequestError: there is none, or it makes pictures of another size.
    """
    require(
        name in BUNDLED_FILES or "://" in name or os.path.exists(os.path.expanduser(name)),
        f"--decoder is {name!r}; there is no such directory; give that of an AutoencoderKL of diffusers, or "
        f"{' or '.join(FINISHERS)}; none writes the solver's result as it is, float32 (N, H, W, C)",
    )
    network = open_network(name, {}, flag="--decoder") if name in BUNDLED_FILES else open_autoencoder(name)
    side, factor = spec.shape[1], network.spec.decodes.factor if network.spec.decodes else 1
    require(
        size in (None, side, factor * side),
        f"--image_size is {size}, but --decoder makes pictures of {factor * side} pixels a side from the network's "
        f"latents of {side}; give the autoencoder of these latents, or leave --image_size out",
    )
    return network


def finisher_of(config: RunConfig, spec: NetworkSpec, decoder: NetworkSpec | None) -> Finisher:
    """The finisher that the settings and the network ask for.

    Args:
        decoder: of the network that decodes, where the settings name one.

    Raises:
        RequestError: the network makes latents, and nothing says what to do with them, or the decoder is not for them.
    """
    channels, height, width = spec.shape
    options = of(DecoderOptions, config)
    latent = spec.latent is not None or channels not in (1, 3)
    require(
        latent or not config.keep_latents,
        "--keep_latents is True, but the network makes pictures; leave it out, or give --decoder none, which writes "
        "the solver's result as it is, float32 (N, H, W, C)",
    )
    if decoder is not None:
        return decoding(options, spec.latent or "sd", check_decoder(options, spec, decoder))
    if config.decoder is not None:
        require(
            not (config.keep_latents and config.decoder == "none"),
            "--keep_latents is True, but --decoder none writes the same into the fragments; leave one of the two out",
        )
        return FINISHERS[config.decoder](options)
    require(
        spec.latent is not None or channels in (1, 3) or width not in (1, 3),
        f"--model's shape is {spec.shape}; it is (C, H, W), so {(width, channels, height)} is probably meant; for "
        f"results of {channels} channels give --decoder none",
    )
    require(
        not latent,
        f"--decoder is missing: the network makes latents of {channels} channels, not pictures; give --decoder DIR, "
        "the directory of their autoencoder (AutoencoderKL of diffusers), or --decoder none, which writes the "
        "solver's result as it is, float32 (N, H, W, C)",
    )
    return pixels(config.rounding)


def check_decoder(options: DecoderOptions, spec: NetworkSpec, decoder: NetworkSpec) -> Decodes:
    """What a network makes of the latents of another.

    Raises:
        RequestError: it decodes nothing or others, or there are no latents.
    """
    shown, channels = f"--decoder is {redact(options.decoder)}", spec.shape[0]
    require(decoder.decodes is not None, f"{shown}, a network of family {decoder.family}, which decodes nothing")
    assert decoder.decodes is not None
    require(
        spec.latent is not None or channels not in (1, 3),
        f"{shown}, but the network makes pictures; leave it out, or say in the Model what decoder its latents need",
    )
    require(
        decoder.decodes.channels == channels,
        f"{shown}, for latents of {decoder.decodes.channels} channels, but the network's have {channels}; give the "
        "autoencoder with which it was trained, or --decoder none",
    )
    only = RULES[spec.latent].channels if spec.latent else None
    require(
        only in (None, channels),
        f"--model makes latents of {channels} channels, but the rule {spec.latent} is for {only}; give --decoder none",
    )
    return decoder.decodes


def decoder_notes(config: RunConfig, spec: NetworkSpec, decoder: NetworkSpec) -> list[str]:
    """What the user should know of a decoder: latents that only fill up a call, and what published ones are unlike."""
    notes, decodes, size, empty = [], decoder.decodes, config.decoder_batch, -config.batch_size % config.decoder_batch
    if empty > config.batch_size / 4:
        notes.append(
            f"--decoder_batch {size} decodes {empty} empty latents beside the {config.batch_size} of a batch; one that "
            "divides --batch_size avoids that"
        )
    if config.decoder in BUNDLED_FILES or spec.autoencoder is None or decodes is None:
        return notes
    pixels, scaling = spec.autoencoder
    odd = [f"{decodes.factor} pixels in a row for each latent, not {pixels}"] if decodes.factor != pixels else []
    if scaling and decodes.scaling != scaling:
        odd.append(f"the scaling_factor {decodes.scaling:g}, not {scaling:g}")
    said = f"{' and '.join(odd)} as those of published networks of this kind; check that it is the one"
    shown = f"--decoder {printable(redact(config.decoder))} has {said} with which the network was trained"
    return [*notes, shown] if odd else notes


def refuse_other_latents(kept: RunDir, identity: Mapping[str, Any], num_samples: int) -> None:
    """Refuse latents that are not those that this run would sample.

    Raises:
        RequestError: they are of another run, or too few, or there are none.
    """
    shown, run, where = f"--latents is {kept.url}", kept.read_run() or {}, kept.kept_latents()
    require(where is not None, f"{shown}, which keeps no latents; give a run with --keep_latents or --decoder none")
    assert where is not None
    there, here = ({k: v for k, v in each.items() if k not in DECODED_BY} for each in (run["identity"], identity))
    require(
        fingerprint(there) == fingerprint(here),
        f"{shown}, a run of other latents: {differences(there, here)}; give the same settings",
    )
    gaps = missing(cover(where[0].list().fragments, num_samples), num_samples)
    count = num_samples - sum(stop - start for start, stop in gaps)
    require(not gaps, f"{shown}, which keeps {count} of the {num_samples} latents; let that run grow first")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what the identities of two runs differ, for a message."""
    keys = [key for key in there.keys() | here.keys() if there.get(key) != here.get(key)]
    keys.sort(key=lambda key: (key not in ("model", "weights"), key))
    return ", ".join(f"{printable(key)} {short(there.get(key))}, not {short(here.get(key))}" for key in keys)


def short(value: Any) -> str:
    """A setting's value as a message shows it."""
    text = "none" if value is None else printable(value)
    return text if len(text) <= 24 else text[:12] + "…"


FOR_CONSISTENCY = ("onestep", "multistep")
"""Solvers that jump from noise to data, for which consistency models are trained (Song et al. 2023, algorithm 1)."""

EITHER = ("denoiser", None)
"""Kinds of networks that may be consistency models or not: a user's D, or parameterisation."""

ROUNDING = 1e-4
"""How far, relatively, a level may lie beyond the end of a table: users write rounded ends."""


def advice(plan: SamplePlan) -> Iterator[str]:
    """The lines of warning for a plan."""
    if warning := plan.solver.warning(plan.schedule, plan.solver_options):
        yield warning
    kind = plan.parameterisation.identity().get("preconditioning")
    if kind == "consistency" and plan.sampler not in FOR_CONSISTENCY:
        yield f"--sampler {plan.sampler}: a consistency model is trained for {' and '.join(FOR_CONSISTENCY)}"
    if plan.sampler == "onestep" and kind not in ("consistency", *EITHER):
        yield "--sampler onestep is for consistency models; one evaluation of a diffusion model gives a blurred mean"
    begins = plan.sigmas()[:-1]
    yield from out_of_reach(plan, begins)
    if isinstance(plan.parameterisation, Preconditioned) and plan.parameterisation.alphas:
        low, high = plan.parameterisation.levels
        for name, level, end in (("sigma_max", begins[0], high), ("sigma_min", begins[-1], low)):
            if level > high * (1 + ROUNDING) or level < low * (1 - ROUNDING):
                yield f"--{name} {level:g}: the network's table ends at {end:g}, so it is told that level in its place"


def out_of_reach(plan: SamplePlan, begins: list[float]) -> Iterator[str]:
    """Of settings for a range of levels in which no step begins.

    Args:
        begins: where the steps begin.
    """
    ranges = {}
    churn = getattr(plan.solver_options, "s_churn", 0.0)
    if churn:
        low, high = plan.solver_options.s_tmin, plan.solver_options.s_tmax
        ranges[f"--s_churn {churn:g}"] = (f"--s_tmin {low:g} and --s_tmax {high:g}", low, high)
    if plan.guidance.guidance != 1:
        low, high = interval_of(plan.guidance)
        ranges[f"--guidance {plan.guidance.guidance:g}"] = (f"--guidance_interval {low:g},{high:g}", low, high)
    for setting, (shown, low, high) in ranges.items():
        if not any(low * (1 - ROUNDING) <= level <= high * (1 + ROUNDING) for level in begins):
            yield (
                f"{shown}: no step of this run begins there (they begin from {max(begins):g} to {min(begins):g}), so "
                f"{setting} has no effect"
            )
