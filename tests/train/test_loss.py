"""Every loss of the registry: its definition, on sparse and dense targets; vocabulary, micro-batches, row weights, fused head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from stillroom.kernels.sample import sample
from stillroom.kernels.sparse_kd import MISSING_MASS
from stillroom.kernels.targets import SparseTargets
from stillroom.train.batch import Batch
from stillroom.train.config import LossName, MissingMass
from stillroom.train.loss import LOSSES
from stillroom.train.objective import Objective
from stillroom.train.row_weights import RowWeights
from stillroom.train.schedule import Schedule
from stillroom.train.targets import Cached, DenseTargets

B, L, V = 3, 5, 41
N = B * L
HARD_UPTO = -4.0
OWN: dict[str, dict[str, Any]] = {
    "atkd": {"hard_upto": HARD_UPTO, "hard_share": 0.4},
    "tail_aware": {"head_logp": -3.0, "head_size": 4},
}
TAID = Schedule(0.4, 0.4)


class Dense:
    """A live teacher's answers, from logits at hand."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV

    def __call__(self, batch: Batch) -> DenseTargets:
        return DenseTargets(self.logits_NV)


def logits(seed: int, width: int = V) -> Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)) * 3


def every_id(teacher_NV: Tensor, labels_N: Tensor) -> SparseTargets:
    """All ids, likeliest first, as a sampler that keeps everything exactly would."""
    logp_NV, order_NV = teacher_NV.double().log_softmax(-1).sort(dim=1, descending=True)
    rows = len(teacher_NV)
    label_logp = teacher_NV.double().log_softmax(-1).gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    return SparseTargets(
        offsets=torch.arange(rows + 1) * V,
        ids=order_NV.flatten().to(torch.int32),
        weights=logp_NV.exp().float().flatten(),
        label_logp=label_logp.float(),
        entropy=-(logp_NV.exp() * logp_NV).sum(1).float(),
        logp=logp_NV.float().flatten(),
    )


def batch_of(teacher_NV: Tensor) -> Batch:
    """One row carries no label."""
    labels_BL = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(9))
    labels_BL[1, 2] = -100
    targets = every_id(teacher_NV, labels_BL.flatten())
    return Batch(torch.zeros(B, L, dtype=torch.int64), labels_BL, labels_BL != -100, targets)


def objective(name: LossName, dense: Tensor | None = None, alpha: float = 0.0, **changes: Any) -> Objective:
    return Objective(
        name,
        V,
        targets=Cached() if dense is None else Dense(dense),
        alpha=Schedule.constant(0.0 if name == "ce" else alpha),
        taid=TAID,
        settings=OWN.get(name, {}),
        **changes,
    )


def value_and_gradient(goal: Objective, leaf: Tensor, batch: Batch) -> tuple[float, Tensor]:
    leaf = leaf.detach().clone().requires_grad_()
    terms = goal(leaf * 1.0, batch, float(batch.mask_BL.sum()))
    terms.loss.backward()
    assert leaf.grad is not None
    return terms.loss.item(), leaf.grad


def split(p: Tensor, q: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """TKD and DKD of rows."""
    at = label_N[:, None]
    pg, qg = p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]
    tkd = pg * (pg / qg).log() + (1 - pg) * ((1 - pg) / (1 - qg)).log()
    rest_p, rest_q = (x.scatter(1, at, 0.0) / (1 - g)[:, None] for x, g in ((p, pg), (q, qg)))
    return tkd, torch.where(rest_p > 0, rest_p * (rest_p / rest_q.clamp(min=1e-300)).log(), 0.0).sum(1)


def definition(name: str, z: Tensor, teacher: Tensor, label_N: Tensor) -> Tensor:
    """The loss of each row as its paper states it, dense, float64; `z` carries the gradient."""
    p, q = teacher.softmax(-1), z.softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    match name:
        case "dkd":
            tkd, dkd = split(p, q, label_N)
            return 1.0 * tkd + 0.5 * dkd
        case "atkd":
            tkd, dkd = split(p, q, label_N)
            easy = p.gather(1, label_N[:, None])[:, 0].log() > HARD_UPTO
            return torch.where(easy, 0.2 / 0.6 * dkd, 0.8 / 0.4 * (tkd + dkd))
        case "taid":
            mixed = (0.6 * z.detach() + 0.4 * teacher).softmax(-1)
            return kl(mixed, q)
        case "akl":
            order = p.argsort(dim=1, descending=True)
            head = p.gather(1, order).cumsum(1) <= 0.5
            head[:, 0] = True
            head = torch.zeros_like(head).scatter(1, order, head)
            gap = (p - q.detach()).abs()
            share = (gap * head).sum(1) / gap.sum(1)
            return share * kl(p, q) + (1 - share) * kl(q, p)
        case "tail_aware":
            head = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(4, dim=1).indices, True)
            head &= p.log() >= -3.0
            ph, qh = (torch.where(head, x, 0.0).sum(1) for x in (p, q))
            bucket = torch.where(head, p * (p / q).log(), 0.0).sum(1) + (1 - ph) * ((1 - ph) / (1 - qh)).log()
            return bucket + 2.0 * (kl(p, q) - bucket)
    raise AssertionError(name)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", ["dkd", "atkd", "taid", "akl", "tail_aware"])
