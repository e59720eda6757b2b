"""A user's own extractor: `--features python:package.module:function`."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from ray_sampler.errors import RequestError, printable, require
from ray_sampler.networks.family import beside_user
from ray_sampler.networks.user_code import brief, companions
from ray_sampler.networks.weights import weights_hash
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.options import FUNCTION


def open_own(name: str, weights: str | None, shape: tuple[int, ...]) -> Extractor:
    """The extractor that a user's function returns, called once with the path of its weights or None.

    Raises:
        RequestError: there is no such function, it raises, or its result does not map pictures to float32 (B, D).
    """
    shown = f"--features is {printable(name)}"
    module_name, _, function_name = name.removeprefix(FUNCTION).partition(":")
    try:
        with beside_user(), torch.inference_mode():
            module = importlib.import_module(module_name)
            network = getattr(module, function_name)(weights)
            require(
                isinstance(network, nn.Module),
                f"{shown}; the function returned a {type(network).__name__}; it must return a torch.nn.Module",
            )
            network.cpu().requires_grad_(False).eval()
            made = network(torch.zeros((2, *shape), dtype=torch.uint8))
    except (Exception, SystemExit) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{shown}; it raised {brief(error)}") from error
    said = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    right = isinstance(made, Tensor) and made.dtype == torch.float32 and made.ndim == 2 and len(made) == 2
    require(
        right,
        f"{shown}; for pictures {[2, *shape]} it returned {said.removeprefix('torch.')}; it must return float32 [2, D]",
    )
    tensors = {key: tensor for key, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    return Extractor(name, weights_hash(tensors), network, made.shape[1], "its own", by_value=companions(module))
