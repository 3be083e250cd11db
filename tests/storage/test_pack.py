"""The compiled loops of writing against the numpy encoder, which is the definition: the same codes, nothing outside a buffer.

As a script it is the worker of the sanitizer test: `python test_pack.py MODULE ROUNDS` throws random rows at a module.

Shapes: `R` rows, `E` entries, `T` tail entries.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage import encode, pack
from stillroom.storage.codes import PIVOT, logp_scale, round_systematic, tail_units
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

compiled = pytest.mark.skipif(not pack.COMPILED, reason="no compiler when this was installed")
GUARD = 0xA5
DRAWS = [1, 2, 5, 20, 43, 114, 300, 4096]
DAMAGE = ["swap", "twice", "id", "weight", "weights", "logp", "pivot", "offsets", "rounding", "room", "short"]


def counts_row(rng: np.random.Generator, draws: int, vocab: int) -> tuple[np.ndarray, ...]:
    """Ids, weights and log p of a row of counts, sorted; the log p are made up."""
    many = int(rng.integers(1, min(draws, vocab, 300 if rng.random() < 0.05 else 12) + 1))
    count = 1 + rng.multinomial(draws - many, rng.dirichlet(np.full(many, rng.choice([0.1, 1.0, 100.0]))))
    ids = rng.choice(vocab, many, replace=False)
    order = np.lexsort((ids, -count))
    return ids[order], (count[order] / draws).astype(np.float32), np.full(many, -1, np.float32)


def threshold_row(rng: np.random.Generator, draws: int, vocab: int) -> tuple[np.ndarray, ...]:
    """The same of a threshold row: with and without a head, with and without a tail, with ties."""
    pivot, most = logp_scale(draws).pivot_logp, min(draws, vocab // 2)
    heads = int(rng.integers(0, min(most, 300 if rng.random() < 0.05 else 9) + 1))
    p = rng.dirichlet(np.full(heads, rng.choice([0.3, 100.0]))) if heads else np.zeros(0)
    if heads and rng.random() < 0.3:
        p[:] = 1 / heads
    p = p if rng.random() < 0.2 else p * rng.random()
    p = p[np.log(p, where=p > 0, out=np.full(heads, -np.inf)).astype(np.float32) >= pivot]
    tau = max(0.0, 1 - p.sum())
    tails = min(max(1, int(draws * tau)), most) if tau > 1e-6 else 0
    ids = rng.choice(vocab, len(p) + tails, replace=False)
    p = p.astype(np.float32)
    order = np.lexsort((ids[: len(p)], -p))
    ids = np.concatenate([ids[: len(p)][order], np.sort(ids[len(p) :])])
    weights = np.append(p[order], np.full(tails, tau / max(tails, 1))).astype(np.float32)
    below = np.nextafter(pivot, np.float32(-np.inf)) - rng.choice([0, 1e-3, 3, 30, np.inf], tails).astype(np.float32)
    return ids, weights, np.append(np.maximum(np.log(p[order]), pivot), below).astype(np.float32)


def rows_of(rng: np.random.Generator, spec: SamplerSpec, vocab: int, rows: int) -> SparseTargets:
    """Rows as a sampler gives them; one in six is empty."""
    row = threshold_row if spec.kind == "threshold" else counts_row
    made = [row(rng, spec.draws, vocab) for _ in range(rows)]
    made = [tuple(x[:0] for x in r) if rng.random() < 1 / 6 else r for r in made]
    ids, weights, logp = (np.concatenate([r[k] for r in made]) for k in range(3))
    return SparseTargets(
        offsets=np.cumsum([0, *[len(r[0]) for r in made]]),
        ids=ids.astype(np.int32),
        weights=weights,
        label_logp=rng.normal(-3, 2, rows).astype(np.float32),
        entropy=rng.random(rows).astype(np.float32),
        logp=None if spec.keep_logp == "none" else logp,
    )


def damage(rng: np.random.Generator, how: str, columns: dict[str, np.ndarray], vocab: int, pivot: float) -> None:
    """One thing wrong, or nothing where there are no entries to change."""
    entries = len(columns["ids"])
    i, j = rng.integers(0, max(entries, 1), 2)
    if how == "rounding":
        columns["rounding"] = columns["rounding"].copy()
        columns["rounding"][rng.integers(len(columns["rounding"])), rng.integers(2)] = rng.choice(
            [-1, 1, np.nan, 1e300]
        )
    elif how == "offsets":
        columns["offsets"][rng.integers(len(columns["offsets"]))] += int(rng.choice([-9, -1, 1, 5000, 1 << 62]))
    elif how == "short":
        name = str(rng.choice(["ids", "weights", "logp", "offsets"]))
        columns[name] = columns[name][: int(rng.integers(0, len(columns[name]) + 1))]
    elif not entries:
        return
    elif how == "swap":
        for name in ("ids", "weights", "logp"):
            columns[name][[i, j]] = columns[name][[j, i]]
    elif how == "twice":
        columns["ids"][i] = columns["ids"][max(i - rng.integers(1, 4), 0)]
    elif how == "id":
        columns["ids"][i] = rng.choice([-1, vocab, vocab - 1, -(1 << 31), (1 << 31) - 1])
    elif how == "weight":
        columns["weights"][i] = rng.choice([np.nan, np.inf, -np.inf, -1, -0.0, 1e-30, 2, 3e38])
    elif how == "weights":
        columns["weights"] *= np.float32(rng.choice([0.999, 1.0005, 1.01, 1.5]))
    elif how == "logp":
        columns["logp"][i] = rng.choice([np.nan, np.inf, -np.inf])
    elif how == "pivot":
        columns["logp"][i] = rng.choice([pivot, np.nextafter(np.float32(pivot), np.float32(-99))])


class Fenced:
    """Output arrays with guard bytes behind them."""

    def __init__(self) -> None:
        self.whole: list[np.ndarray] = []

    def __call__(self, count: int, dtype: str) -> np.ndarray:
        size = max(count, 0) * np.dtype(dtype).itemsize
        self.whole.append(np.full(size + 64, GUARD, np.uint8))
        return self.whole[-1][:size].view(dtype)

    def check(self) -> None:
        assert all((w[-64:] == GUARD).all() for w in self.whole)


def throw(helper, rng: np.random.Generator) -> str:
    """One round of random rows, often damaged; what came of it."""
    kind, draws = str(rng.choice(["threshold", "random"])), int(rng.choice(DRAWS))
    vocab = int(rng.choice([700, 70_000, 1 << 24])) if draws < 4096 else 1 << 20
    spec = SamplerSpec(kind=kind, draws=draws)
    whole = rows_of(rng, spec, vocab, rows=int(rng.integers(1, 5)))
    columns = {name: getattr(whole, name).copy() for name in ("offsets", "ids", "weights", "logp")}
    columns["rounding"] = rng.random((whole.rows, 3))
    how = str(rng.choice(DAMAGE)) if rng.random() < 0.6 else ""
    damage(rng, how, columns, vocab, float(logp_scale(draws).pivot_logp))
    entries, rows, fenced = len(columns["ids"]), len(columns["offsets"]) - 1, Fenced()
    room = [entries, entries, rows, rows, entries, entries]
    if how == "room":
        room[int(rng.integers(6))] -= 1
    csr = (columns["offsets"], columns["ids"], columns["weights"])
    code = fenced(room[0], "u4")
    if kind == "random":
        count, heads = fenced(room[1], "u1" if draws <= 255 else "u2"), fenced(room[2], "i8")
        got = helper.counts(draws, vocab, *csr, count, code, heads)
    else:
        scale, tails, small = logp_scale(draws), tail_units(draws), "u1" if draws + 1 <= 255 else "u2"
        n_head, tail = fenced(room[2], small), fenced(room[3], "u1" if len(tails) == 256 else "u2")
        logp_head, logp_tail = fenced(room[4], "u1"), fenced(room[5], "f8")
        inputs = (*csr, columns["logp"], columns["rounding"], scale.p[PIVOT:], tails)
        pivot = float(scale.pivot_logp)
        got = helper.threshold(draws, vocab, pivot, *inputs, code, n_head, tail, logp_head, logp_tail)
    fenced.check()
    if got < 0:
        assert how, f"refused what {spec} gave"
        return "refused"
    unused = np.zeros(rows, np.float32)
    targets = SparseTargets(*csr, unused, unused, columns["logp"] if kind == "threshold" else None)
    # Raises where the helper took what numpy refuses.
    plain = SimpleNamespace(sampler=replace(spec, keep_logp="none") if kind == "random" else spec, vocab_size=vocab)
    wanted, head_R = encode._by_numpy(plain, targets, columns["rounding"])
    np.testing.assert_array_equal(code[:entries], wanted["id"])
    assert got == head_R.sum()
    if kind == "random":
        np.testing.assert_array_equal(heads[:rows], head_R)
        np.testing.assert_array_equal(count[:got], wanted["count"])
        return "taken"
    np.testing.assert_array_equal(n_head[:rows], head_R)
    np.testing.assert_array_equal(tail[:rows], wanted["tail"])
    np.testing.assert_array_equal(logp_head[:got], wanted["logp_head"])
    p_T, code_T = np.exp(logp_tail[: entries - got]), fenced(entries - got, "u1")
    offsets = np.append(0, np.cumsum(np.diff(targets.offsets) - head_R))
    done = helper.round(offsets, p_T, scale.p[:PIVOT], columns["rounding"], 2, 3, 0, code_T)
    fenced.check()
    assert done == 1
    np.testing.assert_array_equal(code_T, wanted["logp_tail"])
    return "taken"


def test_it_was_compiled_if_it_could_be():
    assert pack.COMPILED or which("cc") is None


@compiled
def test_random_rows_are_refused_or_encoded_as_numpy_encodes_them():
    from stillroom.storage import _pack

    rng = np.random.default_rng(0)
    came = [throw(_pack, rng) for _ in range(4000)]
    assert came.count("taken") > 1500
    assert came.count("refused") > 1000


def encoded(manifest, targets: SparseTargets, rounding: np.ndarray) -> dict[str, np.ndarray] | str:
    """Arrays and lengths, or the error."""
    try:
        rows = encode.encode_rows(manifest, np.zeros((1, targets.rows + 1), np.uint32), targets, rounding)
    except ValueError as error:
        return str(error)
    return rows.arrays | {f"lengths of {name}": length for name, length in rows.lengths.items()}


@compiled
@pytest.mark.parametrize("keep_logp", ["all", "head", "none"])
@pytest.mark.parametrize("kind", ["threshold", "random", "systematic", "stratified"])
def test_one_door_the_same_arrays_and_errors(made, monkeypatch, kind, keep_logp):
    if (kind, keep_logp) == ("threshold", "none"):
        pytest.skip("no such sampler")
    rng, answers, errors = np.random.default_rng(1), [], set()

    def packing(*arguments):
        answers.append(pack.pack(*arguments) is not None)
        return pack.pack(*arguments)

    for _ in range(150):
        spec = SamplerSpec(kind=kind, draws=int(rng.choice(DRAWS[:-1])), keep_logp=keep_logp)
        manifest = made.manifest(spec, vocab_size=70_000, seq_len=6)
        targets, rounding = rows_of(rng, spec, 70_000, 6), rng.random((6, 3))
        columns = {name: getattr(targets, name) for name in ("ids", "weights", "logp")}
        columns = {name: (c if c is not None else targets.weights).copy() for name, c in columns.items()}
        if broken := rng.random() < 0.5:
            damage(rng, str(rng.choice(DAMAGE[:7])), columns, 70_000, float(logp_scale(spec.draws).pivot_logp))
        columns["logp"] = None if targets.logp is None else columns["logp"]
        targets = replace(targets, **columns)
        monkeypatch.setattr(encode, "pack", packing)
        with np.errstate(all="ignore"):  # an infinite log p of counts is rounded, with a warning
            helped = encoded(manifest, targets, rounding)
            monkeypatch.setattr(encode, "pack", lambda *a: None)
            plain = encoded(manifest, targets, rounding)
        assert broken or answers[-1]
        if isinstance(plain, str) or isinstance(helped, str):
            assert helped == plain
            errors.add(plain)
            continue
        assert helped.keys() == plain.keys()
        for name, array in plain.items():
            np.testing.assert_array_equal(helped[name], array, err_msg=name)
    assert answers.count(True) > 75
    assert answers.count(False) > 15
    assert len(errors) > 2


@compiled
@pytest.mark.parametrize("spec", [SamplerSpec(draws=20), SamplerSpec(kind="random", draws=20, keep_logp="none")])
def test_the_same_files(made, tmp_path, monkeypatch, spec):
    records = []
    for helper in (pack._HELPER, None):
        monkeypatch.setattr(pack, "_HELPER", helper)
        writer = made.write(tmp_path / str(helper is None), made.manifest(spec, vocab_size=300_000))
        records.append([writer.record(k).objects for k in range(2)])
    assert records[0] == records[1]


@compiled
def test_arrays_that_are_not_contiguous(made):
    spec = SamplerSpec(draws=20)
    manifest, rng = made.manifest(spec, vocab_size=700, seq_len=6), np.random.default_rng(2)
    targets, wide = rows_of(rng, spec, 700, 6), rng.random((6, 8))
    apart = {name: np.repeat(getattr(targets, name), 2)[::2] for name in ("ids", "weights", "logp")}
    packed = pack.pack(manifest, replace(targets, **apart), wide[:, 2:5])
    assert packed is not None
    wanted, _ = encode._by_numpy(manifest, targets, wide[:, 2:5].copy())
    for name, array in wanted.items():
        np.testing.assert_array_equal(packed[0][name], array)


@compiled
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, (1 << 24) - 1), max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_planes(codes: list[int], planes: int, spare: int):
    code_E, fenced = np.array(codes, np.uint32), Fenced()
    high = fenced(planes * (-(-len(codes) // 8) + spare), "u1").reshape(planes, -1)
    high[:] = 0
    assert pack.pack_planes(code_E, high)
    fenced.check()
    bits = np.unpackbits(high, axis=1, bitorder="little", count=len(codes)).astype(np.uint32)
    np.testing.assert_array_equal(
        (bits << np.arange(planes, dtype=np.uint32)[:, None]).sum(0), code_E >> 16 & (1 << planes) - 1
    )
    from stillroom.storage import _pack

    if len(codes) % 8 == 1:
        assert _pack.planes(code_E, planes, np.zeros(planes * (len(codes) // 8), np.uint8)) == -1


@compiled
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1.5) | st.sampled_from([0.25, 0.5, 1.0]), max_size=6), max_size=5),
    st.lists(st.floats(1e-3, 1.0) | st.just(0.5), min_size=2, max_size=9),
    st.integers(0, 1 << 30),
)
def test_rounding(runs: list[list[float]], levels: list[float], seed: int):
    from stillroom.storage import _pack

    level_C, value_E = np.sort(levels), np.array([x for run in runs for x in run])
    sizes, uniform_R = (
        np.array([len(run) for run in runs], np.int64),
        np.random.default_rng(seed).random((len(runs), 1)),
    )
    offsets, fenced = np.append(0, np.cumsum(sizes)), Fenced()
    got = fenced(len(value_E), "u1")
    assert _pack.round(offsets, value_E, level_C, uniform_R, 0, 1, 0, got) == 1
    fenced.check()
    first_E, uniform_E = np.repeat(offsets[:-1], sizes), np.repeat(uniform_R[:, 0], sizes)
    np.testing.assert_array_equal(got, round_systematic(value_E, level_C, first_E, uniform_E))


@compiled
def test_rounding_refuses_what_does_not_fit():
    from stillroom.storage import _pack

    good = [
        np.array([0, 2]),
        np.array([0.3, 0.5]),
        np.array([0.25, 1.0]),
        np.array([[0.5]]),
        0,
        1,
        0,
        np.zeros(2, np.uint8),
    ]
    assert _pack.round(*good) == 1
    wrong = [
        (0, np.array([0, 3])), (0, np.array([1, 2])), (0, np.array([0, -2])), (0, np.array([0, 1])), (1, np.array([np.nan, 1])),
        (1, np.array([np.inf, 1])),
        (2, np.array([1.0, 0.25])), (2, np.array([0.0, 1.0])), (2, np.array([0.5])), (2, np.array([1e-300, 1.0])),
        (3, np.array([[1.0]])), (3, np.array([[np.nan]])), (3, np.zeros((2, 1))), (4, 1), (4, -1), (6, 255), (6, -1),
        (7, np.zeros(1, np.uint8)),
    ]  # fmt: skip
    for place, value in wrong:
        assert _pack.round(*good[:place], value, *good[place + 1 :]) == -1, (place, value)


@pytest.mark.slow
def test_no_byte_outside_its_buffers_is_touched(tmp_path: Path):
    """Random rows under the address and undefined-behaviour sanitizers."""
    source = Path(pack.__file__).resolve().parent / "pack.c"
    build = ["cc", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", "-fno-sanitize-recover=all"]
    build += ["-fsanitize=address,undefined,float-cast-overflow", f"-I{sysconfig.get_paths()['include']}"]
    target = tmp_path / "_pack.abi3.so"
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
    spec = importlib.util.spec_from_file_location("_pack", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    rng = np.random.default_rng(1)
    came = [throw(helper, rng) for _ in range(int(sys.argv[2]))]
    print({word: came.count(word) for word in set(came)})


if __name__ == "__main__":
    main()
