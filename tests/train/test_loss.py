from __future__ import annotations

from typing import get_args

import pytest
import torch

from stillroom.kernels.sparse_kd import MISSING_MASS
from stillroom.kernels.targets import SparseTargets
from stillroom.train import dense_kd
from stillroom.train.batch import Batch
from stillroom.train.config import LossName, MissingMass
from stillroom.train.dense_kd import dense_kd_loss
from stillroom.train.loss import LOSSES, Objective

B, L, V = 3, 5, 41
N = B * L


def _logits(seed: int, width: int = V) -> torch.Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)) * 3


def _batch(teacher_NV: torch.Tensor) -> Batch:
    """Full-support targets of a teacher; one row carries no label."""
    labels = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(9))
    labels[1, 2] = -100
    p = teacher_NV.double().softmax(-1).float()
    targets = SparseTargets(
        offsets=torch.arange(N + 1) * V,
        ids=torch.arange(V, dtype=torch.int32).repeat(N),
        weights=p.flatten(),
        label_logp=torch.zeros(N),
        entropy=torch.zeros(N),
    )
    return Batch(torch.zeros(B, L, dtype=torch.int64), labels, labels != -100, targets)


def _truth(z_NV: torch.Tensor, teacher_NV: torch.Tensor, labels_N: torch.Tensor, alpha: float) -> torch.Tensor:
    live = labels_N != -100
    logq, logp = z_NV.log_softmax(-1), teacher_NV.double().log_softmax(-1)
    kd = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    ce = torch.nn.functional.cross_entropy(z_NV, labels_N.clamp(min=0), reduction="none")
    return ((1 - alpha) * kd + alpha * ce)[live].sum() / live.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows_of_a_chunk", [N, 4])
def test_dense_kd_is_its_definition(alpha: float, rows_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_kd, "CHUNK_BYTES", 4 * V * rows_of_a_chunk)
    teacher, labels = _logits(1), _batch(_logits(1)).labels_BL.flatten()
    exact = _logits(0).double().requires_grad_()
    truth = _truth(exact, teacher, labels, alpha)
    truth.backward()
    ours = _logits(0).requires_grad_()
    loss = dense_kd_loss(ours, teacher, labels, alpha=alpha).loss
    loss.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)
    assert ours.grad[labels == -100].abs().max() == 0


def test_dense_kd_with_tokens_the_teacher_excludes() -> None:
    teacher = _logits(1)
    teacher[:, 7] = -torch.inf
    ours = _logits(0).requires_grad_()
    out = dense_kd_loss(ours, teacher, torch.zeros(N, dtype=torch.int64))
    out.loss.backward()
    p, q = teacher.softmax(-1), ours.detach().softmax(-1)
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(ours.grad, (q - p) / N, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_full_support_targets_and_a_live_teacher_give_one_gradient(alpha: float) -> None:
    teacher = _logits(1)
    batch = _batch(teacher)
    rows = float(batch.mask_BL.sum())
    grads, losses = [], []
    for name in ("forward_kl", "full_kd"):
        leaf = _logits(0).requires_grad_()
        terms = Objective(name, V, alpha=alpha, teacher=lambda tokens: teacher)(leaf * 1.0, batch, rows)  # type: ignore[arg-type]
        terms.loss.backward()
        losses.append(terms.loss.item())
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", get_args(LossName))
def test_logits_beyond_the_vocabulary_play_no_part(name: LossName) -> None:
    teacher, batch = _logits(1), _batch(_logits(1))
    narrow, wide = _logits(0).requires_grad_(), torch.cat([_logits(0), _logits(2, 7) + 20], 1).requires_grad_()
    for leaf in (narrow, wide):
        Objective(name, V, teacher=lambda tokens: teacher)(leaf * 1.0, batch, 14.0).loss.backward()
    assert narrow.grad is not None
    assert wide.grad is not None
    assert torch.equal(wide.grad[:, :V], narrow.grad)
    assert wide.grad[:, V:].abs().max() == 0


@pytest.mark.parametrize("name", get_args(LossName))
def test_unequal_micro_batches_add_up_to_the_whole(name: LossName) -> None:
    """Sequences 0 and 1 hold 9 rows with a label, sequence 2 holds 5: a mean of means would be off by 5 %."""
    teacher, batch = _logits(1), _batch(_logits(1))
    assert batch.targets is not None
    leaf = _logits(0).requires_grad_()
    rows = float(batch.mask_BL.sum())
    whole = Objective(name, V, alpha=0.25 if name != "ce" else 0.0, teacher=lambda t: teacher)(leaf * 1.0, batch, rows)
    (whole_grad,) = torch.autograd.grad(whole.loss, leaf)
    total = torch.zeros(())
    for first, stop in ((0, 2), (2, 3)):
        n = slice(first * L, stop * L)
        e = slice(first * L * V, stop * L * V)
        t = batch.targets
        cut = SparseTargets(
            t.offsets[n.start : n.stop + 1] - e.start, t.ids[e], t.weights[e], t.label_logp[n], t.entropy[n]
        )
        part = Batch(batch.tokens_BL[first:stop], batch.labels_BL[first:stop], batch.mask_BL[first:stop], cut)
        objective = Objective(
            name,
            V,
            alpha=0.25 if name != "ce" else 0.0,
            teacher=lambda tokens, n=n: teacher[n],  # type: ignore[misc]
        )
        terms = objective(leaf[n] * 1.0, part, rows)
        terms.loss.backward()
        total += terms.loss.detach()
    torch.testing.assert_close(leaf.grad, whole_grad, rtol=1e-5, atol=1e-8)
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-6)


def test_names_are_the_kernels() -> None:
    assert get_args(MissingMass) == MISSING_MASS  # config.py must not import torch to know them
    assert set(LOSSES) == set(get_args(LossName))
