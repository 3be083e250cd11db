"""The compiled loops against the numpy decoder, which is the definition: the same bits, and nothing outside their buffers.

As a script it is the worker of the sanitizer test: `python test_unpack.py MODULE ROUNDS` throws random codes at a module.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage import unpack
from stillroom.storage.cache import open_cache
from stillroom.storage.codes import logp_scale, tail_units
from stillroom.storage.decode import count_weights, decode_entries, plain_entries
from stillroom.storage.errors import DamagedError
from stillroom.storage.spec import SamplerSpec

compiled = pytest.mark.skipif(not unpack.COMPILED, reason="no compiler when this was installed")
SPECS = [
    SamplerSpec(draws=20),
    SamplerSpec(draws=300, keep_logp="head"),
    SamplerSpec(kind="random", draws=30, keep_logp="none"),
    SamplerSpec(kind="systematic", draws=300, keep_logp="all"),
    SamplerSpec(kind="random", draws=30, keep_logp="head"),
]
IDS = [f"{s.kind}-{s.draws}-{s.keep_logp}" for s in SPECS]
GUARD = 0xA5


def test_it_was_compiled_if_it_could_be():
    assert unpack.COMPILED or which("cc") is None


@compiled
@pytest.mark.parametrize("profile", ["standard", "fast"])
@pytest.mark.parametrize("vocab_size", [300, 70_000, 300_000])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_the_same_bits_as_numpy(made, tmp_path, monkeypatch, spec, vocab_size, profile):
    made.write(tmp_path, made.manifest(spec, vocab_size=vocab_size, profile=profile))
    answers = []

    def helping(*arguments):
        answers.append(unpack.unpack(*arguments))
        return answers[-1]

    for columns in ((), ("tokens",), ("tokens", "logp", "label_logp", "entropy")):
        cache = open_cache(tmp_path, columns=columns)
        monkeypatch.setattr("stillroom.storage.cache.unpack", helping)
        answers.clear()
        helped = cache.read([4, 0, 5, 2, 1])
        by_numpy = profile == "fast" and "logp" in columns and spec.keep_logp != "none"
        assert answers == [not by_numpy]
        monkeypatch.setattr("stillroom.storage.cache.unpack", lambda *a: False)
        plain = cache.read([4, 0, 5, 2, 1])
        np.testing.assert_array_equal(helped.tokens, plain.tokens)
        for name in ("offsets", "ids", "weights", "label_logp", "entropy", "logp"):
            a, b = getattr(helped.targets, name), getattr(plain.targets, name)
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)
        monkeypatch.undo()


class Fenced:
    """Output arrays with guard bytes behind them."""

    def __init__(self, *shapes: tuple[int, str]) -> None:
        self.whole = [np.full(count * np.dtype(dtype).itemsize + 64, GUARD, np.uint8) for count, dtype in shapes]
        self.arrays = [w[:-64].view(dtype) for w, (_, dtype) in zip(self.whole, shapes)]

    def check(self) -> None:
        assert all((w[-64:] == GUARD).all() for w in self.whole)


def throw(helper, rng: np.random.Generator) -> str:
    """One round of random codes, often nearly right; what came of it."""
    counted, draws, rows = bool(rng.integers(2)), int(rng.choice([2, 5, 20, 300])), int(rng.integers(0, 6))
    vocab = int(rng.choice([40, 70_000, 1 << 20]))
    planes = max(0, (vocab - 1).bit_length() - 16)
    small = np.uint8 if draws + 1 <= 255 else np.uint16
    n = rng.integers(0, min(draws, 6) + 1, rows)
    head = rng.integers(0, n + 1)
    tails = tail_units(draws)
    tail = np.where(n > head, rng.integers(0, len(tails), rows), 0)
    tail[(head == 0) & (n > 0)] = len(tails) - 1
    entries, heads = int(n.sum()), int(head.sum())
    room = -(-(entries + int(rng.integers(0, 9))) // 8) * 8
    low = np.zeros(room, np.uint16)
    low[:entries] = rng.integers(1, 5, entries)
    high = np.zeros((planes, room // 8), np.uint8)
    count = []
    for n_r, head_r in zip(n, head):  # counts that add up, if they can
        left = draws - n_r
        part = [2 + int(x) for x in rng.multinomial(max(0, left - head_r), np.ones(head_r) / head_r)] if head_r else []
        count += part
    count = np.array([*count, *[0] * int(rng.integers(0, 3))], np.int64)
    logp_head = np.sort(rng.integers(64, 256, heads)).astype(np.uint8)
    arrays = {"n": n.astype(small), "id_lo": low, "id_hi": high, "n_head": head.astype(small), "logp_head": logp_head}
    arrays |= {"tail": tail.astype(np.uint8 if len(tails) == 256 else np.uint16)}
    arrays |= {"count": count.astype(np.uint8 if draws <= 255 else np.uint16)}
    arrays |= {"logp_tail": rng.integers(0, 64, entries - heads).astype(np.uint8)}
    if rng.random() < 0.6:  # damage
        name = str(rng.choice(list(arrays)))
        flat = arrays[name].reshape(-1).view(np.uint8)
        if rng.random() < 0.3:
            arrays[name] = arrays[name].reshape(-1)[: int(rng.integers(0, arrays[name].size + 1))]
        elif len(flat):
            flat[rng.integers(len(flat))] = rng.integers(256)
    fenced = Fenced((rows, "i8"), (room, "i4"), (room, "f4"), (room, "f4"))
    offsets, ids, weights, logp = fenced.arrays
    three = [arrays["n"], arrays["id_lo"], np.ascontiguousarray(arrays["id_hi"])]
    if counted:
        got = helper.counts(
            draws, vocab, planes, 0, *three, arrays["count"], count_weights(draws), offsets, ids, weights
        )
    else:
        scale = logp_scale(draws)
        codes = [arrays[name] for name in ("n_head", "logp_head", "logp_tail", "tail")]
        tables = (scale.head_units, tails, scale.logp)
        got = helper.threshold(draws, vocab, planes, 0, *three, *codes, *tables, offsets, ids, weights, logp)
    fenced.check()
    if got < 0:
        return "refused"
    keep = "none" if counted else "all" if len(arrays["logp_tail"]) else "head"
    spec = SamplerSpec(kind="random" if counted else "threshold", draws=draws, keep_logp=keep)
    code = arrays["id_lo"][:got].astype(np.int32)
    for plane in range(planes):
        bits = np.unpackbits(arrays["id_hi"].reshape(planes, -1)[plane], bitorder="little")[:got]
        code |= bits.astype(np.int32) << (16 + plane)
    raw = {**arrays, "id": code}
    for name, many in (("logp_head", int(arrays["n_head"].sum())), ("count", np.count_nonzero(arrays["count"]))):
        raw[name] = raw[name][:many]
    raw["logp_tail"] = raw["logp_tail"][: got - len(raw["logp_head"])]
    wanted = decode_entries(spec, vocab, raw, logp=True)  # raises where the helper took what is damaged
    np.testing.assert_array_equal(offsets, wanted.offsets[1:])
    np.testing.assert_array_equal(ids[:got], wanted.ids)
    np.testing.assert_array_equal(weights[:got].view(np.uint32), wanted.weights.view(np.uint32))
    if wanted.logp is not None:
        np.testing.assert_array_equal(logp[:got].view(np.uint32), wanted.logp.view(np.uint32))
    return "taken"


@compiled
def test_random_codes_are_refused_or_read_as_numpy_reads_them():
    from stillroom.storage import _unpack

    rng = np.random.default_rng(0)
    came = [throw(_unpack, rng) for _ in range(4000)]
    assert came.count("taken") > 400
    assert came.count("refused") > 400


@compiled
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=20), st.integers(0, 20))
def test_plain_rows_of_any_bytes(ids: bytes, weights: bytes, n: bytes, room: int):
    from stillroom.storage import _unpack

    fenced = Fenced((len(n), "i8"), (room, "i4"), (room, "f4"))
    got = _unpack.plain(254, 70_000, 0, n, ids, weights, *fenced.arrays)
    fenced.check()
    if got >= 0:
        raw = {"id": np.frombuffer(ids[: got * 4], "<u4"), "weight": np.frombuffer(weights[: got * 4], "<f4")}
        wanted = plain_entries(70_000, 255, {**raw, "n": np.frombuffer(n, np.uint8)})
        np.testing.assert_array_equal(fenced.arrays[0], wanted.offsets[1:])
        np.testing.assert_array_equal(fenced.arrays[1][:got], wanted.ids)


@compiled
def test_what_it_refuses_is_named_by_the_numpy_decoder(made, tmp_path, monkeypatch):
    made.write(tmp_path, made.manifest(SamplerSpec(draws=20)))
    cache = open_cache(tmp_path)
    first = cache.read([0])
    chunks_of = sys.modules["stillroom.storage.cache"].chunks_of

    def damaged(places, names):
        chunks = chunks_of(places, names)
        chunks["n_head"] = [n.copy() for n in chunks["n_head"]]
        chunks["n_head"][0][0] += 1
        return chunks

    monkeypatch.setattr("stillroom.storage.cache.chunks_of", damaged)
    monkeypatch.setattr("stillroom.storage.gather.chunks_of", damaged)
    with pytest.raises(DamagedError, match="shard 0"):
        open_cache(tmp_path).read([0])
    assert len(first.targets.ids)


@pytest.mark.slow
def test_no_byte_outside_its_buffers_is_touched(tmp_path: Path):
    """Random codes under the address and undefined-behaviour sanitizers."""
    source = Path(unpack.__file__).resolve().parent / "unpack.c"
    build = ["cc", "-O1", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    target = tmp_path / "_unpack.abi3.so"
    subprocess.run([*build, f"-I{sysconfig.get_paths()['include']}", str(source), "-o", str(target)], check=True)
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
    spec = importlib.util.spec_from_file_location("_unpack", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    rng = np.random.default_rng(1)
    came = [throw(helper, rng) for _ in range(int(sys.argv[2]))]
    print({word: came.count(word) for word in set(came)})


if __name__ == "__main__":
    main()
