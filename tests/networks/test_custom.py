"""A network of the user's own: every kind samples the exact distribution, and travels where its files are not."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_sampler.config import RequestError
from ray_sampler.sampling.noise import philox_normals
from ray_sampler.sampling.plan import sample_block
from tests.networks.users_models import Write, job, sampled

# Every kind, on data for which the exact denoiser is known.

GAUSSIAN = '''
import numpy as np
import torch
from torch import nn
from ray_sampler import Model

MEAN, DEVIATION = 0.3, 0.4
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LOG_SIGMAS = 0.5 * np.log((1 - ALPHAS) / ALPHAS)


def exact(x, sigma):
    """E[x_0 | x] for pixels that are independent and normal."""
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


class Network(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x, t):
        assert x.dtype == t.dtype == torch.float32 and t.shape == (len(x),)
        return self.compute(x.double(), t.double()[:, None, None, None]).float()


def preconditioned(sigma_of, sigma_min=None):
    def compute(inputs, time):
        sigma = sigma_of(time)
        x = inputs * (sigma**2 + 0.25) ** 0.5
        above = sigma if sigma_min is None else sigma - sigma_min
        c_skip, c_out = 0.25 / (above**2 + 0.25), above * 0.5 / (sigma**2 + 0.25) ** 0.5
        output = (exact(x, sigma) - c_skip * x) / c_out
        return torch.where(c_out > 0, output, torch.zeros_like(output))

    return compute


def diffusion(predict):
    def compute(x_t, index):
        sigma = torch.from_numpy(np.exp(np.interp(index.numpy(), np.arange(1000), LOG_SIGMAS)))
        alpha = 1 / (1 + sigma**2)
        x = x_t / alpha**0.5
        data = exact(x, sigma)
        return predict(data, (x - data) / sigma, alpha)

    return compute


def flow(data_at, predict):
    def compute(x_t, t):
        noisy = 1 - t if data_at else t
        sigma = noisy / (1 - noisy)
        x = x_t / (1 - noisy)
        data = exact(x, sigma)
        return predict(data, (x - data) / sigma)

    return compute


class Own:
    """A parameterisation object: the network gives D - x."""

    def denoiser(self, network, labels):
        def denoise(x, sigma, step=None):
            return x + network(x.float(), sigma.float().expand(len(x)), labels).to(x.dtype)

        return denoise

    def identity(self):
        return {"preconditioning": "own"}
'''

KINDS: dict[str, str] = {
    "denoiser": 'Network(exact), "denoiser"',
    "edm": 'Network(preconditioned(lambda t: (4 * t).exp())), "edm"',
    "edm, 250log": 'Network(preconditioned(lambda t: (t / 250).exp())), "edm", c_noise="250log"',
    "edm, a function": 'Network(preconditioned(lambda t: t**3)), "edm", c_noise=lambda sigma: sigma ** (1 / 3)',
    "consistency": 'Network(preconditioned(lambda t: (t / 250).exp(), 0.02)), "consistency"',
    "eps": 'Network(diffusion(lambda data, noise, a: noise)), "eps"',
    "eps, a table": 'Network(diffusion(lambda data, noise, a: noise)), "eps", alphas=ALPHAS',
    "v": 'Network(diffusion(lambda data, noise, a: a**0.5 * noise - (1 - a) ** 0.5 * data)), "v"',
    "x0 with alphas": 'Network(diffusion(lambda data, noise, a: data)), "x0", alphas=torch.from_numpy(ALPHAS)',
    "x0 with data at 0": 'Network(flow(0, lambda data, noise: data)), "x0", data_at=0',
    "x0 with data at 1": 'Network(flow(1, lambda data, noise: data)), "x0", data_at=1',
    "velocity with data at 0": 'Network(flow(0, lambda data, noise: noise - data)), "velocity", data_at=0',
    "velocity with data at 1": 'Network(flow(1, lambda data, noise: data - noise)), "velocity", data_at=1',
    "an object": "Network(lambda x, sigma: exact(x, sigma) - x), Own()",
}
MEAN, DEVIATION, SIGMA_MIN, SIGMA_MAX = 0.3, 0.4, 0.02, 80.0


def exact_solution(x_T: Tensor) -> Tensor:
    """Of dx/dsigma = (x - D(x, sigma)) / sigma from sigma_max to 0."""
    return MEAN + (x_T - MEAN) * DEVIATION / math.sqrt(DEVIATION**2 + SIGMA_MAX**2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_samples_the_exact_solution(kind: str, write: Write) -> None:
    source = f"{GAUSSIAN}\ndef make(weights):\n"
    source += f"    return Model({KINDS[kind]}, shape=(3, 4, 4), sigma_min={SIGMA_MIN}, sigma_max={SIGMA_MAX})\n"
    x, labels = sampled(job(write(source), steps=200))
    assert labels is None
    x_T = philox_normals(42, torch.arange(4), 0, (3, 4, 4)) * SIGMA_MAX
    assert (x - exact_solution(x_T)).abs().max() < 2e-3


# Labels, guidance, weights.

LABELLED = """
import torch
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.arange(5.0) / 10)

    def forward(self, x, sigma, y):
        assert y.dtype == torch.int64 and y.shape == (len(x),)
        return self.means[y][:, None, None, None].expand_as(x)


