"""The loss component against plain autograd, written out position by position."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchtitan.components.loss import CrossEntropyLoss

from nitp_titan.errors import UserError
from nitp_titan.objectives.alignment import has_next_token
from nitp_titan.objectives.loss import AuxiliaryLoss
from nitp_titan.objectives.nitp import find_distance
from nitp_titan.objectives.registry import build_objective
from nitp_titan.objectives.settings import NITPConfig

B, L, D, V = 2, 16, 8, 32
IGNORE = -100


def _batch():
    generator = torch.Generator().manual_seed(3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7], [*range(10), *range(6)]])
    labels = torch.randint(0, V, (B, L), generator=generator)
    labels[0, 2] = labels[0, 15] = labels[1, 4] = labels[1, 9] = IGNORE
    h, z = torch.randn(2, B, L, D, generator=generator)
    head = torch.randn(V, D, generator=generator) * 0.3
    return h, z, head, positions, labels


def _projector(settings: NITPConfig) -> torch.nn.Module:
    projector = build_objective(settings).module_config(D).projector.build()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return projector


def _component(
    settings: NITPConfig,
    *,
    num_chunks: int = 2,
    weight: float | None = None,
    positions: torch.Tensor | None = None,
):
    """Loss and gradients as the component computes them; the trainer's counting is repeated here."""
    h, z, head, packed, labels = _batch()
    positions = packed if positions is None else positions
    h.requires_grad_()
    z.requires_grad_(not settings.stop_gradient)
    lm_head = torch.nn.Linear(D, V, bias=False)
    lm_head.weight.data.copy_(head)
    projector = _projector(settings)
    loss_fn = AuxiliaryLoss.Config(num_chunks=num_chunks, loss_fn=CrossEntropyLoss.Config(), nitp=settings).build()
    loss_fn.set_lm_head(lm_head)
    loss_fn.attach(projector, num_microbatches=1, device=torch.device("cpu"))
    num_terms = torch.tensor(float(len(_terms(settings, positions, labels))))
    loss_fn.begin_step(weight=settings.weight if weight is None else weight, num_terms=num_terms)
    if settings.objective == "nitp":
        if settings.temporal_shift == 0:
            prediction = (h * 1, z * 1, z[:, :0], torch.ones(B, L, dtype=torch.bool))
        else:
            prediction = (h * 1, z * 1, torch.zeros(B, 1, D), has_next_token(positions))
    else:
        prediction = h * 1
    loss, _ = loss_fn(prediction, labels, (labels != IGNORE).sum())
    loss.backward()
    gradients = {"h": h.grad, "head": lm_head.weight.grad, "z": z.grad}
    gradients |= {name: parameter.grad for name, parameter in projector.named_parameters()}
    return loss.detach(), loss_fn.losses[0], gradients


def _terms(settings, positions, labels):
    """Every (row, position, target position) that the objective trains; rows for the regulariser."""
    if settings.objective == "cosine_regularizer":
        return [row for row in range(B) if (labels[row] != IGNORE).sum() >= 2]
    terms = []
    for row in range(B):
        for t in range(L):
            if labels[row, t] == IGNORE:
                continue
            if settings.temporal_shift == 0:
                terms.append((row, t, t))
            elif t + 1 < L and positions[row, t + 1] == positions[row, t] + 1:
                terms.append((row, t, t + 1))
    return terms


def _distance(settings, prediction, target):
    if settings.loss == "cosine":
        return 1 - prediction @ target / (prediction.norm() * target.norm())
    if settings.loss == "mse":
        return ((prediction - target) ** 2).mean()
    if settings.loss == "smooth_l1":
        difference = (prediction - target).abs()
        return torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    teacher, student = target.softmax(0), prediction.softmax(0)
    return (teacher * (teacher.log() - student.log())).sum()


def _naive(settings: NITPConfig, *, weight: float | None = None):
    h, z, head, positions, labels = _batch()
    for leaf in (h, z, head):
        leaf.requires_grad_()
    projector = _projector(settings)

    def project(x):
        if settings.projector == "none" or settings.objective == "cosine_regularizer":
            return x
        return projector.w2.weight @ (F.silu(projector.w1.weight @ x) * (projector.w3.weight @ x))

    losses = [
        -(head @ h[row, t]).log_softmax(0)[labels[row, t]]
        for row in range(B)
        for t in range(L)
        if labels[row, t] != IGNORE
    ]
    ntp = torch.stack(losses).mean()
    terms = []
    for term in _terms(settings, positions, labels):
        if settings.objective == "cosine_regularizer":
            states = [h[term, t] / h[term, t].norm() for t in range(L) if labels[term, t] != IGNORE]
            pairs = [a @ b for i, a in enumerate(states) for j, b in enumerate(states) if i != j]
            terms.append(torch.stack(pairs).mean())
        else:
            row, t, successor = term
            target = z[row, successor].detach() if settings.stop_gradient else z[row, successor]
            terms.append(_distance(settings, project(h[row, t]), target))
    auxiliary = torch.stack(terms).mean()
    (ntp + (settings.weight if weight is None else weight) * auxiliary).backward()
    gradients = {"h": h.grad, "head": head.grad, "z": z.grad}
    gradients |= {name: parameter.grad for name, parameter in projector.named_parameters()}
    return ntp.detach(), auxiliary.detach(), gradients


