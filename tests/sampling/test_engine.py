"""A sample is a pure function of weights, settings, seed and index: how it was batched must not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ray_sampler.networks.adm_options import AdmOptions, TrainingMode
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.conditions import LabelRule, listed_labels
from ray_sampler.sampling.engine import (
    Engine,
    NonFiniteError,
    Pictures,
)
from ray_sampler.sampling.finish import UNDECODED, to_uint8
from ray_sampler.sampling.noise import make_draws
from ray_sampler.sampling.numerics import numerics_key
from ray_sampler.sampling.options import NoiseOptions
from ray_sampler.sampling.parameterisation import clipped, parameterise
from ray_sampler.sampling.plan import MAIN, SamplePlan
from tests.sampling.plans import plan, solve

N, BATCH, SIZE = 18, 4, 8
CPU = torch.device("cpu")
CHURN = {"s_churn": 2.0, "s_noise": 1.003}
LABELS = LabelRule("random", 10)


def architecture(class_cond: bool) -> AdmOptions:
    return AdmOptions(
        image_size=SIZE,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1",
        attention_resolutions="8",
        num_head_channels=32,
        class_cond=class_cond,
        num_classes=10,
    )


def tiny_network(class_cond: bool) -> UNet:
    """A network with random weights, those that training begins at 0 among them."""
    random = torch.Generator().manual_seed(0)
    network = UNet(architecture(class_cond)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * (0.1 if parameter.ndim > 1 else 0.5))
    return network


NETWORK, UNCONDITIONAL = tiny_network(True), tiny_network(False)


def engine(network: Any = NETWORK, *, batch_size: int = BATCH, cores: int = 1) -> Engine:
    return Engine({MAIN: network}, batch_size=batch_size, device=CPU, compile="off", cores=cores)


def planned(labels: LabelRule | None = LABELS, *, num_samples: int = N, **flags: Any) -> SamplePlan:
    return plan(labels, image_size=SIZE, num_samples=num_samples, **({"steps": 3} | CHURN | flags))


def all_pictures(network: Any = NETWORK, *, batch_size: int = BATCH, cores: int = 1, **arguments: Any) -> Pictures:
    return engine(network, batch_size=batch_size, cores=cores).sample(planned(**arguments), 0, N)()


GENERATORS = ("philox", "determ", "determ-indiv")


@pytest.fixture(scope="module")
def whole() -> dict[str, Pictures]:
    """All N samples in one range, by generator."""
    return {generator: all_pictures(generator=generator) for generator in GENERATORS}


def test_pictures_have_their_documented_types(whole: dict[str, Pictures]) -> None:
    pictures = whole["philox"]
    assert pictures.columns["image"].dtype == np.uint8
    assert pictures.columns["image"].shape == (N, SIZE, SIZE, 3)
    assert pictures.columns["label"].dtype == np.int32
    assert pictures.columns["label"].shape == (N,)
    assert pictures.seconds > 0


def test_the_test_pictures_differ(whole: dict[str, Pictures]) -> None:
    """Equal bytes below would mean nothing if all samples were alike."""
    for pictures in whole.values():
        assert len({image.tobytes() for image in pictures.columns["image"]}) == N
        assert pictures.columns["image"].std() > 20


@pytest.mark.parametrize("generator", GENERATORS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_range_gives_the_same_bytes_however_it_was_cut(
    generator: str, data: st.DataObject, whole: dict[str, Pictures]
) -> None:
    start = data.draw(st.integers(0, N - 1))
    stop = data.draw(st.integers(start + 1, N))
    pictures = engine().sample(planned(generator=generator), start, stop)()
    expected = whole[generator]
    assert pictures.columns["image"].tobytes() == expected.columns["image"][start:stop].tobytes()
    assert pictures.columns["label"].tolist() == expected.columns["label"][start:stop].tolist()


def test_ranges_begun_before_earlier_ones_are_awaited_give_the_same_bytes(whole: dict[str, Pictures]) -> None:
    one = engine()
    pending = [one.sample(planned(), start, min(start + 8, N)) for start in range(0, N, 8)]
    images = np.concatenate([finish().columns["image"] for finish in pending])
    assert images.tobytes() == whole["philox"].columns["image"].tobytes()


def test_every_block_has_the_same_shape_the_last_one_too() -> None:
    batches = []

    def network(x: torch.Tensor, times: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batches.append((tuple(x.shape), tuple(times.shape), tuple(y.shape)))
        return NETWORK(x, times, y)

    pictures = engine(network).sample(planned(), 5, N)()
    assert len(pictures.columns["image"]) == N - 5
    assert set(batches) == {((BATCH, 3, SIZE, SIZE), (BATCH,), (BATCH,))}


def test_more_samples_change_no_earlier_one(whole: dict[str, Pictures]) -> None:
    more = engine().sample(planned(num_samples=N + 9), 0, N + 9)()
    assert more.columns["image"][:N].tobytes() == whole["philox"].columns["image"].tobytes()


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("batch_size", [1, 3, 7, N])
def test_another_batch_size_stays_within_one_grey_level(
    batch_size: int, generator: str, whole: dict[str, Pictures]
) -> None:
    pictures = all_pictures(batch_size=batch_size, generator=generator)
    expected = whole[generator]
    assert np.abs(pictures.columns["image"].astype(int) - expected.columns["image"]).max() <= 1
    assert pictures.columns["label"].tolist() == expected.columns["label"].tolist()


@pytest.mark.parametrize("cores", [2, 3])
def test_neither_cores_nor_the_callers_threads_change_a_bit(cores: int, whole: dict[str, Pictures]) -> None:
    """Convolutions on two threads add up in another order, so an engine computes each block on one."""
    torch.set_num_threads(2)
    assert all_pictures(cores=cores).columns["image"].tobytes() == whole["philox"].columns["image"].tobytes()


@pytest.mark.parametrize("sampler", ["heun", "onestep", "multistep"])
@pytest.mark.parametrize("training_mode", ["edm", "consistency_training"])
def test_pictures_are_those_of_the_solver(training_mode: TrainingMode, sampler: str) -> None:
    flags: dict[str, Any] = {
        "training_mode": training_mode,
        "sampler": sampler,
        "ts": "0,1,2",
        "seed": 7,
        "s_churn": 0.0,
    }
    indices = torch.arange(4, 8)
    draws = make_draws(NoiseOptions(seed=7), N, indices, (3, SIZE, SIZE))
    kind = parameterise("edm", c_noise="250log") if training_mode == "edm" else parameterise("consistency")
    with torch.no_grad():
        denoise = clipped(kind.denoiser(NETWORK, LABELS.at(draws, indices)))
        x = solve(planned(**flags), denoise, draws.noise)
    expected = to_uint8(x, "truncate").numpy()
    assert engine().sample(planned(**flags), 4, 8)().columns["image"].tobytes() == expected.tobytes()


def test_one_engine_computes_several_plans_and_none_changes_another(whole: dict[str, Pictures]) -> None:
    one = engine()
    for seed in (43, 42):
        pictures = one.sample(planned(seed=seed), 0, N)()
    assert pictures.columns["image"].tobytes() == whole["philox"].columns["image"].tobytes()


def test_the_seed_decides_pictures_and_labels(whole: dict[str, Pictures]) -> None:
    other, expected = all_pictures(seed=43), whole["philox"]
    assert other.columns["image"].tobytes() != expected.columns["image"].tobytes()
    assert other.columns["label"].tolist() != expected.columns["label"].tolist()


def test_an_unconditional_model_has_no_labels() -> None:
    assert all_pictures(UNCONDITIONAL, labels=None).columns.keys() == {"image"}


def test_listed_labels_reach_the_network_and_the_result() -> None:
    rule = listed_labels(np.array([3, 0, 9]), 10, "a list")
    pictures = all_pictures(labels=rule)
    assert pictures.columns["label"].tolist() == [3, 0, 9] * (N // 3)
    always_three = all_pictures(labels=listed_labels(np.array([3]), 10, "a list"))
    same = [
        a.tobytes() == b.tobytes()
        for a, b in zip(pictures.columns["image"], always_three.columns["image"], strict=True)
    ]
    assert same == [True, False, False] * (N // 3)


# Results that are not finite.


def poisoned(change: Callable[[UNet], None]) -> UNet:
    network = tiny_network(True)
    with torch.no_grad():
        change(network)
    return network


def poison_class_7(network: UNet) -> None:
    network.label_emb.weight[7] = torch.nan


def poison_output(network: UNet) -> None:
    network.get_parameter("out.2.bias").fill_(torch.inf)


RULE_WITH_7 = listed_labels(np.array([0, 1, 7, 2, 3, 7]), 10, "a list")


@pytest.mark.parametrize("generator", GENERATORS)
def test_samples_that_are_not_finite_are_named_and_no_others(generator: str) -> None:
    one = engine(poisoned(poison_class_7))
    with pytest.raises(NonFiniteError) as failed:
        one.sample(planned(RULE_WITH_7, generator=generator), 3, 13)()
    assert str(failed.value) == "the network gave non-finite values for 3 of the samples 3 to 12: 5, 8, 11"


def test_values_that_the_solver_or_the_finisher_spoils_are_not_said_of_the_network() -> None:
    def spoiled(denoise: Any, x: Tensor, sigmas: Tensor, noise: Any, options: Any) -> Tensor:
        x = denoise(x, sigmas[0])
        x[1] = torch.nan
        return denoise(x, sigmas[1])  # of which the network makes NaN

    plan = planned(clip_denoised=False)
    with pytest.raises(NonFiniteError) as failed:
        engine().sample(replace(plan, solver=plan.solver._replace(run=spoiled)), 0, 4)()
    assert str(failed.value) == (
        "solver heun made non-finite values of the network's finite ones for 1 of the samples 0 to 3: 1; give other "
        "levels, or --state fp64"
    )
    finisher = UNDECODED._replace(finish=lambda x, networks: {"image": (x / 0).permute(0, 2, 3, 1)})
    with pytest.raises(
        NonFiniteError, match=r"^the finisher made non-finite values of the solver's finite results for 4"
    ):
        engine().sample(replace(plan, finisher=finisher), 0, 4)()


def test_infinities_that_clipping_hides_are_found() -> None:
    with pytest.raises(NonFiniteError, match=r"for 10 of the samples 0 to 9: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$"):
        engine(poisoned(poison_output)).sample(planned(clip_denoised=True), 0, 10)()


def test_neighbours_outside_the_range_may_be_not_finite(whole: dict[str, Pictures]) -> None:
    """Sample 2 is computed in the block of samples 0 and 1, and does not matter there."""
    rule = planned(RULE_WITH_7)
    pictures = engine(poisoned(poison_class_7)).sample(rule, 0, 2)()
    assert pictures.columns["image"].tobytes() == engine().sample(rule, 0, 2)().columns["image"].tobytes()


def every_value() -> np.ndarray:
    """(1, 3, 40, 40) float32 around and past [-1, 1], the borders between grey levels among them."""
    borders = (np.arange(256, dtype=np.float32) / np.float32(127.5)) - 1
    halves = ((np.arange(256, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5)) - 1
    spread = np.linspace(-1.2, 1.2, 3 * 40 * 40 - 512, dtype=np.float32)
    return np.concatenate([borders, halves, spread]).reshape(1, 3, 40, 40)


def test_truncation_is_that_of_numpy() -> None:
    x = every_value()
    expected = ((x + 1) * np.float32(127.5)).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert (to_uint8(torch.from_numpy(x), "truncate").numpy() == expected).all()


def test_rounding_to_nearest_is_that_of_numpy() -> None:
    x = every_value()
    expected = (x * np.float32(127.5) + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert (to_uint8(torch.from_numpy(x), "nearest").numpy() == expected).all()


@pytest.mark.parametrize(
    ("value", "truncated", "nearest"), [(-1.0, 0, 0), (1.0, 255, 255), (0.0, 127, 128), (0.9999, 254, 255)]
)
def test_the_two_roundings_differ_as_documented(value: float, truncated: int, nearest: int) -> None:
    x = torch.full((1, 3, 1, 1), value)
    assert to_uint8(x, "truncate").flatten().tolist() == [truncated] * 3
    assert to_uint8(x, "nearest").flatten().tolist() == [nearest] * 3


def test_the_engine_follows_the_rounding_asked_for(whole: dict[str, Pictures]) -> None:
    nearest = all_pictures(rounding="nearest").columns["image"].astype(int)
    difference = nearest - whole["philox"].columns["image"]
    assert set(np.unique(difference)) == {0, 1}


def test_the_numerics_key_names_what_decides_the_last_bits() -> None:
    key = numerics_key(CPU, 16, "fp32", "off")
    assert torch.__version__ in key
    assert torch.backends.cpu.get_cpu_capability() in key
    others = {
        numerics_key(CPU, 8, "fp32", "off"),
        numerics_key(CPU, 16, "bf16", "off"),
        numerics_key(CPU, 16, "fp32", "on"),
    }
    assert len(others | {key}) == 4