def test_losses_are_their_definitions(name: LossName, alpha: float) -> None:
    teacher, batch = logits(1), batch_of(logits(1))
    label_N, live_N = batch.labels_BL.flatten().clamp(min=0), batch.mask_BL.flatten()
    exact = logits(0).double().requires_grad_()
    ce_N = torch.nn.functional.cross_entropy(exact, label_N, reduction="none")
    kd_N = definition(name, exact, teacher.double(), label_N)
    truth = ((1 - alpha) * kd_N + alpha * ce_N)[live_N].sum() / live_N.sum()
    truth.backward()
    assert exact.grad is not None
    loss, gradient = value_and_gradient(objective(name, alpha=alpha), logits(0), batch)
    assert loss == pytest.approx(truth.item(), rel=1e-4)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("name", [name for name in get_args(LossName) if name != "ce"])
def test_a_live_teacher_and_every_id_of_it_give_one_gradient(name: LossName, alpha: float) -> None:
    """The training step cannot tell which source answers. (A head is what a cache says it is: here all of the first four.)"""
    teacher, batch = logits(1), batch_of(logits(1))
    own = {"settings": {"head_logp": -1e9, "head_size": 4}} if name == "tail_aware" else {}
    found = [
        value_and_gradient(replace(objective(name, dense, alpha), **own), logits(0), batch) for dense in (None, teacher)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", get_args(LossName))
def test_logits_beyond_the_vocabulary_play_no_part(name: LossName, dense: bool) -> None:
    teacher, batch = logits(1), batch_of(logits(1))
    goal = objective(name, teacher if dense else None)
    _, narrow = value_and_gradient(goal, logits(0), batch)
    _, wide = value_and_gradient(goal, torch.cat([logits(0), logits(2, 7) + 20], 1), batch)
    torch.testing.assert_close(wide[:, :V], narrow, rtol=1e-5, atol=1e-8)
    assert wide[:, V:].abs().max() == 0


@pytest.mark.parametrize("name", get_args(LossName))
def test_unequal_micro_batches_add_up_to_the_whole(name: LossName) -> None:
    """Sequences 0 and 1 hold 9 rows with a label, sequence 2 holds 5: a mean of means would be off by 5 %."""
    batch = batch_of(logits(1))
    assert batch.targets is not None
    rows, goal = float(batch.mask_BL.sum()), objective(name, alpha=0.25)
    whole, whole_gradient = value_and_gradient(goal, logits(0), batch)
    leaf, total = logits(0).requires_grad_(), 0.0
    for first, stop in ((0, 2), (2, 3)):
        n, e, t = slice(first * L, stop * L), slice(first * L * V, stop * L * V), batch.targets
        assert t.logp is not None
        cut = SparseTargets(
            t.offsets[n.start : n.stop + 1] - e.start, t.ids[e], t.weights[e], t.label_logp[n], t.entropy[n], t.logp[e]
        )
        part = Batch(batch.tokens_BL[first:stop], batch.labels_BL[first:stop], batch.mask_BL[first:stop], cut)
        terms = goal(leaf[n] * 1.0, part, rows)
        terms.loss.backward()
        total += terms.loss.item()
    torch.testing.assert_close(leaf.grad, whole_gradient, rtol=1e-5, atol=1e-8)
    assert total == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", get_args(LossName))
def test_the_fused_head_is_the_same_loss(name: LossName) -> None:
    goal, batch = objective(name, alpha=0.3), batch_of(logits(1))
    assert goal.fusable == (name not in ("taid", "akl", "tail_aware"))
    if not goal.fusable:
        return
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(N, 8, generator=generator), torch.randn(V + 3, 8, generator=generator), torch.zeros(V + 3)]
    whole, fused = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    rows = float(batch.mask_BL.sum())
    one = goal(whole[0] @ whole[1].T + whole[2], batch, rows)
    other = goal.fused(fused[0], fused[1], fused[2], batch, rows)
    for a, b in ((one.loss, other.loss), (one.kd, other.kd), (one.ce, other.ce)):
        assert a.item() == pytest.approx(b.item(), rel=1e-4)
    one.loss.backward()
    other.loss.backward()
    for what, a, b in zip(("hidden", "weight", "bias"), whole, fused):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, what=what: f"{what}: {m}")  # type: ignore[misc]


