"""The sampler's Triton kernels against the reference, bit for bit: in Triton's interpreter, and on a GPU under `-m gpu`.

Sizes of tiles are made small here, so that rows of a few hundred ids have many blocks, and draws are taken many at a time,
for the interpreter's time goes by calls. Tests named after other projects' failures are those of the list in the kernel notes.

Shapes: `N` rows, `V` vocabulary, `E` entries, `D` draws.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.kernels.backend import interpreted
from stillroom.kernels.sample import KINDS, sample
from stillroom.kernels.sample import weights as weights_module
from stillroom.kernels.sample.finish import in_order
from stillroom.kernels.sample.weights import Weigher, whole
from stillroom.kernels.targets import SparseTargets

triton = pytest.importorskip("triton")
tl = triton.language

from stillroom.kernels.sample import kernels_triton as device_code  # noqa: E402
from stillroom.kernels.sample import triton as launches  # noqa: E402
from stillroom.kernels.sample.draw import Picked  # noqa: E402

DEVICES: Final = (
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
on_devices = pytest.mark.parametrize("device", DEVICES)
SMALL: Final = launches.Sizes(block=64, key_block=16, tile=512, draws=32)
OWN_SIZES: Final = launches.Sizes.of
M: Final = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles."""
    monkeypatch.setattr(launches.Sizes, "of", lambda _: SMALL)


