"""The compiled samplers against the PyTorch reference, which is the definition: the same bits, nothing outside a buffer.

As a script it is the worker of the sanitizer test: `python test_sample_rows.py MODULE ROUNDS` throws random rows at a module.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.kernels.sample import dispatch, reference, rows, sample
from stillroom.kernels.sample.checks import IGNORE_LABEL
from stillroom.kernels.targets import SparseTargets

compiled = pytest.mark.skipif(not rows.COMPILED, reason="no compiler when this was installed")
GUARD = 0xA5
VOCABULARIES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 4096, 4097]
DRAWS = [1, 2, 5, 50, 128, 4096]
ENTRY_TYPES, ROW_TYPES = ("i8", "i4", "f4", "f4", "u1"), ("f4", "f4", "i8", "i8")


def rows_of(vocabulary: int, many: int, seed: int) -> torch.Tensor:
    """Rows of every sort in turn: peaked, flat without a head, one id alone, many ties, excluded ids, far tails."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(many, vocabulary, generator=generator) * torch.linspace(0.0, 12.0, many).unsqueeze(1)
    for n in range(many):
        if n % 6 == 1:
            logits_NV[n] = -1.3
        elif n % 6 == 2:
            logits_NV[n] = -math.inf
            logits_NV[n, int(torch.randint(0, vocabulary, (1,), generator=generator))] = 1e30
        elif n % 6 == 3:
            logits_NV[n].round_()
        elif n % 6 == 4:
            away_V = torch.rand(vocabulary, generator=generator) < 0.7
            away_V[int(torch.randint(0, vocabulary, (1,), generator=generator))] = False
            logits_NV[n, away_V] = -math.inf
        elif n % 6 == 5:
            logits_NV[n] *= 40.0
    return logits_NV


def both(logits_NV: torch.Tensor, kind: str, draws: int, seed: int = 7) -> SparseTargets:
    """The targets of `auto`, which are held equal to those of the reference."""
    many, vocabulary = logits_NV.shape
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(-1, vocabulary, (many,), generator=generator)
    options: dict[str, Any] = dict(
        kind=kind,
        draws=draws,
        seed=seed * 0x9E3779B97F4A7C15 % (1 << 64),
        sequence_N=torch.randint(0, 1 << 40, (many,), generator=generator),
        row_N=torch.randint(0, 1 << 24, (many,), generator=generator),
    )
    labels_N[labels_N < 0] = IGNORE_LABEL
    ours = sample(logits_NV, labels_N, **options)
    plain = sample(logits_NV, labels_N, impl="reference", **options)
    for name in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        got, wanted = getattr(ours, name), getattr(plain, name)
        assert got.dtype == wanted.dtype, name
        assert torch.equal(got, wanted), f"{name} of {kind}, V = {logits_NV.shape[1]}, N = {draws}"
    return ours