class Rows(Network):
    def forward(self, x, sigma, y):
        assert y.dtype == torch.float32 and y.shape == (len(x), 4)
        return (y @ self.means[:4])[:, None, None, None].expand_as(x)

"""
"""The data of class k is k / 10, and that of the null label 4 is 0.4, or 0 where labels are rows."""


@pytest.mark.parametrize("rows", [False, True], ids=["numbers", "one-hot rows"])
def test_labels_arrive_as_the_network_wants_them(rows: bool, write: Write) -> None:
    made = f"Rows(), 'denoiser', (1, 2, 2), 4, one_hot={rows}" if rows else "Network(), 'denoiser', (1, 2, 2), 4"
    x, labels = sampled(job(write(f"{LABELLED}\ndef make(weights):\n    return Model({made})"), labels="3,0,2"))
    assert labels is not None
    assert labels.tolist() == [3, 0, 2, 3]
    torch.testing.assert_close(x[:, 0, 0, 0], labels / 10)


@pytest.mark.parametrize(("rows", "null"), [(False, 0.4), (True, 0.0)], ids=["numbers", "one-hot rows"])
def test_the_null_label_guides(rows: bool, null: float, write: Write) -> None:
    network = "Rows()" if rows else "Network()"
    module = write(
        f"{LABELLED}\ndef make(weights):\n"
        f"    return Model({network}, 'denoiser', (1, 2, 2), 4, null_label=4, one_hot={rows})"
    )
    x, labels = sampled(job(module, guidance=1.5))
    assert labels is not None
    torch.testing.assert_close(x[:, 0, 0, 0], null + 1.5 * (labels / 10 - null))


@pytest.mark.parametrize(("classes", "null", "noted"), [(5, 4, "give num_classes=4"), (5, 2, "of none$"), (4, 4, None)])
def test_a_null_label_that_is_sampled_as_a_class_is_noted(
    classes: int, null: int, noted: str | None, write: Write
) -> None:
    made = f"Model(Network(), 'denoiser', (1, 2, 2), {classes}, null_label={null})"
    note = job(write(f"{LABELLED}\ndef make(weights):\n    return {made}")).networks["main"].note
    assert (
        note is None if noted is None else re.search(f"null_label {null} is one of its 5 classes.*{noted}", note or "")
    )


def test_without_a_null_label_guidance_is_refused(write: Write) -> None:
    module = write(f"{LABELLED}\ndef make(weights):\n    return Model(Network(), 'denoiser', (1, 2, 2), 4)")
    with pytest.raises(RequestError, match="no null label"):
        job(module, guidance=1.5)


def test_the_weights_file_is_passed_on_and_told_apart(write: Write, tmp_path: Path) -> None:
    module = write(
        LABELLED
        + """
