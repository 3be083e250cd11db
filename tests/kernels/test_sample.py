"""Samplers, exactly: against whole-number arithmetic in Python, and against themselves cut up in every way.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.kernels.sample import KINDS, sample
from stillroom.kernels.sample import weights as weights_module
from stillroom.kernels.sample.philox import random_words
from stillroom.kernels.sample.weights import UNIT, Weigher
from stillroom.kernels.targets import SparseTargets

Row = tuple[list[int], list[float]]  # ids and weights


def _zipf(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Rows from peaked to flat, ids shuffled: `[N, V]` float32."""
    generator = torch.Generator().manual_seed(seed)
    slope_N1 = torch.linspace(0.1, 3.0, rows).unsqueeze(1)
    logits_NV = -slope_N1 * torch.log(torch.arange(vocabulary) + 1.5) + 7.0
    return logits_NV.gather(1, torch.rand(rows, vocabulary, generator=generator).argsort(1))


def _sample(logits_NV: torch.Tensor, kind: str = "threshold", draws: int = 50, **options: Any) -> SparseTargets:
    rows = len(logits_NV)
    defaults: dict[str, Any] = dict(
        labels_N=torch.full((rows,), -100), seed=11, sequence_N=torch.arange(rows) // 7, row_N=torch.arange(rows) % 7
    )
    return sample(logits_NV, kind=kind, draws=draws, **{**defaults, **options})


def _rows(targets: SparseTargets) -> list[Row]:
    return [
        (targets.ids[a:b].tolist(), targets.weights[a:b].tolist())
        for a, b in itertools.pairwise(targets.offsets.tolist())
    ]


def _f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def _assert_same(a: SparseTargets, b: SparseTargets) -> None:
    for name in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def _take(targets: SparseTargets, order: list[int]) -> list[tuple[list[Any], ...]]:
    """Rows in another order, as plain lists."""
    assert targets.logp is not None
    ends = targets.offsets.tolist()
    return [
        (
            targets.ids[ends[n] : ends[n + 1]].tolist(),
            targets.weights[ends[n] : ends[n + 1]].tolist(),
            targets.logp[ends[n] : ends[n + 1]].tolist(),
            [float(targets.label_logp[n]), float(targets.entropy[n])],
        )
        for n in order
    ]


# ---- the formulas of draw.py once more, in Python integers ---------------------------------------------------------


def _find(weights: list[int], point: int) -> int:
    ends = itertools.accumulate(weights)
    return next(i for i, end in enumerate(ends) if point < end)