@pytest.fixture
def own_sizes(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuning table's; in the interpreter, whose time goes by calls, many blocks and draws at once."""

    def sizes(vocabulary: int) -> launches.Sizes:
        own = OWN_SIZES(vocabulary)
        return own if torch.cuda.is_available() else replace(own, tile=max(1 << 16, own.block), draws=16)

    monkeypatch.setattr(launches.Sizes, "of", sizes)


def _zipf(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Rows from peaked to flat, ids shuffled: `[N, V]` float32."""
    generator = torch.Generator().manual_seed(seed)
    slope_N1 = torch.linspace(0.1, 3.0, rows).unsqueeze(1)
    logits_NV = -slope_N1 * torch.log(torch.arange(vocabulary) + 1.5) + 7.0
    return logits_NV.gather(1, torch.rand(rows, vocabulary, generator=generator).argsort(1))


def _run(logits_NV: torch.Tensor, kind: str, impl: str, draws: int = 20, **options: Any) -> SparseTargets:
    """Targets on the CPU. Sequences and rows use both words of the counter."""
    rows, vocabulary = logits_NV.shape
    extra = dict(exponent=0.8) if kind == "random" else dict(top_p=0.8) if kind == "top_p" else {}
    arguments: dict[str, Any] = {
        "labels_N": torch.arange(rows) % vocabulary,
        "sequence_N": torch.arange(rows) // 3 * 0x12345678,
        "row_N": torch.arange(rows) % 3 + (1 << 20),
        "seed": 11,
        **extra,
        **options,
    }
    moved = {name: value.to(logits_NV.device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    return sample(logits_NV, kind=kind, draws=draws, impl=impl, **moved).to("cpu")


def _assert_same(a: SparseTargets, b: SparseTargets, device: str = "cpu") -> None:
    """The same bits; a GPU's double-precision logarithm may differ from a CPU's by its last bit, so float32 by one ulp."""
    for name in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype, name
        if device != "cpu" and name in ("logp", "label_logp", "entropy"):  # floats of one sign: bits in their order
            assert bool(((one.view(torch.int32) - other.view(torch.int32)).abs() <= 1).all()), name
        else:
            assert torch.equal(one, other), name


def _compare(logits_NV: torch.Tensor, kind: str, device: str, draws: int = 20, **options: Any) -> SparseTargets:
    found = _run(logits_NV.to(device), kind, "triton", draws, **options)
    _assert_same(found, _run(logits_NV, kind, "reference", draws, **options), device)
    return found


# ---- the same bits as the reference ----------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, half: bool, device: str) -> None:
    logits_NV = _zipf(6, 333)
    logits_NV[2, ::3] = -math.inf
    logits_NV[3] = torch.arange(333) % 4 // 3 * 1.0  # ties
    logits_NV[4] = -math.inf
    logits_NV[4, 332] = 3.0e38
    logits_NV[5] = 0.0
    labels_N = torch.tensor([0, -100, 3, 332, 5, 64])
    targets = _compare(logits_NV.bfloat16() if half else logits_NV, kind, device, labels_N=labels_N)
    assert targets.label_logp.tolist()[1] == 0.0
    assert targets.label_logp.tolist()[2] == targets.label_logp.tolist()[4] == -math.inf


@on_devices
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    draws=st.sampled_from([1, 2, 7, 33, 100]),
    vocabulary=st.integers(1, 400),
    seed=st.integers(0, (1 << 64) - 1),
    sequence=st.integers(0, (1 << 40) - 1),
    row=st.integers(0, (1 << 24) - 1),
    exponent=st.floats(0.25, 4.0),
    top_p=st.floats(0.01, 1.0),
    spread=st.floats(0.0, 40.0),
    levels=st.sampled_from([0, 0, 2]),
    excluded=st.sampled_from([0.0, 0.3, 0.99]),
    half=st.booleans(),
)
def test_equals_the_reference_for_anything(
    device: str, kind: str, draws: int, vocabulary: int, seed: int, sequence: int, row: int, exponent: float,
    top_p: float, spread: float, levels: int, excluded: float, half: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed % 1000)
    logits_NV = torch.randn(2, vocabulary, generator=generator) * spread
    if levels:
        logits_NV = (logits_NV / max(1.0, spread) * levels).round()
    logits_NV[torch.rand(2, vocabulary, generator=generator) < excluded] = -math.inf
    logits_NV[:, vocabulary // 2] = 1.0
    _compare(
        logits_NV.bfloat16() if half else logits_NV, kind, device, draws, seed=seed,
        exponent=exponent if kind == "random" else 1.0, top_p=top_p if kind == "top_p" else 1.0,
        sequence_N=torch.tensor([sequence, 0]), row_N=torch.tensor([row, 0]),
    )  # fmt: skip


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_batch_split_order_and_strides_change_no_bit(kind: str, device: str) -> None:
    """flashinfer 4861: draws depended on a row's place in the batch."""
    rows, vocabulary = 4, 203
    logits_NV = _zipf(rows, vocabulary).to(device)
    sequence_N, row_N, labels_N = torch.arange(rows) // 3, torch.arange(rows) % 3, torch.arange(rows) * 9

    def take(index: torch.Tensor, logits: torch.Tensor = logits_NV) -> list[tuple[list[float], ...]]:
        targets = _run(
            logits[index.to(device)], kind, "triton",
            labels_N=labels_N[index], sequence_N=sequence_N[index], row_N=row_N[index],
        )  # fmt: skip
        assert targets.logp is not None
        return [
            (
                targets.ids[a:b].tolist(),
                targets.weights[a:b].tolist(),
                targets.logp[a:b].tolist(),
                [float(targets.label_logp[n]), float(targets.entropy[n])],
            )
            for n, (a, b) in enumerate(itertools.pairwise(targets.offsets.tolist()))
        ]

    everything = torch.arange(rows)
    truth = take(everything)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    shuffled = take(order)
    assert [shuffled[int(n)] for n in order.argsort()] == truth
    assert [row for part in everything.split([1, 3]) for row in take(part)] == truth
    padded_NV = torch.full((rows, vocabulary + 6), 5.0, device=device)
    padded_NV[:, 3:-3] = logits_NV
    for moved_NV in (padded_NV[:, 3:-3], logits_NV.t().contiguous().t(), logits_NV.repeat(2, 1)[:rows]):
        found = sample(
            moved_NV, labels_N.to(device), kind=kind, draws=20, seed=11, sequence_N=sequence_N.to(device),
            row_N=row_N.to(device), **(dict(exponent=0.8) if kind == "random" else dict(top_p=0.8) if kind == "top_p" else {}),
            impl="triton",
        )  # fmt: skip
        assert found.ids.tolist() == [i for row in truth for i in row[0]]
        assert found.weights.tolist() == [w for row in truth for w in row[1]]


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_tiles_change_no_bit(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV = _zipf(2, 517)
    for sizes in ((16, 2, 64, 4), (1024, 512, 2048, 16), (32, 128, 32, 64)):
        monkeypatch.setattr(launches.Sizes, "of", lambda _, sizes=sizes: launches.Sizes(*sizes))
        _compare(logits_NV, kind, device)


@on_devices
@pytest.mark.usefixtures("own_sizes")
@pytest.mark.parametrize("kind", ["threshold", "top_k"])
def test_the_tuning_table_runs(kind: str, device: str) -> None:
    _compare(_zipf(2, 5000), kind, device, draws=50)


@pytest.mark.slow
@on_devices
@pytest.mark.usefixtures("own_sizes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("vocabulary", "half"), [(32_000, False), (128_256, True), (151_936, False), (262_144, False), (262_144, True)]
)
def test_large_vocabularies(vocabulary: int, half: bool, kind: str, device: str) -> None:
    logits_NV = _zipf(2, vocabulary)
    _compare(logits_NV.bfloat16() if half else logits_NV, kind, device, draws=50)


@pytest.mark.slow
@on_devices
@pytest.mark.usefixtures("own_sizes")
@pytest.mark.parametrize("kind", ["threshold", "stratified", "top_k"])
def test_the_largest_vocabulary_and_the_most_draws(kind: str, device: str) -> None:
    """2**22 equal ids: the row's sum needs 62 bits, times 4096 draws 74."""
    _compare(torch.zeros(1, 1 << 22, dtype=torch.bfloat16), kind, device, draws=4096 if kind == "top_k" else 64)
    _compare(_zipf(1, 5000), kind, device, draws=4096)


# ---- random numbers and scans ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _words(draws, out, sequence, row, seed_low, seed_high, STREAM: tl.constexpr, D: tl.constexpr):
    lane = tl.arange(0, D)
    word = device_code.draw64(tl.load(draws + lane), tl.load(sequence), tl.load(row), seed_low, seed_high, STREAM)
    tl.store(out + lane, word.to(tl.int64, bitcast=True))


@on_devices
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of the Random123 distribution, philox4x32 10
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([M, M, M, M], [M, M], "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers_triton_6832(counter: list[int], key: list[int], words: str, device: str) -> None:
    """A 64-bit counter silently selected another generator."""
    draws_D = torch.tensor([2 * counter[0], 2 * counter[0] + 1], device=device)
    out_D = torch.empty(2, dtype=torch.int64, device=device)
    sequence, row = counter[1] >> 24 | counter[2] << 8, counter[1] & 0xFFFFFF
    sequence_1, row_1 = torch.tensor([sequence], device=device), torch.tensor([row], device=device)
    _words[(1,)](draws_D, out_D, sequence_1, row_1, *key, STREAM=counter[3], D=2)
    got = [word >> shift & M for word in out_D.tolist() for shift in (0, 32)]
    assert " ".join(f"{word:08x}" for word in got) == words


@triton.jit
def _scans(x, rows, flat, high, loops, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    value = tl.load(x + r * C + c)
    tl.store(rows + r * C + c, tl.cumsum(value, 1))
    tl.store(high + r * C + c, tl.umulhi(value.to(tl.uint64), value.to(tl.uint64) << 20).to(tl.int64))
    lane = tl.arange(0, R * C)
    tl.store(flat + lane, tl.cumsum(tl.load(x + lane), 0))
    for i in range(0, R):
        column = tl.arange(0, C)
        tl.store(loops + i * C + column, tl.cumsum(tl.load(x + i * C + column), 0))


@on_devices
def test_scans_of_the_device_triton_2361_4362(device: str) -> None:
    """int64 scans of one and two dimensions, in a loop too, were wrong on some devices; and the 128-bit product."""
    generator = torch.Generator().manual_seed(0)
    x_RC = torch.randint(0, 1 << 40, (8, 512), generator=generator)
    rows_RC, flat_RC, high_RC, loops_RC = (torch.empty_like(x_RC, device=device) for _ in range(4))
    _scans[(1,)](x_RC.to(device), rows_RC, flat_RC, high_RC, loops_RC, R=8, C=512)
    assert torch.equal(rows_RC.cpu(), x_RC.cumsum(1))
    assert torch.equal(loops_RC.cpu(), x_RC.cumsum(1))
    assert torch.equal(flat_RC.cpu().flatten(), x_RC.flatten().cumsum(0))
    assert high_RC.flatten().tolist() == [x * (x << 20) >> 64 for x in x_RC.flatten().tolist()]


def test_single_weights_are_those_of_whole_rows() -> None:
    logits_NV = _zipf(3, 1000).bfloat16()
    top_N = logits_NV.amax(1).float()
    for exponent in (1.0, 0.7, 4.0):
        weights_NP = Weigher(3, 1000, logits_NV.device)(logits_NV, top_N.unsqueeze(1), exponent).weights_GP
        assert torch.equal(weights_NP[:, :1000], whole(logits_NV.float(), top_N.unsqueeze(1), exponent))


# ---- order, errors, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40, 1 << 12])  # 4,096 rows of 22-bit ids do not fit one integer
def test_order_with_one_sort_and_with_two(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    row_E = torch.randint(0, rows, (5000,), generator=generator)
    id_E = torch.randperm(1 << 22, generator=generator)[:5000]
    weight_E = torch.randint(1, 9, (5000,), generator=generator) / 8
    sampled_E = torch.randint(0, 2, (5000,), generator=generator)
    picked, order_E = in_order(Picked(row_E, id_E, weight_E, sampled_E), 22, rows)
    wanted = sorted(
        zip(row_E.tolist(), sampled_E.tolist(), (-weight_E).tolist(), id_E.tolist(), range(5000)), key=lambda e: e[:4]
    )
    assert [(r, s, -w, i) for r, s, w, i in zip(
        picked.row_E.tolist(), picked.sampled_E.tolist(), picked.weight_E.tolist(), picked.id_E.tolist()
    )] == [e[:4] for e in wanted]  # fmt: skip
    assert order_E.tolist() == [e[4] for e in wanted]


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_logits_name_the_first_row(bad: float, kind: str, device: str) -> None:
    """vLLM 43249: -inf + inf gave NaN and ids outside the vocabulary. Here every step runs on such rows, and then refuses."""
    logits_NV = _zipf(5, 150)
    for row in (2, 4):
        if bad == -math.inf:
            logits_NV[row] = bad
        else:
            logits_NV[row, 149] = bad
    errors = []
    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match="row 2 holds NaN or \\+inf") as error:
            _run(logits_NV.to(device), kind, impl)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@on_devices
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels_N", [0, 1, 150]),
        ("labels_N", [0, -100, -1]),
        ("sequence_N", [0, 1, 1 << 40]),
        ("row_N", [0, 1, 1 << 24]),
        ("row_N", [0, -1, 1]),
    ],
)
def test_values_out_of_range(name: str, value: list[int], device: str) -> None:
    errors = []
    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match=f"`{name}` runs from") as error:
            _run(_zipf(3, 150).to(device), "threshold", impl, **{name: torch.tensor(value)})
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match="impl"):
        _run(_zipf(2, 10), "top_k", "cuda")


@on_devices
def test_no_rows_and_one_id(device: str) -> None:
    for kind in KINDS:
        _compare(torch.zeros(0, 30), kind, device)
        _compare(torch.zeros(2, 1), kind, device, labels_N=torch.tensor([0, -100]))


@on_devices
def test_indices_at_odd_addresses_flash_attention(device: str) -> None:
    """int64 labels at an address that is no multiple of 16 bytes were read wrongly."""
    logits_NV, labels_N, sequence_N, row_N = _zipf(4, 100), torch.arange(5), torch.arange(5) * 7, torch.arange(5) + 3
    for kind in ("threshold", "stratified"):
        wanted = _run(
            logits_NV, kind, "reference",
            labels_N=labels_N[1:].clone(), sequence_N=sequence_N[1:].clone(), row_N=row_N[1:].clone(),
        )  # fmt: skip
        moved = [x.to(device)[1:] for x in (labels_N, sequence_N, row_N)]
        found = _run(logits_NV.to(device), kind, "triton", labels_N=moved[0], sequence_N=moved[1], row_N=moved[2])
        _assert_same(found, wanted, device)
        every_other = torch.arange(8, device=device).repeat_interleave(2)
        strided = _run(
            logits_NV.to(device), kind, "triton", labels_N=moved[0], sequence_N=moved[1], row_N=every_other[::2][:4]
        )
        plain = _run(
            logits_NV, kind, "reference", labels_N=labels_N[1:], sequence_N=sequence_N[1:], row_N=torch.arange(4)
        )
        _assert_same(strided, plain, device)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation made, views of the given one apart."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given, self.elements = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_all_logits_vllm_5907(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of prompts were made as float32 [tokens, vocabulary] beside the logits: out of memory."""
    monkeypatch.setattr(weights_module, "GROUP_ELEMENTS", 2 * 4096)
    monkeypatch.setattr(weights_module, "CHUNK_ELEMENTS", 4096)
    logits_NV = _zipf(40, 4000)
    with _Largest(logits_NV) as seen:
        _run(logits_NV, kind, "reference")
    assert 4096 <= seen.elements <= 2 * 4096


@pytest.mark.gpu
def test_memory_on_a_gpu_vllm_5907() -> None:
    """2,048 rows of 128,256: a few per cent of the logits."""
    logits_NV = torch.randn(2048, 128_256, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for kind in ("threshold", "random", "systematic", "stratified"):
        _run(logits_NV, kind, "triton", draws=50)
        assert torch.cuda.max_memory_allocated() - before < 0.1 * logits_NV.numel() * 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_one_wait_for_the_device(kind: str) -> None:
    logits_NV = _zipf(64, 3000).cuda()
    index_N = torch.arange(64, device="cuda")

    def call() -> SparseTargets:
        return sample(logits_NV, index_N, kind=kind, draws=20, seed=1, sequence_N=index_N, row_N=index_N)

    call()  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.gpu
def test_past_two_to_the_31_logits_torch_90793() -> None:
    """16,745 rows of 128,256: offsets of 32 bits wrapped."""
    rows, vocabulary = 16_745, 128_256
    logits_NV = torch.zeros(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    logits_NV[-2:] = _zipf(2, vocabulary).bfloat16().cuda()
    sequence_N = torch.arange(rows) // 512
    for kind in ("threshold", "top_k"):
        found = _run(logits_NV, kind, "triton", sequence_N=sequence_N, row_N=torch.arange(rows) % 512)
        last = _run(
            logits_NV[-2:].cpu(), kind, "reference", labels_N=torch.tensor([rows - 2, rows - 1]),
            sequence_N=sequence_N[-2:], row_N=torch.arange(rows)[-2:] % 512,
        )  # fmt: skip
        start = int(found.offsets[-3])
        assert found.ids[start:].tolist() == last.ids.tolist()
        assert found.weights[start:].tolist() == last.weights.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    logits_NV = _zipf(3, 500)
    with torch.cuda.device(0):
        _assert_same(
            _run(logits_NV.to("cuda:1"), "threshold", "triton"), _run(logits_NV, "threshold", "reference"), "cuda"
        )
