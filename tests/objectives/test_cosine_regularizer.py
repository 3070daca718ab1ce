import pytest
import torch

from nitp_titan.objectives.cosine_regularizer import cosine_regularizer_sum, direction_sums


def _mean_pair_cosine(h_LD: torch.Tensor) -> torch.Tensor:
    pairs = [
        torch.cosine_similarity(h_LD[i], h_LD[j], dim=0) for i in range(len(h_LD)) for j in range(len(h_LD)) if i != j
    ]
    return torch.stack(pairs).mean()


def test_the_regularizer_is_the_mean_cosine_over_all_pairs_with_its_gradient():
    h_BLD = torch.randn(2, 6, 5, dtype=torch.float64).float().requires_grad_()
    valid_BL = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    expected = _mean_pair_cosine(h_BLD[0]) + _mean_pair_cosine(h_BLD[1, [0, 1, 3]])
    (expected_gradient,) = torch.autograd.grad(expected, h_BLD)

    with torch.no_grad():
        sums = [direction_sums(h_BLD[:, part], valid_BL[:, part]) for part in (slice(0, 2), slice(2, 6))]
        directions, counts = (a + b for a, b in zip(*sums))
    value = sum(
        cosine_regularizer_sum(h_BLD[:, part], valid_BL[:, part], directions, counts)
        for part in (slice(0, 2), slice(2, 6))
    )
    (gradient,) = torch.autograd.grad(value, h_BLD)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_sequences_without_a_pair_cost_nothing():
    h_BLD = torch.randn(1, 3, 4)
    valid_BL = torch.tensor([[False, True, False]])
    value = cosine_regularizer_sum(h_BLD, valid_BL, *direction_sums(h_BLD, valid_BL))
    assert value.item() == 0.0
