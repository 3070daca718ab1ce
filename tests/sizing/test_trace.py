"""FLOPs and memory of steps whose stats fit in the head; on real tensors and on fake ones."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from nitp_titan.sizing.trace import preset_gradients, trace

KIB = 256  # float32 numbers
SCALAR = 4


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request):
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield


def _peak(step) -> float:
    """In KiB."""
    return trace(step).peak_bytes / 1024


def test_a_view_and_an_operation_in_place_cost_nothing():
    def step():
        x = torch.ones(2 * KIB)
        x.add_(1)
        x.view(2, KIB)[0].mul_(3)
        x[KIB:].t()

    assert _peak(step) == 2


def test_a_view_keeps_the_whole_storage():
    def step():
        part = torch.ones(4 * KIB)[:1]
        torch.ones(KIB)
        return part

    assert _peak(step) == 5


def test_what_is_freed_makes_room():
    def step():
        for _ in range(5):
            torch.ones(3 * KIB)
        torch.ones(2 * KIB)

    assert _peak(step) == 3


def test_what_was_there_before_does_not_count():
    x = torch.ones(8 * KIB)

    def step():
        x.add_(1)
        torch.mul(x, 2, out=x)
        return x + x

    assert _peak(step) == 8


def test_a_storage_without_memory_costs_nothing():
    """FSDP frees gathered parameters so, and fills them again."""

    def step():
        x = torch.ones(4 * KIB)
        x.untyped_storage().resize_(0)
        y = torch.ones(3 * KIB)
        x.untyped_storage().resize_(4 * 1024)
        return x, y, torch.ones(KIB)

    assert _peak(step) == 4 + 3 + 1


def test_a_cycle_keeps_its_tensors():
    """As in training, where TorchTitan collects garbage every fifty steps."""

    def step():
        for _ in range(3):
            cycle = [torch.ones(2 * KIB)]
            cycle.append(cycle)

    assert _peak(step) == 6


def _linears() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    return model, torch.ones(64, 16)


# Of the linears, in KiB: weights [16, 16] and states [64, 16].
WEIGHT, STATE = 1, 4


def test_a_chain_of_linears_keeps_the_inputs_of_all():
    model, x = _linears()
    preset_gradients(model)
    # The outputs of the first two are inputs. Peak: the last one's backward, gradients of weight and input beside them;
    # the loss and its gradient are scalars.
    cost = trace(lambda: model(x).sum().backward())
    assert cost.peak_bytes == 1024 * (2 * STATE + WEIGHT + STATE) + 2 * SCALAR


def test_gradients_count_unless_they_are_preset():
    model, x = _linears()
    one = x[:1].clone()
    preset_gradients(model)
    assert _peak(lambda: model(one).sum().backward()) == pytest.approx(WEIGHT, abs=0.3)
    model.zero_grad()
    assert _peak(lambda: model(one).sum().backward()) == pytest.approx(3 * WEIGHT, abs=0.3)


def test_products_of_a_chain_of_linears():
    model, x = _linears()
    # Three forward, three for the weights, two for the inputs: x needs no gradient.
    assert trace(lambda: model(x).sum().backward()).matmul_flops == 8 * 2 * 64 * 16 * 16


def _waves(x: torch.Tensor) -> torch.Tensor:
    for _ in range(6):
        x = x.sin()
    return x


def test_checkpointing_keeps_the_input_and_computes_again():
    def step(forward):
        x = torch.ones(KIB, requires_grad=True)
        x.grad = torch.zeros_like(x)
        forward(forward(x)).sum().backward()

    # x and its gradient, the inputs of all sines but the first, and in the last one's backward a cosine and a product.
    assert _peak(lambda: step(_waves)) == pytest.approx(2 + 11 + 2, abs=0.01)
    # x and its gradient, the input of the second half, the inputs in it that are computed again, cosine and product.
    again = _peak(lambda: step(lambda x: checkpoint(_waves, x, use_reentrant=False)))
    assert again == pytest.approx(2 + 1 + 5 + 2, abs=0.01)


def test_attention_is_counted_apart():
    def step():
        q, k, v = (torch.ones(1, 2, 16, 8, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    # Scores and values; backward: the scores again, and two products for each of them.
    assert (trace(step).matmul_flops, trace(step).attention_flops) == (0, (2 + 5) * 2 * 2 * 16 * 16 * 8)


def test_grouped_products_cost_the_same_however_rows_are_grouped():
    def step(*ends):
        rows = torch.ones(6, 16, dtype=torch.bfloat16, requires_grad=True)
        experts = torch.ones(3, 16, 8, dtype=torch.bfloat16, requires_grad=True)
        torch._grouped_mm(rows, experts, offs=torch.tensor(ends, dtype=torch.int32)).square().sum().backward()

    product = 2 * 6 * 16 * 8
    assert trace(lambda: step(2, 4, 6)).matmul_flops == trace(lambda: step(0, 6, 6)).matmul_flops == 3 * product