def _assert_same(ours: torch.Tensor | None, naive: torch.Tensor | None, name: str) -> None:
    assert (ours is None) == (naive is None), name
    if naive is not None:
        assert (ours - naive).norm() <= 1e-5 * naive.norm(), name


SETTINGS = {
    "default": {},
    "mse": {"loss": "mse"},
    "smooth_l1": {"loss": "smooth_l1"},
    "kl": {"loss": "kl"},
    "same position": {"temporal_shift": 0},
    "no projector": {"projector": "none"},
    "narrow projector": {"projector_width": 1.5},
    "no stop-gradient": {"stop_gradient": False},
    "regularizer": {"objective": "cosine_regularizer"},
}


@pytest.mark.parametrize("num_chunks", [1, 4, 8])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_every_gradient_equal_plain_autograd(name, num_chunks):
    settings = NITPConfig(weight=3.0, target_layer=1, **SETTINGS[name])
    loss, parts, gradients = _component(settings, num_chunks=num_chunks)
    ntp, auxiliary, expected = _naive(settings)
    torch.testing.assert_close(parts, torch.stack([ntp, auxiliary]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, ntp + 3.0 * auxiliary, rtol=1e-5, atol=1e-6)
    for key in expected:
        _assert_same(gradients[key], expected[key], key)


@pytest.mark.parametrize(
    ("dim", "vocab_size", "num_chunks", "expected"),
    [
        (1280, 152064, 8, 1),
        (3072, 152064, 8, 2),
        (4096, 32000, 8, 8),
        (96, 4096, 8, 2),
        (96, 4096, 6, 1),
        (96, 4096, 1, 1),
    ],
)
def test_the_projector_takes_as_few_chunks_as_need_no_more_memory_than_the_logits(
    dim, vocab_size, num_chunks, expected
):
    """Eight numbers of its width of 4 d a token against five of the vocabulary; in chunks that divide those of the NTP
    loss."""
    settings = NITPConfig(weight=1.0, target_layer=1)
    loss_fn = AuxiliaryLoss.Config(num_chunks=num_chunks, loss_fn=CrossEntropyLoss.Config(), nitp=settings).build()
    with torch.device("meta"):
        loss_fn.set_lm_head(torch.nn.Linear(dim, vocab_size, bias=False))
        projector = build_objective(settings).module_config(dim).projector.build()
    loss_fn.attach(projector, num_microbatches=1, device=torch.device("cpu"))
    assert loss_fn.num_auxiliary_chunks == expected


def test_the_comparison_can_fail():
    """A loss that trains across document borders does not pass for the right one."""
    settings = NITPConfig(weight=3.0, target_layer=1)
    _, parts, gradients = _component(settings, positions=torch.arange(L).expand(B, L))
    _, auxiliary, expected = _naive(settings)
    assert abs(parts[1] - auxiliary) > 1e-3
    assert (gradients["h"] - expected["h"]).norm() > 1e-2 * expected["h"].norm()


def test_before_the_start_step_the_term_is_measured_and_not_trained():
    settings = NITPConfig(weight=3.0, target_layer=1)
    loss, parts, gradients = _component(settings, weight=0.0)
    _, auxiliary, _ = _naive(settings)
    _, _, without = _naive(settings, weight=0.0)
    torch.testing.assert_close(parts[1], auxiliary, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, parts[0])
    _assert_same(gradients["h"], without["h"], "h")
    assert all(gradients[f"{name}.weight"].abs().max() == 0 for name in ("w1", "w2", "w3"))


@pytest.mark.parametrize("projector", ["swiglu", "none"])
def test_the_gradients_of_both_losses_are_added_in_float32_and_rounded_once(projector):
    """Each loss's own gradient of h comes out of a bfloat16 product; what they add up to loses nothing more than the
    last rounding. A sum in bfloat16 of two numbers of that type is just that."""
    settings = NITPConfig(weight=0.05, target_layer=1, projector=projector)
    h, z, head, positions, labels = (x.bfloat16() if x.is_floating_point() else x for x in _batch())
    target = z, torch.zeros(B, 1, D, dtype=z.dtype), has_next_token(positions)

    def gradient(*, weight: float, tokens: float) -> torch.Tensor:
        lm_head = torch.nn.Linear(D, V, bias=False, dtype=torch.bfloat16)
        lm_head.weight.data.copy_(head)
        loss_fn = AuxiliaryLoss.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config(), nitp=settings).build()
        loss_fn.set_lm_head(lm_head)
        loss_fn.attach(_projector(settings).bfloat16(), num_microbatches=1, device=torch.device("cpu"))
        loss_fn.begin_step(weight=weight, num_terms=torch.tensor(20))
        leaf = h.clone().requires_grad_()
        loss, _ = loss_fn((leaf * 1, *target), labels, torch.tensor(tokens))
        loss.backward()
        return leaf.grad

    ntp, nitp = gradient(weight=0.0, tokens=20.0), gradient(weight=0.05, tokens=float("inf"))
    both = gradient(weight=0.05, tokens=20.0)
    assert ntp.abs().max() > 0 and nitp.abs().max() > 0
    assert (nitp.abs() < ntp.abs() / 128).any()
    assert torch.equal(both, (ntp.double() + nitp.double()).bfloat16())


