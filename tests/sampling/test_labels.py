"""The label of a sample is a function of its index, and of the seed if it is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_sampler.errors import RequestError
from ray_sampler.sampling.conditions import LabelRule, listed_labels
from ray_sampler.sampling.noise import make_draws
from ray_sampler.sampling.options import NoiseOptions

Words = tuple[int, int, int, int]


def labels_of(rule: LabelRule, seed: int, indices: torch.Tensor) -> torch.Tensor:
    return rule.at(make_draws(NoiseOptions(seed=seed), 10, indices, (1, 2, 2)), indices)


def test_random_labels_equal_an_independent_computation(reference_philox: Callable[[Words, int], Words]) -> None:
    indices = [0, 1, 2, 511, 2**32 - 1, 2**32, 10**12]
    expected = [reference_philox((0, 0xFFFFFFFF, i % 2**32, i // 2**32), 42)[0] * 1000 // 2**32 for i in indices]
    labels = labels_of(LabelRule("random", 1000), 42, torch.tensor(indices))
    assert labels.dtype == torch.int64
    assert labels.tolist() == expected


def test_random_labels_reach_every_class_about_equally_often() -> None:
    n, classes = 20000, 10
    counts = np.bincount(labels_of(LabelRule("random", classes), 42, torch.arange(n)).numpy(), minlength=classes)
    assert len(counts) == classes
    chi_square = float(((counts - n / classes) ** 2 / (n / classes)).sum())
    assert chi_square < 21.7, "9 degrees of freedom, 1 %"


def test_random_labels_follow_the_seed() -> None:
    rule, indices = LabelRule("random", 1000), torch.arange(100)
    assert not torch.equal(labels_of(rule, 0, indices), labels_of(rule, 1, indices))


@given(indices=st.lists(st.integers(0, 10**12), min_size=1), num_classes=st.integers(1, 2000))
def test_balanced_labels_are_the_index_modulo_the_classes(indices: list[int], num_classes: int) -> None:
    labels = labels_of(LabelRule("balanced", num_classes), 42, torch.tensor(indices))
    assert labels.tolist() == [i % num_classes for i in indices]


@given(values=st.lists(st.integers(0, 9), min_size=1), indices=st.lists(st.integers(0, 10**12), min_size=1))
def test_listed_labels_are_repeated(values: list[int], indices: list[int]) -> None:
    labels = labels_of(listed_labels(np.array(values), 10, "a list"), 42, torch.tensor(indices))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [values[i % len(values)] for i in indices]


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["random", "balanced", "listed"]),
    indices=st.lists(st.integers(0, 10**12), min_size=1, max_size=8),
)
def test_a_label_depends_on_its_index_alone(kind: Literal["random", "balanced", "listed"], indices: list[int]) -> None:
    rule = listed_labels(np.array([4, 1, 7]), 10, "a list") if kind == "listed" else LabelRule(kind, 10)
    together = labels_of(rule, 42, torch.tensor(indices)).tolist()
    assert together == [int(labels_of(rule, 42, torch.tensor([i]))) for i in indices]
    assert all(0 <= label < 10 for label in together)


@pytest.mark.parametrize(("values", "position"), [([0, 10], 1), ([0, 3, -1, 99], 2), ([1000], 0)])
def test_a_label_out_of_range_is_refused(values: list[int], position: int) -> None:
    with pytest.raises(RequestError) as refused:
        listed_labels(np.array(values), 10, "labels.npy")
    assert str(refused.value) == (
        f"--labels labels.npy has {values[position]} at position {position}; labels must be from 0 to 9"
    )


@pytest.mark.parametrize("values", [np.zeros(0, np.int64), np.zeros((2, 2), np.int64), np.int64(3)])
def test_what_is_not_a_list_is_refused(values: np.ndarray) -> None:
    with pytest.raises(RequestError, match=r"--labels labels.npy holds no list of labels"):
        listed_labels(np.asarray(values), 10, "labels.npy")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_any_integer_type_gives_the_same_labels_and_identity(dtype: type) -> None:
    rule = listed_labels(np.array([0, 3, 9], dtype), 10, "a list")
    assert rule.identity() == listed_labels(np.array([0, 3, 9]), 10, "another").identity()
    assert labels_of(rule, 42, torch.arange(3)).tolist() == [0, 3, 9]


def test_the_identity_separates_rules_and_values() -> None:
    rules = [
        LabelRule("random", 10),
        LabelRule("balanced", 10),
        listed_labels(np.array([1, 2]), 10, "a list"),
        listed_labels(np.array([2, 1]), 10, "a list"),
        listed_labels(np.array([1, 2, 1]), 10, "a list"),
    ]
    assert len({str(sorted(rule.identity().items())) for rule in rules}) == len(rules)
