"""The metrics by their definitions, computed here in another way, and the same bits however features are stored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ray_sampler.errors import RunError
from ray_sampler.scoring.features import DamagedFeaturesError, Held, StoredFeatures
from ray_sampler.scoring.metrics import ROWS, Moments, frechet, kid_part, kid_subsets, radii, reduce, within
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir

N, M, D, CLASSES = 2500, 1300, 24, 7
PRINT = "f" * 64


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Features like those of a network: correlated, and never below 0."""
    random = np.random.default_rng(0)
    mix = random.standard_normal((D, D)) / 4
    one, other = random.standard_normal((N, D)) @ mix, random.standard_normal((M, D)) @ mix * 1.1 + 0.1
    return np.maximum(one, 0).astype(np.float32), np.maximum(other, 0).astype(np.float32)


def head(features: np.ndarray) -> np.ndarray:
    return features @ np.random.default_rng(1).standard_normal((D, CLASSES)).astype(np.float32)


def stored(output: Path, features: np.ndarray, bounds: Sequence[int]) -> StoredFeatures:
    """Features as files of these ranges."""
    ranges, names = RunDir(str(output)).ranges("features/toy-00000000"), []
    for start, stop in pairwise(bounds):
        names.append(FragmentName(start, stop, "parquet"))
        ranges.write(names[-1], encode(Samples(start, {"features": features[start:stop]}), PRINT, {}, "parquet")[0])
    return StoredFeatures(str(output), "features/toy-00000000", PRINT, D, tuple(cover(names, bounds[-1])))