def _expected(kind: str, weights: list[int], draws: int, words: list[int], top_p: float) -> Row:
    total = sum(weights)
    if kind == "threshold":
        head = [i for i, w in enumerate(weights) if w * draws >= total]
        head.sort(key=lambda i: (-_f32(weights[i] / total), i))
        tail = [0 if w * draws >= total else w for w in weights]
        rest = sum(tail)
        many = max(1, draws * rest // total) if rest else 0
        offset = words[0] * rest >> 64
        ids = [_find(tail, (j * rest + offset) // many) for j in range(many)]
        return head + ids, [_f32(weights[i] / total) for i in head] + [_f32(rest / total / max(1, many))] * many
    if kind in ("random", "systematic", "stratified"):
        if kind == "random":
            points = [word * total >> 64 for word in words]
        else:
            own = kind == "stratified"
            points = [(j * total + (words[j if own else 0] * total >> 64)) // draws for j in range(draws)]
        counts = Counter(_find(weights, point) for point in points)
        kept = sorted(counts, key=lambda i: (-counts[i], i))
        return kept, [_f32(counts[i] / draws) for i in kept]
    kept = sorted((i for i, w in enumerate(weights) if w), key=lambda i: (-weights[i], i))[:draws]
    if kind == "top_p":
        before = [0, *itertools.accumulate(weights[i] for i in kept)]
        kept = [i for i, mass in zip(kept, before) if mass < min(total, math.ceil(float(total) * top_p))]
    kept.sort(key=lambda i: (-_f32(weights[i] / total), i))
    return kept, [_f32(weights[i] / total) for i in kept]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("vocabulary", "draws"),
    [(1, 1), (2, 3), (37, 5), (64, 50), (65, 1), (300, 50), (1000, 4096)],  # V below, at, above a block; V < draws
)
def test_equals_whole_number_arithmetic(kind: str, vocabulary: int, draws: int) -> None:
    rows = 9
    logits_NV = torch.cat([_zipf(rows - 3, vocabulary), torch.zeros(3, vocabulary)])
    logits_NV[-2, ::2] = -math.inf
    logits_NV[-2, 0] = 3.0
    logits_NV[-1] = torch.randint(0, 3, (vocabulary,), generator=torch.Generator().manual_seed(1)).float()  # many ties
    sequence_N, row_N = torch.arange(rows) * 12345, torch.arange(rows) + (1 << 20)
    top_p = 0.8 if kind == "top_p" else 1.0
    targets = _sample(logits_NV, kind, draws, sequence_N=sequence_N, row_N=row_N, top_p=top_p)
    weights = Weigher(rows, vocabulary, logits_NV.device)(logits_NV, logits_NV.amax(1, keepdim=True))
    high_ND, low_ND = random_words(11, sequence_N, row_N, stream=0, count=draws)
    for n, row in enumerate(_rows(targets)):
        words = [high << 32 | low for high, low in zip(high_ND[n].tolist(), low_ND[n].tolist())]
        whole = [int(w) for w in weights.weights_GP[n, :vocabulary].tolist()]
        assert row == _expected(kind, whole, draws, words, top_p), f"row {n}"


def test_whole_number_arithmetic_where_products_overflow() -> None:
    """262,144 equal logits: W is 2**57.6 and 4096 * W needs 70 bits."""
    vocabulary, draws = 1 << 18, 4096
    logits_NV = torch.zeros(1, vocabulary)
    high_ND, low_ND = random_words(11, torch.tensor([0]), torch.tensor([0]), stream=0, count=1)
    word, each = int(high_ND) << 32 | int(low_ND), int(_weights(logits_NV)[0, 0])
    total = each * vocabulary
    wanted = [(j * total + (word * total >> 64)) // draws // each for j in range(draws)]
    for kind in ("threshold", "systematic"):
        targets = _sample(logits_NV, kind, draws)
        assert targets.ids.tolist() == wanted
        assert set(targets.weights.tolist()) == {1 / draws}


def _weights(logits_NV: torch.Tensor, exponent: float = 1.0) -> torch.Tensor:
    weigher = Weigher(len(logits_NV), logits_NV.shape[1], logits_NV.device)
    return weigher(logits_NV, logits_NV.amax(1, keepdim=True).float(), exponent).weights_GP.double()


@pytest.mark.parametrize("exponent", [1.0, 0.7, 1.3])
def test_weights_are_the_exponential(exponent: float) -> None:
    """Polynomial 1.6e-7; t is rounded three times, each 2**-24 of its size; whole numbers cost up to one unit."""
    logits_NV = torch.linspace(0.0, -30.0, 100_000).unsqueeze(0)
    exact_NV = (logits_NV.double() * exponent).exp() * UNIT
    error_NV = (_weights(logits_NV, exponent)[:, :100_000] - exact_NV).abs()
    bound_NV = exact_NV * (1.6e-7 + 3 * 2**-24 * logits_NV.double().abs() * exponent) + 1.0
    assert bool((error_NV <= bound_NV).all()), float((error_NV / bound_NV).max())


# ---- the same rows cut up, moved and stored in other ways ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batch_split_order_threads_and_strides_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 41, 1003  # 1003 leaves every row at another alignment
    logits_NV = _zipf(rows, vocabulary)
    generator = torch.Generator().manual_seed(3)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    sequence_N, row_N = torch.arange(rows) // 8, torch.arange(rows) % 8
    options: dict[str, Any] = dict(top_p=0.9) if kind == "top_p" else dict(exponent=0.8) if kind == "random" else {}

    def run(index: torch.Tensor, logits: torch.Tensor = logits_NV) -> SparseTargets:
        return _sample(
            logits[index], kind, labels_N=labels_N[index], sequence_N=sequence_N[index], row_N=row_N[index], **options
        )

    everything = run(torch.arange(rows))
    truth = _take(everything, list(range(rows)))
    order = torch.randperm(rows, generator=generator)
    assert _take(run(order), order.argsort().tolist()) == truth
    for sizes in ([1] * rows, [5, 1, 30, 5], [40, 1]):
        parts = [run(index) for index in torch.split(torch.arange(rows), sizes)]
        assert [row for part in parts for row in _take(part, list(range(part.rows)))] == truth
    padded_NV = torch.full((rows, vocabulary + 6), 5.0)
    padded_NV[:, 3:-3] = logits_NV
    _assert_same(run(torch.arange(rows), padded_NV[:, 3:-3]), everything)
    _assert_same(run(torch.arange(rows), logits_NV.t().contiguous().t()), everything)
    torch.set_num_threads(2)
    _assert_same(run(torch.arange(rows)), everything)
    for block, group, chunk in ((16, 1, 1), (256, 1 << 12, 1 << 11), (1024, 1 << 16, 1 << 13)):
        monkeypatch.setattr(weights_module, "block_ids", lambda _, block=block: block)
        monkeypatch.setattr(weights_module, "GROUP_ELEMENTS", group)
        monkeypatch.setattr(weights_module, "CHUNK_ELEMENTS", chunk)
        _assert_same(run(torch.arange(rows)), everything)


def test_seed_sequence_and_row_all_matter() -> None:
    logits_NV = _zipf(1, 1000).expand(50, -1)
    row_N = torch.arange(50)
    base = _sample(logits_NV, sequence_N=torch.zeros(50, dtype=torch.int64), row_N=row_N)
    assert len({tuple(ids) for ids, _ in _rows(base)}) > 45
    changes: list[dict[str, Any]] = [
        dict(seed=12), dict(sequence_N=torch.ones(50, dtype=torch.int64)), dict(row_N=row_N + 50)
    ]  # fmt: skip
    for change in changes:
        other = _sample(logits_NV, **{"sequence_N": torch.zeros(50, dtype=torch.int64), "row_N": row_N, **change})
        assert not torch.equal(other.ids, base.ids)


def test_bfloat16_is_its_float32_value() -> None:
    logits_NV = _zipf(20, 500).bfloat16()
    for kind in KINDS:
        _assert_same(_sample(logits_NV, kind), _sample(logits_NV.float(), kind))


def test_logits_are_left_alone_and_may_require_grad() -> None:
    logits_NV = _zipf(5, 100)
    before = logits_NV.clone()
    targets = _sample(logits_NV.requires_grad_(), labels_N=torch.arange(5))
    assert torch.equal(logits_NV, before)
    assert not targets.label_logp.requires_grad


# ---- what every row must hold ---------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(1, 400),
    draws=st.integers(1, 120),
    spread=st.sampled_from([0.0, 0.3, 2.0, 6.0, 40.0]),
    excluded=st.floats(0.0, 0.9),
    levels=st.sampled_from([0, 3]),
    half=st.booleans(),
)
def test_threshold_invariants(
    seed: int, vocabulary: int, draws: int, spread: float, excluded: float, levels: int, half: bool
) -> None:
    rows = 4
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(rows, vocabulary, generator=generator) * spread
    if levels:
        logits_NV = (logits_NV * levels).round() / levels
    logits_NV[torch.rand(rows, vocabulary, generator=generator) < excluded] = -math.inf
    logits_NV[:, vocabulary // 2] = 1.0
    if half:
        logits_NV = logits_NV.bfloat16()
    targets = _sample(logits_NV, draws=draws, seed=seed)
    logp_NV = logits_NV.double().log_softmax(1)
    edge = float(torch.tensor(-math.log(draws)))
    assert targets.logp is not None
    for n, (ids, weights) in enumerate(_rows(targets)):
        logp = targets.logp[targets.offsets[n] : targets.offsets[n + 1]].tolist()
        heads = sum(value >= edge for value in logp)
        head, tail = ids[:heads], ids[heads:]
        assert all(value >= edge for value in logp[:heads])
        assert len(set(ids)) == len(ids)
        assert head == sorted(head, key=lambda i: (-weights[ids.index(i)], i))
        assert tail == sorted(tail)
        assert sum(weights) == pytest.approx(1.0, abs=2**-24)
        # float32 logits of size z give p within z * 2**-24 of its value and a little for the polynomial
        for i, weight, value in zip(ids, weights, logp):
            assert value == pytest.approx(float(logp_NV[n, i]), abs=2e-6 * max(1.0, spread / 10), rel=2e-6)
            assert i not in head or weight == pytest.approx(math.exp(value), rel=1e-5)
        p_V = logp_NV[n].exp()
        certain = (p_V > (1 + 1e-5) / draws).nonzero().flatten().tolist()
        possible = (p_V > (1 - 1e-5) / draws).nonzero().flatten().tolist()
        assert set(certain) <= set(head) <= set(possible)
        rest = float(1 - p_V[head].sum())
        if tail:
            assert len(set(weights[heads:])) == 1
            assert len(tail) in {max(1, math.floor(draws * rest + slack)) for slack in (-1e-4, 0.0, 1e-4)}
            assert len(tail) * weights[heads] == pytest.approx(rest, abs=1e-5)
        else:
            assert rest < 1e-5
        assert float(p_V[ids].min()) > 0.0


@pytest.mark.parametrize("kind", ["random", "systematic", "stratified"])
def test_counts_are_whole_and_sum_to_draws(kind: str) -> None:
    logits_NV = _zipf(200, 700)
    p_NV = logits_NV.double().softmax(1)
    for draws in (1, 7, 50, 300):
        for _, weights in _rows(_sample(logits_NV, kind, draws)):
            counts = [weight * draws for weight in weights]
            assert all(abs(count - round(count)) < 1e-4 and round(count) >= 1 for count in counts)
            assert sum(round(count) for count in counts) == draws
            assert counts == sorted(counts, reverse=True)
        if kind == "systematic":  # floor or ceil of N p, nothing else
            targets = _sample(logits_NV, kind, draws)
            expected_E = p_NV[targets.entry_rows(), targets.ids.long()] * draws
            assert float((targets.weights * draws - expected_E).abs().max()) < 1.0 + 1e-4
        if kind == "stratified":  # the strata an id fills are sure, those it ends in are not
            targets = _sample(logits_NV, kind, draws)
            expected_E = p_NV[targets.entry_rows(), targets.ids.long()] * draws
            assert float((targets.weights * draws - expected_E).abs().max()) < 2.0 + 1e-4


def test_top_k_and_top_p() -> None:
    logits_NV = _zipf(30, 600)
    p_NV, id_NV = logits_NV.double().softmax(1).sort(1, descending=True)
    for n, (ids, weights) in enumerate(_rows(_sample(logits_NV, "top_k", 12))):
        assert ids == id_NV[n, :12].tolist()
        assert weights == pytest.approx(p_NV[n, :12].tolist(), rel=3e-6)
    for n, (ids, _) in enumerate(_rows(_sample(logits_NV, "top_p", 80, top_p=0.9))):
        wanted = min(80, int((p_NV[n].cumsum(0) < 0.9).sum()) + 1)
        assert ids == id_NV[n, :wanted].tolist()
    assert max(len(ids) for ids, _ in _rows(_sample(logits_NV, "top_p", 600, top_p=1.0))) == 600


def test_ties_go_to_the_lower_id() -> None:
    logits_NV = torch.zeros(2, 500)
    logits_NV[1, 400] = 1.0  # 1 % of 499 + e is 5.02: e and three ones
    assert [ids for ids, _ in _rows(_sample(logits_NV, "top_k", 3))] == [[0, 1, 2], [400, 0, 1]]
    assert [ids for ids, _ in _rows(_sample(logits_NV, "top_p", 500, top_p=0.01))] == [[0, 1, 2, 3, 4], [400, 0, 1, 2]]


# ---- the ends of the range --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_teacher(kind: str) -> None:
    logits_NV = torch.full((4, 300), -math.inf)
    logits_NV[torch.arange(4), torch.tensor([0, 17, 64, 299])] = torch.tensor([0.0, -5.0, 3e38, -3e38])
    targets = _sample(logits_NV, kind, labels_N=torch.tensor([0, 16, -100, 299]))
    assert _rows(targets) == [([0], [1.0]), ([17], [1.0]), ([64], [1.0]), ([299], [1.0])]
    assert targets.entropy.tolist() == pytest.approx([0.0] * 4, abs=2e-7)
    assert targets.label_logp.tolist() == pytest.approx([0.0, -math.inf, 0.0, 0.0], abs=2e-7)


@pytest.mark.parametrize("kind", ["threshold", "systematic"])
def test_uniform_teacher(kind: str) -> None:
    """1000 equal ids, 50 draws: no head, 50 ids, spaced evenly; 50 ids, 50 draws: each once, all of them head."""
    for ids, weights in _rows(_sample(torch.zeros(20, 1000), kind)):
        gaps = [b - a for a, b in itertools.pairwise(ids)]
        assert set(gaps) <= {20}
        assert set(weights) == {_f32(0.02)}
    assert _rows(_sample(torch.zeros(3, 50), kind)) == [(list(range(50)), [_f32(0.02)] * 50)] * 3


def test_one_draw() -> None:
    """Threshold 1: no head unless one id has everything; the tail is one id of weight 1."""
    for kind in KINDS:
        for ids, weights in _rows(_sample(_zipf(20, 100), kind, 1)):
            assert len(ids) == 1
            assert kind.startswith("top") or weights == [1.0]


def test_excluded_ids_are_never_drawn_torch_4858() -> None:
    """torch.multinomial drew ids of probability zero, and ids outside the row."""
    logits_NV = _zipf(200, 300)
    logits_NV[:, ::3] = -math.inf
    logits_NV[:, -1] = -math.inf  # a draw at the very end of the row
    for kind in KINDS:
        targets = _sample(logits_NV, kind, 300)
        assert bool((targets.ids % 3 != 0).all())
        assert targets.logp is not None
        assert bool(targets.logp.isfinite().all())


@pytest.mark.parametrize("kind", ["random", "systematic", "stratified"])
def test_far_tail_is_drawn_vllm_43150_torch_2576(kind: str) -> None:
    """Float32 uniforms end at 2**-24 and float32 sums give far ids no width: tails behind a gap of 20 nats were lost.

    One id, and 262,143 of e**-20 each: 5.4e-4 of the mass, 141.5 of 262,144 draws; binomial, or less noisy than that.
    """
    rows, draws, vocabulary = 64, 4096, 1 << 18
    logits_NV = torch.zeros(1, vocabulary)
    logits_NV[0, 1000] = 20.0
    targets = _sample(logits_NV.expand(rows, -1), kind, draws)
    tail_E = targets.ids != 1000
    p = (vocabulary - 1) * math.exp(-20) / (1 + (vocabulary - 1) * math.exp(-20))
    hits = float((targets.weights[tail_E].double() * draws).sum())
    assert abs(hits - rows * draws * p) < 4 * math.sqrt(rows * draws * p)
    # ids are as uniform as hits: all different but for about hits**2 / 2 / vocabulary, 0.04 pairs
    ids_E = targets.ids[tail_E].double()
    assert len(ids_E.unique()) >= len(ids_E) - 2
    # mean of uniforms over the row, standard error vocabulary / sqrt(12 * hits)
    assert abs(float(ids_E.mean()) - vocabulary / 2) < 4 * vocabulary / math.sqrt(12 * len(ids_E))


def test_top_p_does_not_saturate_vllm_47524() -> None:
    """A cumulative sum in bfloat16 stops growing near 1; 0.9 of 4,000 equal ids is 3,600 of them."""
    logits_NV = torch.zeros(2, 4000, dtype=torch.bfloat16)
    assert _sample(logits_NV, "top_p", 4096, top_p=0.9).offsets.tolist() == [0, 3600, 7200]


def test_label_logp_and_entropy() -> None:
    logits_NV = _zipf(60, 2000)
    labels_N = torch.arange(60) * 31
    labels_N[::7] = -100
    logp_NV = logits_NV.double().log_softmax(1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(1)
    wanted_N = logp_NV.gather(1, labels_N.clamp_min(0).unsqueeze(1)).squeeze(1)
    targets = _sample(logits_NV, labels_N=labels_N)
    assert torch.allclose(targets.entropy.double(), entropy_N, rtol=1e-6, atol=1e-6)
    assert torch.allclose(targets.label_logp.double()[labels_N >= 0], wanted_N[labels_N >= 0], rtol=2e-6, atol=0)
    assert bool((targets.label_logp[labels_N < 0] == 0).all())


def test_no_rows() -> None:
    for kind in KINDS:
        targets = _sample(torch.zeros(0, 30), kind)
        assert (targets.rows, targets.offsets.tolist(), targets.ids.dtype) == (0, [0], torch.int32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_name_the_row(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "GROUP_ELEMENTS", 256)  # two rows a group
    logits_NV = _zipf(7, 100)
    logits_NV[5, 99] = bad
    with pytest.raises(ValueError, match="row 5 "):
        _sample(logits_NV)
    with pytest.raises(ValueError, match="row 3 "):
        _sample(torch.where(torch.arange(7).unsqueeze(1) == 3, -math.inf, _zipf(7, 100)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits_NV", dict(logits_NV=torch.zeros(3, 10, dtype=torch.float64))),
        ("logits_NV", dict(logits_NV=torch.zeros(3))),
        ("logits_NV", dict(logits_NV=torch.zeros(3, 0))),
        ("labels_N", dict(labels_N=torch.zeros(4, dtype=torch.int64))),
        ("labels_N", dict(labels_N=torch.zeros(3, dtype=torch.int32))),
        ("labels_N", dict(labels_N=torch.tensor([0, 1, 10]))),
        ("labels_N", dict(labels_N=torch.tensor([0, 1, -1]))),
        ("row_N", dict(row_N=torch.zeros(2, dtype=torch.int64))),
        ("sequence_N", dict(sequence_N=torch.tensor([0, 1, 1 << 40]))),
        ("kind", dict(kind="top")),
        ("draws", dict(draws=0)),
        ("draws", dict(draws=4097)),
        ("seed", dict(seed=-1)),
        ("exponent", dict(exponent=0.8)),
        ("exponent", dict(kind="random", exponent=9.0)),
        ("top_p", dict(top_p=0.9)),
        ("top_p", dict(kind="top_p", top_p=0.0)),
    ],
)
def test_errors_name_the_argument(name: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(
        logits_NV=torch.zeros(3, 10), labels_N=torch.zeros(3, dtype=torch.int64), kind="threshold", draws=5, seed=0,
        sequence_N=torch.zeros(3, dtype=torch.int64), row_N=torch.arange(3),
    )  # fmt: skip
    sample(**arguments)
    with pytest.raises(ValueError, match=f"`{name}`"):
        sample(**{**arguments, **changes})


def test_the_cpu_path_does_not_import_triton() -> None:
    program = (
        "import sys, torch\n"
        "from stillroom.kernels.sample import sample\n"
        "n = torch.arange(2)\n"
        "sample(torch.zeros(2, 9), n, kind='threshold', draws=3, seed=0, sequence_N=n, row_N=n)\n"
        "assert 'stillroom.kernels.sample.triton' not in sys.modules\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
