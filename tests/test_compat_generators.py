"""The original's generators in code written for it: the same numbers for each sample, in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ray_sampler.compat as compat
from ray_sampler.compat import get_generator
from ray_sampler.config import RequestError


def seeded(name: str, num_samples: int, seed: int) -> compat.SeededGenerator:
    generator = get_generator(name, num_samples, seed)
    assert isinstance(generator, compat.SeededGenerator)
    return generator


def stream(seed: int, size: tuple[int, ...], calls: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(calls)]


def test_determ_takes_its_rows_from_one_stream_over_all_samples() -> None:
    expected = stream(7, (10, 3, 2, 2), 3)
    generator = seeded("determ", 10, 7)
    assert torch.equal(generator.randn(4, 3, 2, 2), expected[0][:4])
    assert torch.equal(generator.randn_like(torch.empty(4, 3, 2, 2)), expected[1][:4])
    generator.set_done_samples(4)
    assert generator.done_samples == 4
    assert torch.equal(generator.randn(4, 3, 2, 2), expected[0][4:8]), "moving begins the stream anew"
    generator.set_done_samples(8)
    assert torch.equal(generator.randn(4, 3, 2, 2), expected[0][[8, 9, 9, 9]]), "past the end the last row repeats"


def test_determ_indiv_has_a_stream_for_each_sample_that_continues() -> None:
    expected = [torch.stack(rows) for rows in zip(*(stream(i + 6 * 7, (1, 5), 3) for i in range(6)), strict=True)]
    generator = seeded("determ-indiv", 6, 7)
    assert torch.equal(generator.randn(2, 5), expected[0][:2, 0])
    assert torch.equal(generator.randn_like(torch.empty(2, 5)), expected[1][:2, 0])
    generator.set_done_samples(1)
    moved = generator.randn(2, 5)
    assert torch.equal(moved[0], expected[2][1, 0]), "sample 1 was drawn twice before"
    assert torch.equal(moved[1], expected[0][2, 0]), "sample 2 was not"


@pytest.mark.parametrize("name", ["determ", "determ-indiv"])
def test_rows_belong_to_samples_whatever_the_batch(name: str) -> None:
    whole = seeded(name, 6, 1).randn(6, 2, 3)
    for size in (1, 2, 3):
        generator = seeded(name, 6, 1)
        parts = []
        for start in range(0, 6, size):
            generator.set_done_samples(start)
            parts.append(generator.randn(size, 2, 3))
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["determ", "determ-indiv"])
def test_seeds_begin_streams_anew(name: str) -> None:
    generator, other = seeded(name, 4, 1), seeded(name, 4, 2)
    first = generator.randn(2, 3)
    generator.set_seed(2)
    assert torch.equal(generator.randn(2, 3), other.randn(2, 3))
    assert generator.get_seed() == 1
    generator.set_seed(1)
    assert torch.equal(generator.randn(2, 3), first)


@pytest.mark.parametrize("name", ["dummy", "determ", "determ-indiv"])
def test_whole_numbers_are_drawn_too(name: str) -> None:
    drawn = get_generator(name, 100, 3).randint(0, 5, (50, 2))
    assert drawn.shape == (50, 2)
    assert drawn.dtype == torch.int64
    assert set(drawn.unique().tolist()) == set(range(5))


@pytest.mark.parametrize(("name", "samples"), [("philox", 4), ("", 4), ("determ", 0)])
def test_a_generator_that_is_not_the_originals_is_refused(name: str, samples: int) -> None:
    with pytest.raises(RequestError):
        get_generator(name, samples)
