"""Geometry against closed forms and against numpy on the states themselves."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy_geometry import Largest, numpy_stats

from nitp_titan.geometry.statistics import (
    average_cosine,
    covariance,
    describe,
    effective_rank,
    Moments,
    participation_ratio,
    rankme,
    sampled_cosine,
    spectrum,
)


def moments_of(*clouds: torch.Tensor, valid: torch.Tensor | None = None) -> Moments:
    """Moments of some tokens, added cloud by cloud."""
    total = Moments.zeros(clouds[0].shape[-1])
    for cloud in clouds:
        total.add(cloud, torch.ones(len(cloud), dtype=torch.bool) if valid is None else valid)
    return total


def gaussian(tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed))


CLOUDS = {
    "isotropic": gaussian(500, 24),
    "anisotropic": gaussian(500, 24) * torch.linspace(0.01, 3, 24),
    "one cone": gaussian(500, 24) * 0.05 + 1.0,
    "a cone so narrow that float32 sums would lose it": gaussian(400, 16).double() * 1e-5 + 1.0,
    "fewer tokens than dimensions": gaussian(10, 24),
    "two tokens": gaussian(2, 24),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_every_figure_equals_numpy_on_the_states(name):
    found = describe(moments_of(*CLOUDS[name].split(7)))
    for stat, expected in numpy_stats(CLOUDS[name].numpy()).items():
        assert_allclose(found[stat], expected, rtol=1e-5, err_msg=stat)


def test_bfloat16_states_give_the_figures_of_their_values():
    cloud = (gaussian(300, 16) + 0.5).bfloat16()
    found = describe(moments_of(cloud))
    for stat, expected in numpy_stats(cloud.float().numpy()).items():
        assert_allclose(found[stat], expected, rtol=1e-9, err_msg=stat)


def test_an_isotropic_gaussian_uses_every_direction():
    found = describe(moments_of(gaussian(50_000, 32)))
    assert 31.9 < found["effective_rank"] <= 32
    assert 31.9 < found["participation_ratio"] <= 32
    assert abs(found["cosine"]) < 1e-3


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_equal_orthogonal_directions_have_rank_k(k):
    """Plus and minus each of k axes: mean zero, k equal eigenvalues."""
    axes = torch.eye(12)[:k]
    found = describe(moments_of(torch.cat([axes, -axes])))
    for stat in ("effective_rank", "participation_ratio", "rankme"):
        assert_allclose(found[stat], k, rtol=1e-12)


def test_rank_k_data_off_the_origin_never_exceeds_k():
    k = 3
    cloud = gaussian(400, k, seed=1) @ gaussian(k, 20, seed=2) + 7.0
    found = describe(moments_of(cloud))
    assert 1 < found["effective_rank"] <= k
    assert sum(share > 1e-6 for share in found["spectrum"]["share"]) == k


def test_mean_centring_separates_the_effective_rank_from_rankme():
    """A far cloud is one direction for the singular values and all of its directions for the covariance."""
    found = describe(moments_of(gaussian(5000, 8) + 1000.0))
    assert found["effective_rank"] > 7.9
    assert found["rankme"] < 1.1


def test_known_eigenvalues_give_the_known_entropy():
    # Shares 1/2, 1/4, 1/4: entropy 1.5 ln 2.
    assert_allclose(effective_rank(torch.tensor([2.0, 1.0, 1.0])).item(), 2**1.5, rtol=1e-6)
    assert_allclose(participation_ratio(torch.tensor([2.0, 1.0, 1.0])).item(), 16 / 6, rtol=1e-6)
    # Square roots 2, 1, 1: the same shares.
    assert_allclose(rankme(torch.tensor([4.0, 1.0, 1.0])).item(), 2**1.5, rtol=1e-6)


def test_tokens_on_a_cone_have_the_cosine_of_its_angle():
    """(a, plus or minus b on each of n axes): cosine a^2 to other axes, a^2 - b^2 to the opposite token."""
    a, b, n = 0.8, 0.6, 5
    sides = torch.cat([torch.eye(n), -torch.eye(n)]) * b
    cloud = torch.cat([torch.full((2 * n, 1), a), sides], dim=1)
    pairs = 2 * n * (2 * n - 1)
    expected = ((pairs - 2 * n) * a**2 + 2 * n * (a**2 - b**2)) / pairs
    assert_allclose(average_cosine(moments_of(cloud)).item(), expected, rtol=1e-6)
    # Lengths do not matter.
    assert_allclose(average_cosine(moments_of(cloud * torch.arange(1, 11)[:, None])).item(), expected, rtol=1e-6)


def test_sampled_pairs_average_the_valid_ones():
    first, second = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert sampled_cosine(first, second, torch.tensor([True, True, False])).item() == 0.5
    assert sampled_cosine(first, second, torch.zeros(3, dtype=torch.bool)).item() == 0.0


POINTS = {
    "no token": torch.zeros(0, 6),
    "a single token": gaussian(1, 6),
    "a constant cloud": torch.full((50, 6), 0.1),
    "zeros": torch.zeros(50, 6),
    "huge": torch.full((3, 6), 3e38),
    "tiny": torch.full((3, 6), 1e-38),
}


@pytest.mark.parametrize("name", POINTS)
def test_a_point_uses_no_direction_and_no_figure_is_nan(name):
    cloud = POINTS[name]
    found = describe(moments_of(cloud))
    assert found["tokens"] == len(cloud)
    assert found["effective_rank"] == found["participation_ratio"] == 0.0
    assert_allclose(found["rankme"], 1.0 if cloud.count_nonzero() else 0.0, rtol=1e-6)
    same_direction = len(cloud) > 1 and bool(cloud.count_nonzero())
    assert_allclose(found["cosine"], 1.0 if same_direction else 0.0, rtol=1e-9)
    assert sum(found["spectrum"]["share"]) == 0


def test_zero_states_have_no_direction_and_count_as_cosine_zero():
    cloud = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert_allclose(average_cosine(moments_of(cloud)).item(), 2 / 6, rtol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_have_no_figures(bad):
    cloud = gaussian(20, 4)
    cloud[3, 2] = bad
    assert describe(moments_of(cloud)) is None


def test_what_does_not_count_is_left_out_even_if_it_is_not_finite():
    cloud = gaussian(20, 4)
    valid = torch.arange(20) % 3 != 0
    expected = describe(moments_of(cloud[valid]))
    cloud[~valid] = float("nan")
    assert describe(moments_of(cloud, valid=valid)) == expected


def test_sums_of_two_parts_are_the_sums_of_the_whole():
    cloud = gaussian(100, 6) + 0.3
    whole, parts = moments_of(cloud), [moments_of(part) for part in cloud.split(37)]
    for name, total in zip(("counts", "sum", "direction", "outer"), whole.tensors()):
        added = sum(part.tensors()[["counts", "sum", "direction", "outer"].index(name)] for part in parts)
        assert_allclose(added.numpy(), total.numpy(), rtol=1e-12, err_msg=name)


def test_memory_does_not_grow_with_the_number_of_tokens():
    dim, largest = 32, []
    for tokens in (4096, 40_000):
        cloud, valid, moments = gaussian(tokens, dim), torch.ones(tokens, dtype=torch.bool), Moments.zeros(dim)
        with Largest() as seen:
            moments.add(cloud, valid)
        largest.append(seen.bytes)
    assert largest[0] == largest[1] == 4096 * dim * 8


def test_the_spectrum_is_the_share_of_the_variance_by_rank():
    cloud = gaussian(5000, 300) * torch.logspace(0, -2, 300)
    found = describe(moments_of(cloud))["spectrum"]
    eigenvalues = np.linalg.eigvalsh(np.cov(cloud.double().numpy().T, bias=True))[::-1]
    assert found["rank"][0] == 1 and found["rank"][-1] == 300 and len(found["rank"]) <= 128
    expected = (eigenvalues / eigenvalues.sum())[np.array(found["rank"]) - 1]
    assert_allclose(found["share"], expected, rtol=1e-3)


def test_what_is_below_rounding_is_no_eigenvalue():
    second_moment = torch.diag(torch.tensor([1.0, 1e-10, 1e-18, -1e-18], dtype=torch.float64))
    assert spectrum(second_moment).tolist() == [1.0, 1e-10, 0.0, 0.0]
    assert spectrum(second_moment, scale=torch.tensor(1e6)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_covariance_is_that_of_numpy():
    cloud = gaussian(50, 5) + 2
    assert_allclose(covariance(moments_of(cloud)).numpy(), np.cov(cloud.double().numpy().T, bias=True), rtol=1e-10)