@pytest.fixture
def never_reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`auto` takes the compiled loops; how often it did."""
    taken: list[int] = []

    def counted(*arguments: Any) -> SparseTargets:
        taken.append(1)
        return genuine(*arguments)

    genuine = rows.sample
    monkeypatch.setattr(dispatch.rows, "sample", counted)
    return taken


def test_it_was_compiled_if_it_could_be() -> None:
    assert rows.COMPILED or which("cc") is None


@compiled
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", rows.KINDS)
def test_the_same_bits_as_the_reference(kind: str, half: bool, never_reference: list[int]) -> None:
    for seed, vocabulary in enumerate(VOCABULARIES):
        logits_NV = rows_of(vocabulary, 13, seed)
        for draws in DRAWS:
            both(logits_NV.bfloat16() if half else logits_NV, kind, draws, seed)
    assert len(never_reference) == len(VOCABULARIES) * len(DRAWS)


@compiled
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_large_vocabularies(vocabulary: int) -> None:
    logits_NV = rows_of(vocabulary, 6, 1)
    for kind in rows.KINDS:
        both(logits_NV, kind, 50)
    both(logits_NV.bfloat16(), "threshold", 4096)


@compiled
def test_totals_past_two_to_the_53() -> None:
    """4 M equal logits weigh 2**61.6: sums of a row only fit whole numbers, and products with them only 128 bits."""
    logits_NV = torch.zeros(1, 1 << 22)
    logits_NV[0, ::3] = -0.3
    for kind in ("threshold", "stratified"):
        both(logits_NV, kind, 4096)


@compiled
@pytest.mark.parametrize("widest", [0, 1, 2, 3])
def test_the_same_bits_at_every_width_of_vectors(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WIDEST", widest)
    for vocabulary in (1, 17, 1003, 9000):
        logits_NV = rows_of(vocabulary, 12, vocabulary)
        for kind in rows.KINDS:
            both(logits_NV, kind, 50)
        both(logits_NV.bfloat16(), "threshold", 50)


@compiled
@pytest.mark.parametrize("kind", rows.KINDS)
def test_threads_and_pieces_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV = rows_of(1003, 41, 3)
    for threads, least, room in (
        (1, 1, 1 << 21),
        (2, 1, 1 << 21),
        (3, 1000, 1 << 21),
        (64, 1, 1 << 21),
        (2, 1, 200),
        (2, 1, 1),
    ):
        torch.set_num_threads(threads)
        monkeypatch.setattr(rows, "THREAD_LOGITS", least)
        monkeypatch.setattr(rows, "MAX_ENTRIES", room)
        both(logits_NV, kind, 20)


@compiled
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_the_first_bad_row_is_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "THREAD_LOGITS", 1)
    monkeypatch.setattr(rows, "MAX_ENTRIES", 200)  # three rows at a time
    torch.set_num_threads(2)
    for column in (0, 64, 999, 1002):
        for half in (False, True):
            logits_NV = rows_of(1003, 20, 0)
            logits_NV[11, column] = value
            logits_NV[8, column] = value
            logits_NV[17] = -math.inf
            for first in (8, 11, 17):
                with pytest.raises(ValueError, match=f"row {first} holds NaN") as ours:
                    both(logits_NV.bfloat16() if half else logits_NV, "threshold", 50)
                with pytest.raises(ValueError) as plain:
                    _plain(logits_NV)
                assert str(ours.value) == str(plain.value)
                logits_NV[first] = 0.0
            both(logits_NV, "threshold", 50)


def _plain(logits_NV: torch.Tensor) -> SparseTargets:
    n_N = torch.arange(len(logits_NV))
    keys: dict[str, Any] = dict(kind="threshold", draws=50, seed=0, sequence_N=n_N, row_N=n_N, impl="reference")
    return sample(logits_NV, n_N, **keys)


@compiled
def test_what_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kinds, an exponent, rows apart, `impl="reference"`, and everything where nothing was compiled."""
    went: list[str] = []
    genuine = reference.sample

    def counted(logits_NV: torch.Tensor, request: Any) -> SparseTargets:
        went.append(request.kind)
        return genuine(logits_NV, request)

    monkeypatch.setattr(reference, "sample", counted)
    logits_NV, n_N = rows_of(70, 9, 0), torch.arange(9)
    keys: dict[str, Any] = dict(draws=5, seed=0, sequence_N=n_N, row_N=n_N)
    sample(logits_NV, n_N, kind="threshold", **keys)
    assert not went
    sample(logits_NV, n_N, kind="top_k", **keys)
    sample(logits_NV, n_N, kind="random", exponent=0.9, **keys)
    sample(logits_NV[:, 3:], n_N, kind="threshold", **keys)
    sample(logits_NV, n_N, kind="threshold", impl="reference", **keys)
    monkeypatch.setattr(rows, "_HELPER", None)
    sample(logits_NV, n_N, kind="systematic", **keys)
    assert went == ["top_k", "random", "threshold", "threshold", "systematic"]


@compiled
def test_inputs_of_all_manners() -> None:
    """Under inference mode, with a gradient, at odd addresses, keys that are not contiguous; nothing is written to them."""
    logits_NV, apart_N2 = rows_of(70, 9, 0), torch.arange(18).view(9, 2)
    keys: dict[str, Any] = dict(kind="threshold", draws=5, seed=3, sequence_N=apart_N2[:, 0], row_N=apart_N2[:, 1])
    wanted = sample(logits_NV, apart_N2[:, 0], impl="reference", **keys)
    odd = torch.empty(9 * 70 + 1)[1:].view(9, 70).copy_(logits_NV)
    with torch.inference_mode():
        inner = sample(logits_NV.clone(), apart_N2[:, 0], **keys)
    for got in (
        inner,
        sample(odd, apart_N2[:, 0], **keys),
        sample(logits_NV.clone().requires_grad_(), apart_N2[:, 0], **keys),
    ):
        assert torch.equal(got.ids, wanted.ids)
        assert torch.equal(got.logp, wanted.logp)
    assert torch.equal(odd, logits_NV)


