"""Every random number is a function of where it is used: seed, sample index, draw and element."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_sampler.sampling.noise import (
    Noise,
    box_muller,
    make_draws,
    philox,
    philox_normals,
    random_labels,
)
from ray_sampler.sampling.options import Generator, NoiseOptions

Words = tuple[int, int, int, int]
ReferencePhilox = Callable[[Words, int], Words]

SEEDS = st.integers(0, 2**64 - 1)
INDICES = st.integers(0, 10**12)
DRAWS = st.integers(0, 1000)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
WORD = st.integers(0, 2**32 - 1)


def words_of(counter: Words, seed: int) -> Words:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    w0, w1, w2, w3 = philox((c0, c1, c2, c3), seed)
    return int(w0), int(w1), int(w2), int(w3)


def reference_normal(reference: ReferencePhilox, seed: int, index: int, draw: int, element: int) -> float:
    """The normal of one element, from Python integers and the math module."""
    words = reference((element // 4, draw, index % 2**32, index // 2**32), seed)
    pair = words[:2] if element % 4 < 2 else words[2:]
    radius = math.sqrt(-2 * math.log((pair[0] + 0.5) / 2**32))
    angle = 2 * math.pi * pair[1] / 2**32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


def make_noise(
    generator: Generator, seed: int, num_samples: int, indices: torch.Tensor, shape: tuple[int, ...]
) -> Noise:
    return make_draws(NoiseOptions(generator=generator, seed=seed), num_samples, indices, shape).noise


def phi(x: np.ndarray) -> np.ndarray:
    """The standard normal distribution function."""
    return np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_known_answers(
    counter: Words, seed: int, expected: Words, reference_philox: ReferencePhilox
) -> None:
    assert words_of(counter, seed) == expected
    assert reference_philox(counter, seed) == expected


@given(counter=st.tuples(WORD, WORD, WORD, WORD), seed=SEEDS)
def test_philox_words_are_those_of_unbounded_integers(
    counter: Words, seed: int, reference_philox: ReferencePhilox
) -> None:
    assert words_of(counter, seed) == reference_philox(counter, seed)


@settings(max_examples=50)
@given(seed=SEEDS, index=INDICES, draw=DRAWS, shape=SHAPES)
def test_normals_are_box_muller_of_philox_to_one_unit_in_the_last_place(
    seed: int, index: int, draw: int, shape: tuple[int, ...], reference_philox: ReferencePhilox
) -> None:
    normals = philox_normals(seed, torch.tensor([index]), draw, shape)
    assert normals.dtype == torch.float32
    assert normals.shape == (1, *shape)
    expected = np.array(
        [reference_normal(reference_philox, seed, index, draw, e) for e in range(math.prod(shape))], np.float32
    ).reshape(shape)
    assert (np.abs(normals[0].numpy() - expected) <= np.spacing(np.abs(expected))).all()


def test_seed_42_begins_with_the_numbers_of_the_specification() -> None:
    normals = philox_normals(42, torch.tensor([0]), 0, (3, 8, 8)).flatten()[:4]
    assert normals.tolist() == pytest.approx([-0.9701898, 0.1940190, -1.2356207, 1.9239267], abs=6e-8)


@settings(max_examples=50)
@given(seed=SEEDS, indices=st.lists(INDICES, min_size=1, max_size=6), draw=DRAWS, shape=SHAPES)
def test_a_row_depends_on_its_index_alone(seed: int, indices: list[int], draw: int, shape: tuple[int, ...]) -> None:
    together = philox_normals(seed, torch.tensor(indices), draw, shape)
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, philox_normals(seed, torch.tensor([index]), draw, shape)[0])


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 6, 7, 27])
def test_element_counts_need_not_be_multiples_of_four(elements: int) -> None:
    indices = torch.tensor([0, 7])
    assert torch.equal(philox_normals(1, indices, 2, (elements,)), philox_normals(1, indices, 2, (32,))[:, :elements])


def test_elements_run_in_c_order() -> None:
    indices = torch.tensor([5])
    assert torch.equal(
        philox_normals(1, indices, 0, (3, 4, 5)).flatten(), philox_normals(1, indices, 0, (60,)).flatten()
    )


@pytest.mark.parametrize("word", [0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1])
def test_the_extreme_words_give_exact_and_finite_normals(word: int) -> None:
    """u = (w + 0.5) / 2^32 never reaches 0 or 1."""
    r_cos, r_sin = box_muller(torch.tensor([word]), torch.tensor([2**29]))
    expected = math.sqrt(-2 * math.log1p(-(2**32 - word - 0.5) / 2**32)) * math.sqrt(0.5)
    assert r_cos.dtype == torch.float64
    assert (float(r_cos), float(r_sin)) == pytest.approx((expected, expected), rel=1e-6)


def test_normals_are_distributed_as_a_standard_normal() -> None:
    values = philox_normals(42, torch.arange(64), 0, (1024,)).double().flatten().numpy()
    n = values.size
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    ordered = phi(np.sort(values))
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.63, "Kolmogorov-Smirnov at the 1 % level"


@pytest.mark.parametrize(
    ("seed", "index", "draw"),
    [(43, 0, 0), (42 + 2**32, 0, 0), (42, 1, 0), (42, 2**32, 0), (42, 0, 1)],
)
def test_another_seed_index_or_draw_is_independent(seed: int, index: int, draw: int) -> None:
    n = 30000
    one = philox_normals(42, torch.tensor([0]), 0, (n,)).double()
    other = philox_normals(seed, torch.tensor([index]), draw, (n,)).double()
    assert abs(float((one * other).mean())) < 4 / math.sqrt(n)


def test_the_elements_of_a_sample_are_independent() -> None:
    values = philox_normals(42, torch.arange(30), 0, (1000,)).double()
    for lag in (1, 2, 3, 4):
        assert abs(float((values[:, lag:] * values[:, :-lag]).mean())) < 4 / math.sqrt(values[:, lag:].numel())


def test_philox_draws_come_in_any_order() -> None:
    noise = make_noise("philox", 42, 10, torch.tensor([3, 1]), (3, 2, 2))
    late, early = noise(5), noise(0)
    assert torch.equal(late, philox_normals(42, torch.tensor([3, 1]), 5, (3, 2, 2)))
    assert torch.equal(early, philox_normals(42, torch.tensor([3, 1]), 0, (3, 2, 2)))


def test_philox_does_not_depend_on_the_number_of_samples() -> None:
    indices = torch.tensor([0, 9])
    few, many = (make_noise("philox", 42, n, indices, (3, 2, 2)) for n in (10, 10**6))
    assert torch.equal(few(1), many(1))


@settings(max_examples=50)
@given(seed=SEEDS, indices=st.lists(INDICES, min_size=1, max_size=6), num_classes=st.integers(1, 2000))
def test_random_labels_are_the_scaled_first_word_of_their_own_draw(
    seed: int, indices: list[int], num_classes: int, reference_philox: ReferencePhilox
) -> None:
    labels = random_labels(seed, torch.tensor(indices), num_classes)
    assert labels.tolist() == [
        reference_philox((0, 0xFFFFFFFF, i % 2**32, i // 2**32), seed)[0] * num_classes // 2**32 for i in indices
    ]


# The generators of earlier runs.

SHAPE = (3, 4, 4)
N = 7


def draws_by_hand(generator: Generator, seed: int, count: int) -> list[torch.Tensor]:
    """Draws 0 to count - 1 of all N samples, from torch's generators."""
    if generator == "determ":
        one = torch.Generator().manual_seed(seed)
        return [torch.randn(N, *SHAPE, generator=one) for _ in range(count)]
    each = [torch.Generator().manual_seed(i + N * seed) for i in range(N)]
    return [torch.cat([torch.randn(1, *SHAPE, generator=g) for g in each]) for _ in range(count)]


