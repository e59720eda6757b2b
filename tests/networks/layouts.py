"""Checkpoints in the layouts that people save."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint

State = dict[str, Tensor]


class Net(nn.Module):
    """Parameters, a buffer, and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 3))
        self.blocks = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))


torch.manual_seed(0)
STATE: State = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
FLOATS: State = {name: tensor for name, tensor in STATE.items() if tensor.is_floating_point()}
OTHER: State = {name: tensor + 1 for name, tensor in STATE.items()}
PARAMETERS = [name for name, _ in Net().named_parameters()]


def prefixed(state: State, *prefixes: str) -> State:
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def lightning_ema(state: State) -> State:
    """As the LitEma of latent diffusion names its averages."""
    named = {f"model_ema.{name.replace('.', '')}": state[name] for name in PARAMETERS}
    return named | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


class Settings(argparse.Namespace):
    """Of a class of the user's own."""


class Attributes(dict[str, Any]):
    """A dictionary of a custom class, like EasyDict."""


EXTRAS = {
    "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "args": argparse.Namespace(lr=np.float64(0.1), when=np.arange(3)),
    "cfg": Settings(a={(1, 2): {3}}),
    "epoch": 3,
    "step": torch.tensor(3),
}

TRAINED = STATE | {name: OTHER[name] for name in PARAMETERS}
"""Weights of which the average is `STATE`; buffers are in no average."""
AVERAGED = {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in STATE.items()}}
"""As torch's AveragedModel saves itself."""
EMA_MODEL = {
    **{"decay": 0.9999, "min_decay": 0.0, "optimization_step": 7, "update_after_step": 0, "use_ema_warmup": False},
    **{"inv_gamma": 1.0, "power": 2 / 3, "shadow_params": [STATE[name] for name in PARAMETERS]},
}
"""As EMAModel of diffusers does."""

