"""Decoding: latents become pictures by a network with the role decoder, a fixed number of them at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ray_sampler.networks.decoders import RULES, Rule
from ray_sampler.networks.family import Decodes
from ray_sampler.sampling.finish import SOUND, Finisher, to_uint8
from ray_sampler.sampling.memory import OutOfDeviceMemoryError, ran_out_of_memory
from ray_sampler.sampling.options import DecoderOptions
from ray_sampler.storage.record import Column

DECODER = "decoder"
"""The role of the network that decodes."""
DECODED_BY = (DECODER, "decoder_rule", "decoder_precision", "rounding")
"""What of a run's identity says how latents are decoded."""


def decoding(options: DecoderOptions, rule: str, decodes: Decodes) -> Finisher:
    """A finisher that decodes; options.decoder names the network.

    Args:
        rule: a key of RULES.
    """
    precision = {} if options.decoder_precision == "fp32" else {"decoder_precision": options.decoder_precision}
    factor = decodes.factor
    return Finisher(
        partial(decoded, options, RULES[rule], decodes),
        lambda shape: {"image": Column("uint8", (factor * shape[1], factor * shape[2], decodes.pictures))},
        {"decoder_rule": rule, "rounding": options.rounding} | precision,
        {DECODER: str(options.decoder)},
        f"decoder batch {options.decoder_batch}",
    )


def decoded(
    options: DecoderOptions, rule: Rule, decodes: Decodes, x: Tensor, networks: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """Pictures (B, f H, f W, C') uint8 of x, and which of them are of finite values.

    Every call of the network has as many latents, the last ones zeros where there are fewer, so that a picture's
    bytes depend neither on --batch_size nor on its neighbours.

    Raises:
        OutOfDeviceMemoryError: the device has no room for this number.
    """
    network, size = networks[DECODER], options.decoder_batch
    z = rule.latents(x.float(), decodes).to(next(network.parameters()).dtype)
    height, width = (decodes.factor * side for side in x.shape[2:])
    images = torch.empty((len(x), height, width, decodes.pictures), dtype=torch.uint8, device=x.device)
    sound = torch.empty(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), size):
        part = z[start : start + size]
        padding = size - len(part)
        pictures = called(network, pad(part, (0, 0) * 3 + (0, padding)))[: len(part)].float()
        images[start : start + size] = to_uint8(pictures, options.rounding, rule.unit)
        sound[start : start + size] = pictures.isfinite().flatten(1).all(1)
    return {"image": images, SOUND: sound}


def called(network: nn.Module, z: Tensor) -> Tensor:
    """What the network makes of latents.

    Raises:
        OutOfDeviceMemoryError: there is no room; names how many would fit.
    """
    try:
        pictures: Tensor = network(z)
        return pictures
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
    # Here no frame holds the tensors that took the memory.
    size = len(z) // 2
    while size and not fits(network, z[:size]):
        size //= 2
    advice = (
        f"try --decoder_batch {size}"
        if size
        else "not even one fits; try --decoder_precision fp16, a larger --gpus_per_actor, or a device with more memory"
    )
    raise OutOfDeviceMemoryError(f"{z.device} ran out of memory with --decoder_batch {len(z)} while decoding; {advice}")


def fits(network: nn.Module, z: Tensor) -> bool:
    try:
        network(z)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return False
    return True