@pytest.mark.parametrize("name", ["tail_aware", "dkd", "jsd"])
def test_gradients_from_samples_are_right_on_average(name: LossName) -> None:
    """4,000 independent threshold draws (N = 8) of one row: the mean gradient is the dense one, to five standard errors."""
    trials, draws = 4000, 8
    teacher_NV, student_NV = (logits(seed)[:1].expand(trials, -1).contiguous() for seed in (1, 0))
    label_N = torch.full((trials,), 3)
    targets = sample(
        teacher_NV, label_N, kind="threshold", draws=draws, seed=5, sequence_N=torch.arange(trials),
        row_N=torch.zeros(trials, dtype=torch.int64),
    )  # fmt: skip
    own = {"head_logp": float(-torch.tensor(float(draws)).log()), "head_size": 4} if name == "tail_aware" else {}
    shape = (trials, 1)
    batch = Batch(label_N.view(shape), label_N.view(shape), torch.ones(shape, dtype=torch.bool), targets)
    goal = replace(objective(name), settings=own)
    _, gradient = value_and_gradient(goal, student_NV, batch)
    gradient *= trials
    exact = Dense(teacher_NV[:1])
    if name == "tail_aware":  # the head of the definition is what of the four likeliest the cache's head holds
        held = int((teacher_NV[0].log_softmax(0) >= own["head_logp"]).sum())
        goal = replace(goal, settings={**own, "head_size": min(4, held)})
    one = Batch(*(x[:1] for x in (batch.tokens_BL, batch.labels_BL, batch.mask_BL)))
    _, truth = value_and_gradient(replace(goal, targets=exact), student_NV[:1], one)
    error_V = gradient.double().mean(0) - truth[0].double()
    deviation_V = gradient.double().std(0) / trials**0.5
    often_V = (
        teacher_NV[0].softmax(0) > 2e-3
    )  # drawn 60 times at least: a rarer id's deviation is not seen in its draws
    assert often_V.sum() > 10
    assert (error_V.abs() <= 5 * deviation_V + 1e-5)[often_V].all()


def test_row_weights_keep_the_size_of_the_loss() -> None:
    batch = batch_of(logits(1))
    assert batch.targets is not None
    live_N, targets = batch.mask_BL.flatten(), batch.targets
    entropy_N, surprise_N = targets.entropy[live_N], -targets.label_logp[live_N]
    for weights in (
        RowWeights("entropy", 1.0, float(entropy_N.mean())),
        RowWeights("surprise", 2.0, float((surprise_N**2).mean())),
    ):
        factor_N = weights(batch)
        assert factor_N[live_N].mean().item() == pytest.approx(1.0, rel=1e-5)
        assert (factor_N[~live_N] == 0).all()
    upto = float(surprise_N.neg().median())
    share = float((-surprise_N <= upto).float().mean())
    hard = RowWeights(hard_upto=upto, hard_weight=3.0, hard_mean=1.0 + 2.0 * share)(batch)[live_N]
    assert hard.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert (hard.max() / hard.min()).item() == pytest.approx(3.0)
    goal = objective("forward_kl", row_weights=RowWeights(hard_upto=upto, hard_weight=3.0, hard_mean=1.0 + 2.0 * share))
    _, plain = value_and_gradient(objective("forward_kl"), logits(0), batch)
    _, weighted = value_and_gradient(goal, logits(0), batch)
    torch.testing.assert_close(weighted[live_N], plain[live_N] * hard[:, None], rtol=1e-4, atol=1e-7)


def test_schedules_reach_their_ends() -> None:
    for shape in ("linear", "cosine", "wsd"):
        schedule = Schedule(0.9, 0.1, shape, steps=11, decay=0.4)  # type: ignore[arg-type]
        values = [schedule.at(step) for step in range(11)]
        assert values[0] == pytest.approx(0.9)
        assert values[-1] == pytest.approx(0.1)
        assert values == sorted(values, reverse=True)
    assert Schedule(0.9, 0.1, "linear", steps=11).at(5) == pytest.approx(0.5)
    assert Schedule(0.9, 0.1, "wsd", steps=11, decay=0.4).at(6) == pytest.approx(0.9)
    assert Schedule(0.9, 0.1, "wsd", steps=11, decay=0.4).at(8) == pytest.approx(0.5)
    assert Schedule(0.9, 0.1, "constant", steps=11).at(10) == 0.9
    assert Schedule(0.9, 0.1, "linear", steps=1).at(0) == 0.9


def test_names_are_the_kernels() -> None:
    assert get_args(MissingMass) == MISSING_MASS  # config.py must not import torch to know them
    assert set(LOSSES) == set(get_args(LossName))