EARLIER = pytest.mark.parametrize("generator", ["determ", "determ-indiv", "dummy"])


@EARLIER
def test_the_draws_are_those_of_torch_generators(generator: Generator) -> None:
    noise = make_noise(generator, 42, N, torch.arange(N), SHAPE)
    for draw, expected in enumerate(draws_by_hand(generator, 42, 4)):
        assert torch.equal(noise(draw), expected)


@EARLIER
@settings(max_examples=20)
@given(cuts=st.sets(st.integers(1, N - 1)), seed=st.integers(0, 2**32))
def test_row_i_belongs_to_sample_i_whatever_the_batches(generator: Generator, cuts: set[int], seed: int) -> None:
    bounds = [0, *sorted(cuts), N]
    noises = [make_noise(generator, seed, N, torch.arange(a, b), SHAPE) for a, b in pairwise(bounds)]
    for draw, expected in enumerate(draws_by_hand(generator, seed, 3)):
        assert torch.equal(torch.cat([noise(draw) for noise in noises]), expected)


@EARLIER
def test_a_skipped_draw_advances_the_stream(generator: Generator) -> None:
    by_hand = draws_by_hand(generator, 42, 7)
    noise = make_noise(generator, 42, N, torch.arange(N), SHAPE)
    for draw in (0, 3, 4, 6):
        assert torch.equal(noise(draw), by_hand[draw])


@EARLIER
def test_the_first_draw_may_be_skipped(generator: Generator) -> None:
    noise = make_noise(generator, 42, N, torch.arange(N), SHAPE)
    assert torch.equal(noise(2), draws_by_hand(generator, 42, 3)[2])


@EARLIER
@pytest.mark.parametrize("again", [0, 1, 2])
def test_asking_a_stream_to_go_back_is_an_error(generator: Generator, again: int) -> None:
    noise = make_noise(generator, 42, N, torch.arange(N), SHAPE)
    noise(2)
    with pytest.raises(ValueError, match=f"draw {again} .* after draw 2"):
        noise(again)


@EARLIER
def test_indices_past_the_end_repeat_the_last_sample(generator: Generator) -> None:
    noise = make_noise(generator, 42, N, torch.tensor([N - 2, N - 1, N, N + 5]), SHAPE)
    for draw, expected in enumerate(draws_by_hand(generator, 42, 2)):
        assert torch.equal(noise(draw), expected[[N - 2, N - 1, N - 1, N - 1]])
