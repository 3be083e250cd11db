"""The dense loss: value and gradient are those of its definition in float64, and those of a sparse target that keeps every id."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stillroom.kernels.dense_kd import dense_kd_loss, reference
from stillroom.kernels.sparse_kd import DIVERGENCES, TargetSplit, sparse_kd_loss
from stillroom.kernels.targets import SparseTargets, tempered

N, V = 15, 41


def logits(seed: int) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * 3


def labels() -> Tensor:
    found = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))
    found[7] = -100
    return found


def every_id(teacher_NV: Tensor, labels_N: Tensor) -> SparseTargets:
    logp_NV = teacher_NV.double().log_softmax(-1)
    return SparseTargets(
        offsets=torch.arange(N + 1) * V,
        ids=torch.arange(V, dtype=torch.int32).repeat(N),
        weights=logp_NV.exp().float().flatten(),
        label_logp=logp_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0].float(),
        entropy=torch.zeros(N),
        logp=logp_NV.float().flatten(),
    )


def definition(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Textbook divergences of rows, beta 0.3, skew 0.2."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = 0.3 * p + 0.7 * q
            return 0.3 * kl(p, m) + 0.7 * kl(q, m)
        case "skew_kl":
            return kl(p, 0.2 * p + 0.8 * q)
        case "skew_reverse_kl":
            return kl(q, 0.8 * p + 0.2 * q)
    return (p - q).abs().sum(-1) / 2


@pytest.mark.parametrize("rows_of_a_chunk", [N, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_it_is_its_definition(
    name: str, alpha: float, temperature: float, rows_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * V * rows_of_a_chunk)
    label_N, live_N = labels(), labels() != -100
    exact = logits(0).double().requires_grad_()
    p, q = ((z / temperature).softmax(-1) for z in (logits(1).double(), exact))
    kd_N = definition(name, p, q) * temperature**2
    ce_N = functional.cross_entropy(exact, label_N.clamp(min=0), reduction="none")
    truth = ((1 - alpha) * kd_N + alpha * ce_N)[live_N].sum() / live_N.sum()
    truth.backward()
    ours = logits(0).requires_grad_()
    out = dense_kd_loss(
        ours, logits(1), label_N, alpha=alpha, divergence=name, beta=0.3, skew=0.2, temperature=temperature
    )
    out.loss.backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(out.kd_N, (kd_N * live_N).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-3, atol=1e-6)
    assert ours.grad[7].abs().max() == 0


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_sparse_target_of_every_id_is_the_same(name: str) -> None:
    grads = []
    for temperature in (1.0, 2.0):
        sparse, dense = logits(0).requires_grad_(), logits(0).requires_grad_()
        targets = every_id(logits(1), labels())
        if temperature != 1.0:
            targets = tempered(targets, temperature)
        one = sparse_kd_loss(sparse, targets, labels(), alpha=0.2, divergence=name, temperature=temperature)
        other = dense_kd_loss(dense, logits(1), labels(), alpha=0.2, divergence=name, temperature=temperature)
        assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-4)
        one.loss.backward()
        other.loss.backward()
        grads.append((sparse.grad, dense.grad))
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_split_is_that_of_the_sparse_loss(alpha: float) -> None:
    """Random factors of the two parts; one row's teacher is nearly sure of its label."""
    teacher = logits(1)
    teacher[3, labels()[3]] = 25.0
    generator = torch.Generator().manual_seed(3)
    split = TargetSplit(torch.rand(N, generator=generator), torch.rand(N, generator=generator))
    sparse, dense = logits(0).requires_grad_(), logits(0).requires_grad_()
    one = sparse_kd_loss(sparse, every_id(teacher, labels()), labels(), alpha=alpha, split=split)
    other = dense_kd_loss(dense, teacher, labels(), alpha=alpha, split=split)
    one.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(one.kd_N, other.kd_N, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(sparse.grad, dense.grad, rtol=1e-3, atol=1e-6)


def test_ids_the_teacher_excludes() -> None:
    teacher = logits(1)
    teacher[:, 7] = -torch.inf
    ours = logits(0).requires_grad_()
    out = dense_kd_loss(ours, teacher, torch.zeros(N, dtype=torch.int64))
    out.loss.backward()
    p, q = teacher.softmax(-1), ours.detach().softmax(-1)
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(ours.grad, (q - p) / N, rtol=1e-4, atol=1e-7)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="wanted the same shape"):
        dense_kd_loss(logits(0), logits(1)[:, 1:], labels())
    one_N = torch.ones(N)
    with pytest.raises(ValueError, match="wanted forward_kl at temperature 1"):
        dense_kd_loss(logits(0), logits(1), labels(), divergence="jsd", split=TargetSplit(one_N, one_N))