LAYOUTS: dict[str, tuple[Any, str]] = {
    "EMAModel": ({"model": TRAINED, "ema": EMA_MODEL}, "ema"),
    "EMAModel beside": ({"model": TRAINED, **EMA_MODEL}, "shadow_params"),
    "EMAModel of a named network": ({"unet": TRAINED, "unet_ema": EMA_MODEL}, "unet_ema"),
    "averaged_model": ({"model": OTHER, "averaged_model": AVERAGED}, "averaged_model"),
    "swa_model": ({"model": OTHER, "swa_model": AVERAGED, "epoch": 3}, "swa_model"),
    "shadow": ({"model": OTHER, "shadow": STATE, "decay": 0.999}, "shadow"),
    "average": ({"state_dict": OTHER, "moving_average": STATE}, "moving_average"),
    "swa inside": (
        {"state_dict": {**prefixed(OTHER, "model."), **prefixed(STATE, "swa_model.")}},
        "state_dict.swa_model",
    ),
    "alone": (STATE, ""),
    "ordered": (OrderedDict(STATE), ""),
    "of a module": (Net().state_dict() | STATE, ""),
    "parameters": (STATE | {name: nn.Parameter(tensor) for name, tensor in FLOATS.items()}, ""),
    "beside objects": ({**STATE, "args": Settings(lr=1)}, ""),
    "module.": (prefixed(STATE, "module."), ""),
    "_orig_mod.": (prefixed(STATE, "_orig_mod."), ""),
    "both": (prefixed(STATE, "module.", "_orig_mod."), ""),
    "both, the other way": (prefixed(STATE, "_orig_mod.", "module.", "module."), ""),
    "model.": (prefixed(STATE, "model."), ""),
    "a compiled part": ({name.replace("blocks.", "blocks._orig_mod."): t for name, t in STATE.items()}, ""),
    "state_dict": ({"state_dict": STATE, **EXTRAS}, "state_dict"),
    "model": ({"model": STATE, **EXTRAS}, "model"),
    "module": ({"module": prefixed(STATE, "module."), **EXTRAS}, "module"),
    "model_state_dict": ({"model_state_dict": STATE, "optimizer_state_dict": EXTRAS["opt"]}, "model_state_dict"),
    "ema": ({"model": OTHER, "ema": STATE, **EXTRAS}, "ema"),
    "model_ema": ({"model": OTHER, "model_ema": STATE, **EXTRAS}, "model_ema"),
    "ema_state_dict": ({"model_state_dict": OTHER, "ema_state_dict": STATE, **EXTRAS}, "ema_state_dict"),
    "ema, nested": ({"model": OTHER, "ema": {"state_dict": STATE, "decay": 0.9}}, "ema.state_dict"),
    "ema with counters": ({"model": OTHER, "ema": {**STATE, "num_updates": torch.tensor(3), "decay": 0.9}}, "ema"),
    "shadow_params": (
        {"ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [STATE[n] for n in PARAMETERS]}, "model": STATE},
        "ema",
    ),
    "an averaged model": ({**prefixed(STATE, "module."), "n_averaged": torch.tensor(4)}, ""),
    "ema. beside model.": ({**prefixed(OTHER, "model."), **prefixed(STATE, "ema.")}, "ema"),
    "online_model and ema_model": (
        {
            "step": 3,
            "ema": {**prefixed(OTHER, "online_model."), **prefixed(STATE, "ema_model."), "initted": torch.tensor(True)},
        },
        "ema.ema_model",
    ),
    "Lightning": ({"state_dict": prefixed(STATE, "model."), "pytorch-lightning_version": "2.0"}, "state_dict"),
    "Lightning with other modules": (
        {"state_dict": {**prefixed(STATE, "model."), **prefixed(OTHER, "loss.vgg.")}},
        "state_dict.model",
    ),
    "Lightning's average": (
        {"state_dict": {**prefixed(STATE | {n: OTHER[n] for n in PARAMETERS}, "model."), **lightning_ema(STATE)}},
        "state_dict.model_ema",
    ),
    "Lightning's average, in a callback": (
        {
            "state_dict": prefixed(OTHER, "model."),
            "callbacks": {
                "ModelCheckpoint{'monitor': 'ema_loss'}": {"best_model_score": torch.tensor(0.1), "ema_loss": {}},
                "EMACallback{'decay': 0.999}": {"ema_state_dict": prefixed(STATE, "model."), "ready": True},
            },
        },
        "callbacks.EMACallback{'decay': 0.999}.ema_state_dict",
    ),
    "Lightning's average, in a callback as a list": (
        {
            "state_dict": prefixed(OTHER, "model."),
            "callbacks": {"EMA": {"cur_step": 3, "ema_weights": list(STATE.values())}},
        },
        "callbacks.EMA.ema_weights",
    ),
    "Lightning's average, as torch_ema keeps it": (
        {
            "state_dict": prefixed(STATE | {n: OTHER[n] for n in PARAMETERS}, "model."),
            "callbacks": {"Averaging": {"decay": 0.9, "shadow_params": [STATE[n] for n in PARAMETERS]}},
        },
        "callbacks.Averaging.shadow_params",
    ),
    "Lightning's average, in an optimizer": (
        {
            "state_dict": STATE | {n: OTHER[n] for n in PARAMETERS},
            "optimizer_states": [{"opt": EXTRAS["opt"], "ema": tuple(STATE[n] for n in PARAMETERS), "decay": 0.9}],
        },
        "optimizer_states.0.ema",
    ),
    "Lightning's WeightAveraging": (
        {
            "state_dict": prefixed(STATE, "model."),
            "current_model_state": prefixed(OTHER, "model."),
            "averaging_state": {"n_averaged": torch.tensor(3)},
            "callbacks": {"EMAWeightAveraging": {"latest_update_step": 3}},
        },
        "state_dict",
    ),
    "averages by rate": ({"model": OTHER, "ema": {"0.9999": STATE}}, "ema.0.9999"),
    "averages by rate, a number": ({"model": OTHER, "ema": {0.9999: STATE, 0.99: OTHER}}, "ema.0.9999"),
    "averages by width, a list": (
        {"net": OTHER, "optimizer": EXTRAS["opt"], "ema": {"stds": [0.05, 0.1], "emas": [STATE, OTHER]}},
        "ema.emas.0",
    ),
    "under another name": (
        {"checkpoint": {"model": STATE, "epoch": 3}, "optimizer": EXTRAS["opt"]},
        "checkpoint.model",
    ),
    "averages by rate, named apart": ({"model": OTHER, "ema_0.9999": STATE, "ema_0.99": OTHER}, "ema_0.9999"),
    "averages by rate, together": ({"model": OTHER, "emas": {"0.9999": STATE, "0.99": OTHER}}, "emas.0.9999"),
    "net_ema": ({"net": OTHER, "net_ema": STATE, "ema_figures": {"a": torch.ones(1)}}, "net_ema"),
    "ema_model_state_dict": ({"model_state_dict": OTHER, "ema_model_state_dict": STATE}, "ema_model_state_dict"),
    "EMA": ({"params": OTHER, "EMA": {"decay": 0.9, "weights": STATE}}, "EMA.weights"),
    "another single name": ({"generator": STATE, **EXTRAS}, "generator"),
    "a class derived from dict": (Attributes(model=Attributes(STATE)), "model"),
    "a defaultdict": ({"model": defaultdict(list, STATE)}, "model"),
    "DeepSpeed": ({"module": STATE, "ds_config": {}, "optimizer": None}, "module"),
}


def save_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, 4))


Writer = Callable[[Any, Path], None]
WRITERS: list[Writer] = [torch.save, save_old, save_plain]


def refusal(url: str | Path, key: str | None = None) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(RequestError) as refused:
        read_checkpoint(str(url), key)
    message = str(refused.value)
    assert message.isprintable()
    assert message.startswith("--weights_key is " if key is not None else "--model is ")
    return message