def test_moments_are_mean_and_covariance(sets) -> None:
    mu, sigma = reduce(Held(sets[0])).moments
    np.testing.assert_allclose(mu, sets[0].mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(sets[0].astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [N, D // 2], ids=["full rank", "fewer samples than features"])
def test_frechet_is_that_of_the_product_of_the_covariances(sets, samples: int) -> None:
    one, other = (reduce(Held(array)).moments for array in (sets[0][:samples], sets[1]))
    roots = np.sqrt(np.linalg.eigvals(one.sigma @ other.sigma).astype(complex)).real.sum()
    difference = one.mu - other.mu
    wanted = difference @ difference + np.trace(one.sigma) + np.trace(other.sigma) - 2 * roots
    assert frechet(one, other) == pytest.approx(wanted, rel=1e-6)
    assert frechet(other, one) == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_two_normal_distributions_on_a_line_is_known() -> None:
    one, other = Moments(np.array([1.0]), np.array([[4.0]])), Moments(np.array([-2.0]), np.array([[9.0]]))
    assert frechet(one, other) == pytest.approx((1 + 2) ** 2 + (2 - 3) ** 2)


def test_the_inception_score_is_the_exponential_of_the_mean_divergence_in_ten_splits(sets) -> None:
    logits = head(sets[0]).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    p = p[np.random.RandomState(2020).permutation(N)]
    scores = []
    for i in range(10):
        part = p[i * N // 10 : (i + 1) * N // 10]
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    assert reduce(Held(sets[0]), head).inception_score == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_kid_is_the_unbiased_estimate_over_subsets(sets) -> None:
    subsets = kid_subsets(N, M)
    assert len(subsets) == 100
    assert all(len(set(chosen)) == 1000 for pair in subsets for chosen in pair)
    assert [len(chosen) for chosen in kid_subsets(30, 20)[0]] == [20, 20]
    one, other = (array[chosen].astype(np.float64) for array, chosen in zip(sets, subsets[7], strict=True))
    kernels = [(a @ b.T / D + 1) ** 3 for a, b in ((one, one), (other, other), (one, other))]
    off = ~np.eye(1000, dtype=bool)
    wanted = kernels[0][off].mean() + kernels[1][off].mean() - 2 * kernels[2].mean()
    (value,) = kid_part(Held(sets[0]), Held(sets[1]), [subsets[7]])
    assert value == pytest.approx(wanted, rel=1e-9)


def test_precision_and_recall_count_who_lies_in_a_ball_of_the_other_set(sets) -> None:
    one, other = sets[0][:400], sets[1][:300]

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None].astype(np.float64) - b, axis=2)

    def balls(a: np.ndarray) -> np.ndarray:
        return np.sort(distances(a, a), axis=1)[:, 3]

    found = [radii(Held(array), 0) for array in (one, other)]
    for array, radius in zip((one, other), found, strict=True):
        np.testing.assert_allclose(np.sqrt(radius), balls(array), rtol=1e-4)
    inside = within(Held(one), 0, Held(other), found[1])
    np.testing.assert_array_equal(inside, (distances(one, other) <= balls(other)).any(axis=1))
    assert 0 < inside.mean() < 1


def test_precision_and_recall_are_computed_part_by_part(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = radii(Held(sets[0]), 0)
    inside = within(Held(sets[1]), 0, Held(sets[0]), whole)
    assert ROWS > N
    monkeypatch.setattr("ray_sampler.scoring.metrics.ROWS", 700)
    parts = np.concatenate([radii(Held(sets[0]), start) for start in range(0, N, 700)])
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    parts = np.concatenate([within(Held(sets[1]), start, Held(sets[0]), whole) for start in range(0, M, 700)])
    np.testing.assert_array_equal(parts, inside)


def test_stored_features_give_the_same_bits_whatever_files_they_are_in(sets, tmp_path: Path) -> None:
    given = reduce(Held(sets[0]), head)
    for name, bounds in (("one", [0, N]), ("uneven", [0, 1, 50, 1023, 1025, 2400, N]), ("50", range(0, N + 1, 50))):
        found = reduce(stored(tmp_path / name, sets[0], bounds), head)
        for array, wanted in zip(found.moments, given.moments, strict=True):
            np.testing.assert_array_equal(array, wanted)
        assert found.inception_score == given.inception_score


def test_files_that_overlap_or_leave_gaps_count_each_sample_once(sets, tmp_path: Path) -> None:
    whole = stored(tmp_path, sets[0], [0, 1000, N])
    stored(tmp_path, sets[0], [0, 600, 1500])
    names = [FragmentName(start, stop, "parquet") for start, stop in ((0, 600), (600, 1500), (1000, N))]
    overlapping = StoredFeatures(whole.output, whole.folder, PRINT, D, tuple(cover(names, N)))
    assert overlapping.count == N
    np.testing.assert_array_equal(np.concatenate(list(overlapping.blocks())), sets[0])
    gap = StoredFeatures(whole.output, whole.folder, PRINT, D, tuple(cover(names[::2], N)))
    rows = np.concatenate([sets[0][:600], sets[0][1000:]])
    assert gap.count == len(rows)
    np.testing.assert_array_equal(np.concatenate(list(gap.blocks())), rows)
    np.testing.assert_allclose(reduce(gap).moments.mu, rows.mean(axis=0, dtype=np.float64), rtol=1e-12)


def test_damaged_files_and_values_that_are_not_finite_are_told_apart(sets, tmp_path: Path) -> None:
    features = sets[0].copy()
    features[[777, 2000]] = np.inf
    with pytest.raises(RunError, match="not finite for 1 of the samples 0 to 999, the first of them 777"):
        reduce(stored(tmp_path, features, [0, 1000, N]))
    whole = stored(tmp_path, sets[0], [0, 1000, N])
    path = tmp_path / whole.folder / "000000001000-000000002500.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:9000] + bytes([data[9000] ^ 1]) + data[9001:])
    with pytest.raises(DamagedFeaturesError) as damage:
        reduce(whole)
    assert damage.value.name.filename == path.name
    path.unlink()
    with pytest.raises(DamagedFeaturesError, match="not there"):
        reduce(whole)
