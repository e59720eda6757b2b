"""What becomes of a network's results: which decoder, which finisher, and latents that another run kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray_sampler.config import RunConfig
from ray_sampler.errors import printable, redact, require
from ray_sampler.networks.autoencoder import open_autoencoder
from ray_sampler.networks.family import Decodes, Network, NetworkSpec
from ray_sampler.networks.latent_rules import RULES
from ray_sampler.networks.opening import BUNDLED_FILES, open_network
from ray_sampler.options import of
from ray_sampler.sampling.decoding import DECODED_BY, decoding
from ray_sampler.sampling.finish import FINISHERS, Finisher, pixels
from ray_sampler.sampling.options import DecoderOptions
from ray_sampler.storage.ranges import cover, missing
from ray_sampler.storage.record import fingerprint
from ray_sampler.storage.run_dir import RunDir


def open_decoder(name: str) -> Network:
    """The network that decodes latents: a bundled one, or that of a directory."""
    if name in BUNDLED_FILES:
        return open_network(name, {}, flag="--decoder")
    require(
        "://" in name or os.path.exists(os.path.expanduser(name)),
        f"--decoder is {name!r}; there is no such directory; give that of an AutoencoderKL of diffusers, or "
        f"{' or '.join(FINISHERS)}; none writes the solver's result as it is, float32 (N, H, W, C)",
    )
    return open_autoencoder(name)


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


def check_picture_size(size: int | None, spec: NetworkSpec, decoder: NetworkSpec) -> None:
    """Check --image_size of a network of latents, which may be their size or that of their pictures.

    Raises:
        RequestError: the decoder makes pictures of another size.
    """
    side, factor = spec.shape[1], decoder.decodes.factor if decoder.decodes else 1
    require(
        size in (None, side, factor * side),
        f"--image_size is {size}, but --decoder makes pictures of {factor * side} pixels a side from the network's "
        f"latents of {side}; give the autoencoder of these latents, or leave --image_size out",
    )


def odd_decoder(name: str, spec: NetworkSpec, decoder: NetworkSpec) -> list[str]:
    """What the user should know of a decoder that is unlike those with which such networks are published."""
    decodes = decoder.decodes
    if name in BUNDLED_FILES or spec.autoencoder is None or decodes is None:
        return []
    pixels, scaling = spec.autoencoder
    odd = [f"{decodes.factor} pixels in a row for each latent, not {pixels}"] if decodes.factor != pixels else []
    if scaling and decodes.scaling != scaling:
        odd.append(f"the scaling_factor {decodes.scaling:g}, not {scaling:g}")
    said = f"--decoder {printable(redact(name))} has {' and '.join(odd)} as those of published networks of this kind"
    return [f"{said}; check that it is the one with which the network was trained"] if odd else []


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
