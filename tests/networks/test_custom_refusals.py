"""What is wrong with a network of the user's own is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig, RunError
from ray_sampler.networks.custom import Model
from tests.networks.users_models import Write, job, sampled

FINE = "from ray_sampler import Model\nfrom torch import nn\n"

WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "raises": (
        "def make(weights):\n    numbers = []\n    return numbers[3]",
        ("the function raised IndexError: list index out of range", "MODULE.py, line 3"),
    ),
    "raises over lines": ("def make(weights):\n    raise ValueError('one\\ntwo')", ("ValueError: one two", "line 2")),
    "raises in a library": (
        "import torch\ndef make(weights):\n    torch.nn.Linear(1, 1).load_state_dict({})",
        ("RuntimeError: Error(s) in loading", "MODULE.py, line 3"),
    ),
    "raises without a message": ("def make(weights):\n    assert False", ("AssertionError (", "line 2")),
    "exits": ("import sys\ndef make(weights):\n    sys.exit(0)", ("SystemExit", "line 3")),
    "exits when imported": ("import sys\nsys.exit('no')", ("SystemExit: no", "line 2")),
    "is no Python": ("def make(weights):\n    return (", ("SyntaxError", "MODULE.py, line 2")),
    "imports what is not there": ("import surely_not_there", ("importing it failed", "surely_not_there", "line 1")),
    "has no function": ("made = 3", ("has no function 'make'",)),
    "has something else": ("make = 3", ("has no function 'make'; make is a int",)),
    "has the Model itself": (
        FINE + "make = Model(nn.Conv2d(3, 3, 1), 'edm', (3, 4, 4))",
        ("make is a Model: define a function that returns a Model",),
    ),
    "has a table of that name": (
        "import torch\nmake = torch.ones(2)",
        ("has no function 'make'; make is a Tensor: define a function that returns a Model",),
    ),
    "has a zero of that name": ("make = 0", ("make is a int: define",)),
    "takes no argument": ("def make():\n    return 3", ("TypeError", "make() takes 0 positional arguments")),
    "returns a module": (
        FINE + "def make(weights):\n    return nn.Linear(2, 2)",
        ("returned a Linear", "must return a ray_sampler.Model"),
    ),
}
NETWORK = "nn.Conv2d(3, 3, 1)"
WRONG_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no network": ("3, 'edm', (3, 4, 4)", ("network is of type int", "torch.nn.Module", "MODULE.py, line 4")),
    "no size": (f"{NETWORK}, 'edm', (3, 0, 4)", ("shape is (3, 0, 4)",)),
    "fewer than no classes": (f"{NETWORK}, 'edm', (3, 4, 4), -1", ("num_classes is -1",)),
    "null without classes": (f"{NETWORK}, 'edm', (3, 4, 4), null_label=0", ("null_label is 0",)),
    "no range": (f"{NETWORK}, 'edm', (3, 4, 4), sigma_min=5, sigma_max=1", ("sigma_min is 5", "sigma_max 1")),
    "another kind": (f"{NETWORK}, 'score', (3, 4, 4)", ("kind is 'score'", "denoiser", "velocity")),
    "another option": (f"{NETWORK}, 'eps', (3, 4, 4), data_at=1", ("kind 'eps'", "data_at")),
    "no data_at": (f"{NETWORK}, 'velocity', (3, 4, 4)", ("data_at is None", "0 or 1")),
    "a wrong data_at": (f"{NETWORK}, 'velocity', (3, 4, 4), data_at=2", ("data_at is 2",)),
    "no kind": (f"{NETWORK}, shape=(3, 4, 4)", ("kind is missing", "Model(network, 'eps', shape)", "line 4")),
    "a shape in place of a kind": (f"{NETWORK}, (3, 4, 4)", ("kind is missing",)),
    "another program's kind": (f"{NETWORK}, 'epsilon', (3, 4, 4)", ("'epsilon'; 'eps' is probably meant",)),
    "another program's v": (f"{NETWORK}, 'v-prediction', (3, 4, 4)", ("'v' is probably meant",)),
    "a kind in capitals": (f"{NETWORK}, 'EPS', (3, 4, 4)", ("'EPS'; 'eps' is probably meant",)),
    "a kind of two words": (f"{NETWORK}, 'flow matching', (3, 4, 4)", ("'velocity' is probably meant",)),
    "a class in place of its object": (
        f"{NETWORK}, type('P', (), {{'denoiser': print, 'identity': print}}), (3, 4, 4)",
        ("kind is the class P; give an object of it, P()",),
    ),
    "an identity that is none": (
        f"{NETWORK}, type('P', (), {{'denoiser': print, 'identity': lambda self: 'me'}})(), (3, 4, 4)",
        ("P.identity() gave 'me'; it must give a dict",),
    ),
    "an identity of other values": (
        f"{NETWORK}, type('P', (), {{'denoiser': print, 'identity': lambda self: {{'net': self}}}})(), (3, 4, 4)",
        ("P.identity() has no plain values: TypeError",),
    ),
    "a label past all": (f"{NETWORK}, 'edm', (3, 4, 4), 10, 10**20", ("null_label is 100000000000000000000 with",)),
    "words for a switch": (f"{NETWORK}, 'edm', (3, 4, 4), 10, one_hot='no'", ("one_hot is 'no'; it must be True or",)),
    "a state dict that raises": (
        "type('N', (nn.Conv2d,), {'state_dict': lambda self, *a: [][0]})(3, 3, 1), 'edm', (3, 4, 4)",
        ("state_dict() raised IndexError: list index out of range", "MODULE.py, line 4"),
    ),
    "channels last": (f"{NETWORK}, 'edm', (16, 16, 3)", ("shape is (16, 16, 3)", "(3, 16, 16) is probably meant")),
    "no shape": (f"{NETWORK}, 'edm'", ("shape is None", "(C, H, W)")),
    "a rising table": (f"{NETWORK}, 'eps', (3, 4, 4), alphas=[0.1, 0.9]", ("alphas", "falling")),
    "no table": (f"{NETWORK}, 'x0', (3, 4, 4), alphas=[]", ("alphas has 0 values",)),
    "a table of words": (f"{NETWORK}, 'v', (3, 4, 4), alphas='ab'", ("alphas is a str", "falling table")),
    "a table that is none": (f"{NETWORK}, 'eps', (3, 4, 4), alphas=3", ("alphas is a int", "falling table")),
    "an unknown time": (f"{NETWORK}, 'edm', (3, 4, 4), c_noise='sigma'", ("c_noise is 'sigma'", "log/4")),
    "another decoder": (f"{NETWORK}, 'edm', (3, 4, 4), decoder='vae'", ("decoder is 'vae'", "'sd'", "'edm2'")),
    "options for an object": (
        f"{NETWORK}, type('P', (), {{'denoiser': print, 'identity': print}})(), (3, 4, 4), c_noise='log/4'",
        ("given as an object", "c_noise must be left out"),
    ),
    "another object": (f"{NETWORK}, object(), (3, 4, 4)", ("kind is of type object", "denoiser")),
    "an object without identity": (
        f"{NETWORK}, type('P', (), {{'denoiser': print}})(), (3, 4, 4)",
        ("kind is of type P", "denoiser and identity"),
    ),
    "weights on no device": ("nn.Conv2d(3, 3, 1, device='meta'), 'edm', (3, 4, 4)", ("no values for weight, bias",)),
    "weights without values": ("nn.LazyConv2d(3, 1), 'edm', (3, 4, 4)", ("no values for weight",)),
    "weights that are not finite": (
        "nn.utils.skip_init(nn.Linear, 2, 2).apply(lambda m: m.weight.data.fill_(float('nan'))), 'edm', (3, 4, 4)",
        ("not finite, in weight",),
    ),
    "a latent": (f"{NETWORK}, 'edm', (3, 4, 4), decoder='sd'", ("--decoder DIR", "--decoder none")),
    "a latent by its channels": (f"{NETWORK}, 'edm', (4, 4, 4)", ("latents of 4 channels", "--decoder none")),
}


def refused(module: str) -> str:
    with pytest.raises(RequestError) as error:
        job(module)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("--")
    return said.replace(module, "MODULE")


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_module_is_refused_in_one_sentence(what: str, write: Write) -> None:
    source, parts = WRONG[what]
    said = refused(write(source))
    assert "--model is python:MODULE:make" in said
    for part in parts:
        assert part in said


@pytest.mark.parametrize("what", WRONG_MODELS)
def test_a_wrong_model_is_refused_in_one_sentence(what: str, write: Write) -> None:
    arguments, parts = WRONG_MODELS[what]
    said = refused(write(f"{FINE}def make(weights):\n    return Model({arguments})"))
    for part in parts:
        assert part in said


def test_labels_of_an_unconditional_network_are_refused_without_a_flag_of_other_networks(write: Write) -> None:
    module = write(f"{FINE}def make(weights):\n    return Model({NETWORK}, 'edm', (3, 4, 4))")
    with pytest.raises(RequestError, match=r"the model is unconditional; leave it out$"):
        job(module, labels="3")


@pytest.mark.parametrize(("value", "refusal"), [(1.0, None), (float("nan"), "not finite, in scale")])
def test_weights_of_8_bits_are_taken_where_they_are_finite(value: float, refusal: str | None, write: Write) -> None:
    buffer = f"n.register_buffer('scale', torch.full((2,), float('{value}')).to(torch.float8_e4m3fn))"
    made = f"    n = {NETWORK}\n    {buffer}\n    return Model(n, 'edm', (3, 4, 4))"
    module = write(f"{FINE}import torch\ndef make(weights):\n{made}")
    if refusal:
        assert refusal in refused(module)
    else:
        assert job(module).networks["main"].spec.shape == (3, 4, 4)


def test_numbers_of_numpy_and_torch_are_taken(write: Write) -> None:
    numbers = "tuple(np.array([3, 4, 4])), np.int64(5), torch.tensor(4), np.float32(0.5), torch.tensor(8)"
    module = write(
        f"import numpy as np, torch\n{FINE}def make(weights):\n    return Model({NETWORK}, 'edm', {numbers})"
    )
    spec = job(module).networks["main"].spec
    values = (*spec.shape, spec.num_classes, spec.null_label, spec.sigma_min, spec.sigma_max)
    assert values == (3, 4, 4, 5, 4, 0.5, 8.0)
    assert [type(value) for value in values] == [int] * 5 + [float] * 2


def test_a_switch_may_be_a_number_or_of_numpy() -> None:
    network = torch.nn.Conv2d(3, 3, 1)
    for value in (True, 1, np.True_, torch.tensor(True), False, 0, np.False_):
        one_hot = Model(network, "edm", (3, 4, 4), 10, one_hot=value).one_hot
        assert (type(one_hot), one_hot) == (bool, bool(value))
    for wrong in (2, 1.0, np.ones(2)):
        with pytest.raises(RequestError, match="one_hot is"):
            Model(network, "edm", (3, 4, 4), 10, one_hot=wrong)


def test_whatever_json_takes_identifies_a_parameterisation(write: Write) -> None:
    own = "type('P', (), {'denoiser': print, 'identity': lambda self: {'preconditioning': 'own', 'a': said}})()"
    module = write(
        f"{FINE}said = {{3: float('inf'), 4: float('nan')}}\ndef make(weights):\n"
        f"    return Model({NETWORK}, {own}, (3, 4, 4))"
    )
    made = job(module)
    assert str(made.identity["a"]) == "{3: inf, 4: nan}"
    assert len(made.fingerprint) == 64


def test_an_exception_of_the_network_names_its_line(write: Write) -> None:
    body = "class Network(nn.Module):\n    def forward(self, x, t):\n        return {}['no\\x1b key']\n\n"
    module = write(f"{FINE}{body}def make(weights):\n    return Model(Network(), 'edm', (3, 4, 4))")
    with pytest.raises(RunError) as error:
        sampled(job(module))
    assert f"the network of --model raised KeyError: 'no\\x1b key' ({Path(f'{module}.py').resolve()}, line 5)" == str(
        error.value
    )


@pytest.mark.parametrize("model", ["python:", "python:module", "python::make", "python:module:", "python:module:a b"])
def test_a_name_of_another_form_is_refused(model: str) -> None:
    with pytest.raises(RequestError, match=r"python:package\.module:function"):
        prepare(RunConfig(model=model))


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("python:my.py:f", "python:my:f"),
        ("python:nets/my.py:f", "python:nets.my:f"),
        ("my:f", "python:my:f"),
        ("my.py:f", "python:my:f"),
        ("nets.my:f", "python:nets.my:f"),
    ],
)
def test_what_was_probably_meant_is_said(model: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"{meant}$"):
        prepare(RunConfig(model=model))


@pytest.mark.parametrize("module", ["surely_not_there", "surely_not.there", "os.surely_not_there"])
def test_a_module_that_is_not_there_is_refused(module: str) -> None:
    with pytest.raises(RequestError, match=f"there is no module '{module}' in the current directory or on PYTHONPATH"):
        prepare(RunConfig(model=f"python:{module}:make"))


def test_what_is_wrong_with_a_guide_is_said_of_its_flag(write: Write) -> None:
    module = write(f"{FINE}def make(weights):\n    return Model({NETWORK}, 'denoiser', (3, 4, 4))")
    wrong = write("def make(weights):\n    pass")
    with pytest.raises(RequestError, match=f"^--guide is python:{wrong}:make; the function returned a NoneType"):
        job(module, guidance=2.0, guide=f"python:{wrong}:make")