# ---- the helper itself ---------------------------------------------------------------------------------------------


def throw(helper: Any, rng: np.random.Generator) -> str:
    """One call with random rows, sometimes bad ones or buffers that do not fit; what came of it."""
    kind, draws, half = int(rng.integers(4)), int(rng.choice(DRAWS)), bool(rng.integers(2))
    vocab, many = int(rng.choice([*VOCABULARIES[:-2], 700])), int(rng.integers(0, 5))
    logits = (rng.normal(size=(many, vocab)) * rng.choice([0.0, 1.0, 9.0, 1e3])).astype(np.float32)
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.5])] = -np.inf
    how = str(rng.choice(["value", "label", "short", "settings"])) if rng.random() < 0.5 else ""
    if how == "value" and logits.size:
        logits.flat[rng.integers(logits.size)] = rng.choice([np.nan, np.inf, -np.nan])
    bad_N = ~np.isfinite(logits.max(1))
    if half:
        logits = (logits.view(np.uint32) >> 16).astype(np.uint16) | (np.isnan(logits).astype(np.uint16) << 6)
    labels = rng.integers(-1, vocab, many)
    if how == "label" and many:
        labels[rng.integers(many)] = rng.choice([vocab, 1 << 62])
    keys = [rng.integers(0, 1 << 40, many), rng.integers(0, 1 << 24, many)]
    whole: list[np.ndarray] = []

    def fenced(count: int, dtype: str) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        whole.append(np.full(size + 64, GUARD, np.uint8))
        return whole[-1][:size].view(dtype)

    most = min(draws + 1, vocab)
    out = [fenced(many * most, t) for t in ENTRY_TYPES] + [fenced(many, t) for t in ROW_TYPES]
    buffers = [logits, labels, *keys, *out]
    if how == "short":
        place = int(rng.integers(len(buffers)))
        buffers[place] = buffers[place].reshape(-1)[:-1]
    settings = [kind, draws, vocab]
    if how == "settings":
        settings[int(rng.integers(3))] = int(rng.choice([-1, 4097, (1 << 22) + 1]))
    got = helper.sample(3, *settings, half, int(rng.integers(1 << 63)), *buffers)
    assert all((w[-64:] == GUARD).all() for w in whole)
    if got == -1:
        assert how in ("label", "short", "settings")
        return "refused"
    if got < -1:
        assert bad_N.nonzero()[0][0] == -2 - got
        return "bad row"
    assert how not in ("short", "settings") or not many
    assert not bad_N.any()
    row_E, id_E = out[0][:got], out[1][:got]
    assert ((id_E >= 0) & (id_E < vocab)).all()
    assert (np.diff(row_E) >= 0).all()
    assert len(np.unique(row_E * vocab + id_E)) == got
    np.testing.assert_allclose(np.bincount(row_E, out[2][:got], many), 1.0, rtol=1e-5)
    return "taken"


@compiled
def test_random_calls_stay_in_their_buffers() -> None:
    from stillroom.kernels.sample import _rows

    rng = np.random.default_rng(0)
    came = [throw(_rows, rng) for _ in range(3000)]
    assert came.count("taken") > 1000
    assert came.count("refused") > 300
    assert came.count("bad row") > 200


@pytest.mark.slow
def test_no_byte_outside_its_buffers_is_touched(tmp_path: Path) -> None:
    """Random calls under the address and undefined-behaviour sanitizers."""
    source = Path(rows.__file__).resolve().parent / "rows.c"
    build = ["cc", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", "-fopenmp-simd", "-fno-sanitize-recover=all"]
    build += ["-fsanitize=address,undefined,float-cast-overflow", f"-I{sysconfig.get_paths()['include']}"]
    target = tmp_path / "_rows.abi3.so"
    subprocess.run([*build, str(source), "-o", str(target), "-lm"], check=True)
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    run = subprocess.run(
        [sys.executable, __file__, str(target), "20000"],
        env={"LD_PRELOAD": library.strip(), "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "taken" in run.stdout


def main() -> None:
    spec = importlib.util.spec_from_file_location("_rows", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    rng = np.random.default_rng(1)
    came = [throw(helper, rng) for _ in range(int(sys.argv[2]))]
    print({word: came.count(word) for word in set(came)})


if __name__ == "__main__":
    main()
