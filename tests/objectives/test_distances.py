import math
from typing import get_args, get_type_hints

import pytest
import torch

from nitp_titan.objectives.distances import (
    cosine_loss,
    direction,
    DISTANCES,
    kl_loss,
    mse_loss,
    nitp_loss_sum,
    smooth_l1_loss,
)
from nitp_titan.objectives.registry import OBJECTIVES
from nitp_titan.objectives.settings import LOSS_NAMES, NITPConfig

SIZES = [0.0, 1e-40, 2e-38, 1e-25, 1e-10, 1.0, 1e10, 1e25, 3e38]


def _cosine_loss_and_gradient(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Closed form in float64 for one pair of vectors; a vector below float32's normal numbers has no direction."""
    x, y = prediction.double(), target.double()
    if min(x.norm(), y.norm()) < torch.finfo(torch.float32).tiny:
        return torch.ones((), dtype=torch.float64), torch.zeros_like(x)
    u, v = x / x.norm(), y / y.norm()
    return 1 - u @ v, -(v - (u @ v) * u) / x.norm()


def _plain_unit(x: torch.Tensor) -> torch.Tensor:
    """Without regard to sizes whose squares float32 cannot hold."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)


def test_losses_have_the_values_of_their_closed_forms():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0])
    assert cosine_loss(x, y).item() == pytest.approx(1.0)
    assert cosine_loss(x, -2 * x).item() == pytest.approx(2.0)
    assert cosine_loss(x, 5 * x).item() == pytest.approx(0.0, abs=1e-6)
    assert mse_loss(x, y).item() == pytest.approx((1 + 49) / 2)
    assert smooth_l1_loss(x, y).item() == pytest.approx((0.5 + 6.5) / 2)
    teacher, student = (math.exp(4) / (math.exp(4) + math.exp(-3)), math.exp(3) / (math.exp(3) + math.exp(4)))
    kl = teacher * math.log(teacher / student) + (1 - teacher) * math.log((1 - teacher) / (1 - student))
    assert kl_loss(x, y).item() == pytest.approx(kl, rel=1e-5)


def test_settings_know_all_distances_and_objectives_though_they_import_no_torch():
    assert list(DISTANCES) == list(LOSS_NAMES)
    assert list(OBJECTIVES) == list(get_args(get_type_hints(NITPConfig)["objective"]))


@pytest.mark.parametrize("loss", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_float32_and_finite_for_zero_and_huge_vectors(loss, dtype):
    rows = torch.tensor([[0.0, 0.0, 0.0], [3e4, -3e4, 1.0], [1e-6, 0.0, -1e-6]], dtype=dtype)
    prediction = rows[None].clone().requires_grad_()
    target = rows.flip(0)[None]
    total = nitp_loss_sum(prediction, target, torch.ones(1, 3, dtype=torch.bool), DISTANCES[loss])
    total.backward()
    assert total.dtype == torch.float32 and torch.isfinite(total)
    assert torch.isfinite(prediction.grad).all()


def test_a_zero_vector_costs_one_and_moves_nothing_under_cosine():
    prediction = torch.zeros(1, 1, 4, requires_grad=True)
    total = nitp_loss_sum(prediction, torch.ones(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))
    total.backward()
    assert total.item() == 1.0 and prediction.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("target_size", SIZES)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_cosine_of_vectors_of_any_size_is_that_of_float64(target_size, mixed):
    """In bfloat16, whose range is float32's; mixed: with one entry of another size in every vector."""
    rows, targets = torch.randn(2, len(SIZES), 64, generator=torch.Generator().manual_seed(0))
    rows, targets = (x / x.abs().amax(1, keepdim=True) for x in (rows, targets))
    prediction = (rows * torch.tensor(SIZES)[:, None]).bfloat16()
    target = (targets * target_size).bfloat16()
    if mixed:
        prediction[:, 3], target[:, 5] = 1e-3, 1e3
    leaf = prediction.clone().requires_grad_()
    total = nitp_loss_sum(leaf[None], target[None], torch.ones(1, len(SIZES), dtype=torch.bool))
    total.backward()
    pairs = [_cosine_loss_and_gradient(*pair) for pair in zip(prediction, target)]
    losses, gradients = (torch.stack(values) for values in zip(*pairs))
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert leaf.grad.isfinite().all()
    for found, expected in zip(leaf.grad.double(), gradients):
        # Rounded to bfloat16; what is smaller than that type's normal numbers is lost.
        assert (found - expected).norm() <= 2.0**-8 * expected.norm() + 1e-37


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e4, 1e12])
def test_the_direction_of_ordinary_vectors_keeps_every_bit_and_so_does_its_gradient(size):
    vectors = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)) * size
    vectors[0, 3] = 0.0
    seen = []
    for unit in (lambda x: direction(x)[0], _plain_unit):
        x = vectors.clone().requires_grad_()
        found = unit(x)
        found[..., ::2].sum().backward()
        seen.append((found.detach(), x.grad))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*seen))
    assert seen[0][1].abs().max() > 0