def _not_per_position(prediction, target):
    return (prediction - target).square().mean(-1) - prediction.mean(dim=(0, 1, 2))


LOSSES_OF_USERS = {
    "scalar": (lambda p, t: (p - t).square().mean(), r"returns \[\] for \[2, 3, 8\]"),
    "every_element": (lambda p, t: (p - t).square(), r"returns \[2, 3, 8\] for \[2, 3, 8\]"),
    "number": (lambda p, t: 1.0, r"returns float"),
    "no_gradient": (lambda p, t: (p - t).detach().square().mean(-1), r"fails: RuntimeError: element 0 of tensors does"),
    "unused": (lambda p, t: t.clone().requires_grad_().mean(-1), r"fails: RuntimeError: The differentiated Tensor"),
    "infinite": (lambda p, t: (p - t).square().mean(-1) / 0, r"is not finite for random numbers"),
    "one_argument": (lambda p: p.mean(-1), r"fails: TypeError: .*takes 1 positional argument but 2 were given"),
    "mixing": (_not_per_position, r"mixes positions, which may be of different documents"),
}


@pytest.mark.parametrize("name", LOSSES_OF_USERS)
def test_a_function_that_is_no_distance_is_refused_when_the_settings_are_read(monkeypatch, name):
    function, message = LOSSES_OF_USERS[name]
    monkeypatch.setitem(sys.modules, "losses_of_users", SimpleNamespace(**{name: function}))
    place = f"losses_of_users:{name}"
    with pytest.raises(UserError, match=rf"^\[nitp\] loss = '{place}' {message}.*\. It takes prediction"):
        find_distance(place)


def test_a_function_that_is_a_distance_is_taken(monkeypatch):
    module = SimpleNamespace(fine=lambda p, t: (p - t).abs().sum(-1))
    monkeypatch.setitem(sys.modules, "losses_of_users", module)
    assert find_distance("losses_of_users:fine") is module.fine


def test_a_batch_without_valid_positions_costs_nothing():
    settings = NITPConfig(weight=3.0, target_layer=1)
    loss_fn = AuxiliaryLoss.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config(), nitp=settings).build()
    loss_fn.set_lm_head(torch.nn.Linear(D, V, bias=False))
    projector = _projector(settings)
    loss_fn.attach(projector, num_microbatches=1, device=torch.device("cpu"))
    loss_fn.begin_step(weight=3.0, num_terms=torch.tensor(0))
    h = torch.randn(1, 4, D, requires_grad=True)
    labels = torch.full((1, 4), IGNORE)
    valid = torch.zeros(1, 4, dtype=torch.bool)
    loss, _ = loss_fn((h * 1, torch.randn(1, 4, D), torch.zeros(1, 1, D), valid), labels, torch.tensor(1))
    loss.backward()
    assert loss.item() == 0.0 and h.grad.abs().max() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in projector.parameters())


def test_parts_keep_the_last_micro_batches_only():
    settings = NITPConfig(weight=3.0, target_layer=1)
    loss_fn = AuxiliaryLoss.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config(), nitp=settings).build()
    loss_fn.set_lm_head(torch.nn.Linear(D, V, bias=False))
    loss_fn.attach(_projector(settings), num_microbatches=2, device=torch.device("cpu"))
    loss_fn.begin_step(weight=3.0, num_terms=torch.tensor(10))
    seen = []
    for seed in range(5):
        h, z = torch.randn(2, 1, 4, D, generator=torch.Generator().manual_seed(seed))
        h.requires_grad_()
        labels = torch.zeros(1, 4, dtype=torch.long)
        valid = has_next_token(torch.arange(4)[None])
        loss, _ = loss_fn((h * 1, z, torch.zeros(1, 1, D), valid), labels, torch.tensor(8))
        seen.append(loss.item())
    totals = loss_fn.losses[:, 0] + 3.0 * loss_fn.losses[:, 1]
    assert totals.tolist() == pytest.approx([seen[4], seen[3]])