def make(weights):
    network = Network()
    if weights is not None:
        network.load_state_dict(torch.load(weights))
    return Model(network, "denoiser", (1, 2, 2), 4)
"""
    )
    torch.save({"means": torch.full((5,), 0.7)}, tmp_path / "w.pt")
    with_file = job(module, weights="w.pt")
    assert (sampled(with_file)[0] == torch.tensor(0.7)).all()
    assert with_file.fingerprint != job(module).fingerprint


def test_a_guide_has_separate_weights(write: Write, tmp_path: Path) -> None:
    module = write(
        LABELLED
        + """
def make(weights):
    network = Network()
    network.load_state_dict(torch.load(weights))
    return Model(network, "denoiser", (1, 2, 2), 4)
"""
    )
    for name, mean in (("w", 0.7), ("g", 0.2)):
        torch.save({"means": torch.full((5,), mean)}, tmp_path / f"{name}.pt")
    guide: dict[str, Any] = {"guide": f"python:{module}:make", "guidance": 2.0}
    made = job(module, weights="w.pt", guide_weights="g.pt", **guide)
    means = {role: network.build("fp32").network.means[0].item() for role, network in made.networks.items()}  # type: ignore[union-attr,index]
    assert means == pytest.approx({"main": 0.7, "guide": 0.2})
    assert made.fingerprint != job(module, weights="w.pt", guide_weights="w.pt", **guide).fingerprint
    with pytest.raises(RequestError, match=r"^--guide_weights is g\.pt"):
        job(module, weights="w.pt", guide_weights="g.pt", guidance=2.0, guide="digits")


def test_what_is_fingerprinted(write: Write) -> None:
    """Weights, shape, kind, name and tag; the function's code is not."""
    source = LABELLED + "\ndef make(weights):\n    return Model(Network(), {}, (1, {}, 2), 4)\n"
    module = write(source.format("'denoiser'", 2))
    first = job(module)
    assert first.identity["family"] == "python"
    assert first.identity["model"] == f"{module}:make"
    other = [
        job(module, tag="new"),
        job(write(source.format("'edm'", 2))),
        job(write(source.format("'denoiser'", 3))),
        job(write(source.format("'denoiser'", 2))),
    ]
    assert len({made.fingerprint for made in (first, *other)}) == 5
    assert Path(first.output).name == f"{module}-make-{first.fingerprint[:8]}"


def test_flags_that_contradict_the_model_are_refused_with_both_values(write: Write) -> None:
    module = write(f"{LABELLED}\ndef make(weights):\n    return Model(Network(), 'denoiser', (1, 2, 2), 4)")
    job(module, image_size=2, class_cond=True, num_classes=4)
    for flags, both in (({"num_classes": 7}, ("7", "4")), ({"image_size": 64}, ("64", "2"))):
        with pytest.raises(RequestError) as refused:
            job(module, **flags)
        for value in both:
            assert value in str(refused.value)


def test_half_precision_is_that_of_autocast_on_the_cpu_too(write: Write) -> None:
    module = write(
        """
import torch
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        torch.nn.init.constant_(self.layer.weight, 1 / 3)
        torch.nn.init.constant_(self.layer.bias, 0.1)

    def forward(self, x, sigma):
        assert x.dtype == torch.float32
        output = self.layer(x)
        self.seen = output.dtype
        return output


def make(weights):
    return Model(Network(), "denoiser", (1, 2, 2))
"""
    )
    results = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        made = job(module, precision=precision, steps=3)
        network: Any = made.networks["main"].build(made.precision)
        with torch.inference_mode():
            results[precision] = sample_block({"main": network}, made.plan, torch.arange(2))[0]
        assert network.network.seen == dtype
        assert results[precision].dtype == torch.float32
    difference = (results["fp32"] - results["bf16"]).abs().max()
    assert 0 < difference < 0.02 * results["fp32"].abs().max()