def _plain_sum(prediction, target, valid):
    """As `nitp_loss_sum`, differentiated by autograd."""
    return torch.where(valid, cosine_loss(prediction.float(), target.float()), 0.0).sum()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e25])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)])
def test_the_closed_form_of_the_cosine_has_the_loss_and_both_gradients_of_autograd(dtype, rounding, size):
    generator = torch.Generator().manual_seed(3)
    pair = [(torch.randn(2, 16, 64, generator=generator) * scale).to(dtype) for scale in (size, 3.0)]
    valid = torch.rand(2, 16, generator=generator) < 0.7
    results = []
    for function in (nitp_loss_sum, _plain_sum):
        prediction, target = (x.clone().requires_grad_() for x in pair)
        total = function(prediction, target, valid)
        (total * 0.3).backward()
        results.append((total.detach(), prediction.grad, target.grad))
    (total, *gradients), (expected_total, *expected) = results
    assert total.item() == pytest.approx(expected_total.item(), rel=1e-6)
    for found, plain in zip(gradients, expected):
        assert found.dtype == dtype and found.isfinite().all()
        assert (found[~valid] == 0).all()
        assert (found - plain).float().norm() <= rounding * plain.float().norm()


def test_the_closed_form_keeps_nothing_in_float32_that_came_in_bfloat16():
    kept = []
    prediction = torch.randn(1, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    target, valid = torch.randn(1, 8, 64, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        nitp_loss_sum(prediction, target, valid)
    assert max(x.numel() for x in kept if x.dtype == torch.float32) <= 8
    assert {x.data_ptr() for x in kept if x.numel() == 512} == {prediction.data_ptr(), target.data_ptr()}


@pytest.mark.parametrize("loss", [cosine_loss, nitp_loss_sum])
def test_the_cosine_compiles_to_the_same_numbers(loss):
    rows = torch.tensor([[0.0] * 8, [3e38] * 8, [1e-30] * 8, [*map(float, range(8))]])[None].requires_grad_()
    target = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    extra = () if loss is cosine_loss else (torch.tensor([[True, True, True, True]]),)
    eager = loss(rows, target, *extra)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(rows, target, *extra)
    torch.testing.assert_close(compiled, eager)
    expected, found = (torch.autograd.grad(value.sum(), rows)[0] for value in (eager, compiled))
    torch.testing.assert_close(found, expected)


def test_only_valid_positions_count():
    prediction_BLD, target_BLD = torch.randn(2, 1, 6, 4)
    valid_BL = torch.tensor([[True, False, True, True, False, False]])
    total = nitp_loss_sum(prediction_BLD, target_BLD, valid_BL)
    expected = sum(1 - torch.cosine_similarity(prediction_BLD[0, i], target_BLD[0, i], dim=0) for i in (0, 2, 3))
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


class TestHessian:
    """paper.md section 2: curvature of the cosine loss without projector."""

    @pytest.fixture
    def case(self):
        generator = torch.Generator().manual_seed(0)
        h, z = torch.randn(2, 7, dtype=torch.float64, generator=generator)
        hessian = torch.autograd.functional.hessian(lambda x: cosine_loss(x, z), h)
        r = h.norm()
        u, v = h / r, z / z.norm()
        return hessian, r, u, v, u @ v

    def test_matches_the_closed_form(self, case):
        hessian, r, u, v, s = case
        a = v - s * u
        eye = torch.eye(len(u), dtype=u.dtype)
        expected = (s * (eye - torch.outer(u, u)) + torch.outer(u, a) + torch.outer(a, u)) / r**2
        torch.testing.assert_close(hessian, expected)

    def test_has_no_radial_curvature(self, case):
        hessian, _, u, _, _ = case
        assert abs(u @ hessian @ u) < 1e-12

    def test_lifts_every_direction_orthogonal_to_the_state_by_s_over_r_squared(self, case):
        hessian, r, u, _, s = case
        for seed in range(5):
            w = torch.randn(len(u), dtype=u.dtype, generator=torch.Generator().manual_seed(seed))
            w = w - (w @ u) * u
            torch.testing.assert_close(w @ hessian @ w, s / r**2 * (w @ w))
