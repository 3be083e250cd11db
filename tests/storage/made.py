"""Small caches for the tests, made from dense random teachers with numpy alone.

As a script it is the worker of the race and kill tests: `python made.py ROOT [PAUSE_S]` writes `MANIFEST`'s cache.

Shapes: `R` rows, `V` vocabulary, `E` entries, `S` sequences, `L` rows of a sequence.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from stillroom.storage.manifest import CorpusInfo, Manifest, PackingInfo, TeacherInfo, TokenizerInfo
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets
from stillroom.storage.writer import CacheWriter

SPECS = {
    "threshold": SamplerSpec(draws=20),
    "head only": SamplerSpec(draws=20, keep_logp="head"),
    "many draws": SamplerSpec(draws=300),
    "one draw": SamplerSpec(draws=1),
    "random": SamplerSpec(kind="random", draws=20, keep_logp="none"),
    "random, log p": SamplerSpec(kind="random", draws=300, keep_logp="all"),
    "random, head's log p": SamplerSpec(kind="random", draws=20, keep_logp="head"),
    "importance": SamplerSpec(kind="random", draws=20, exponent=0.8),
    "systematic": SamplerSpec(kind="systematic", draws=20),
    "stratified": SamplerSpec(kind="stratified", draws=20, keep_logp="none"),
    "top_k": SamplerSpec(kind="top_k", draws=20),
    "top_p": SamplerSpec(kind="top_p", draws=20, top_p=0.7),
}


def manifest(
    spec: SamplerSpec, *, vocab_size=300, seq_len=16, sequences=6, sequences_per_shard=3, **changes
) -> Manifest:
    values = {
        "teacher": TeacherInfo(
            name="toy", revision=None, fingerprint="sha256:1", vocab_size=vocab_size, dtype="float32"
        ),
        "tokenizer": TokenizerInfo(fingerprint="sha256:2", vocab_size=vocab_size),
        "corpus": CorpusInfo(name="toy text", fingerprint="sha256:3", documents=4, tokens=100),
        "packing": PackingInfo(seq_len=seq_len),
        "sampler": spec,
        "vocab_size": vocab_size,
        "sequences": sequences,
        "sequences_per_shard": sequences_per_shard,
    }
    return Manifest(**(values | changes))


def teacher(rng, rows: int, vocab_size: int) -> np.ndarray:
    """p_RV: from peaked to flat; half of the mass may sit anywhere in the vocabulary."""
    width = min(vocab_size, 300)
    logits = rng.normal(size=(rows, width)) * rng.uniform(0.05, 6.0, (rows, 1))
    p = np.exp(logits - logits.max(1, keepdims=True))
    p_RV = np.zeros((rows, vocab_size))
    for row in range(rows):
        p_RV[row, rng.choice(vocab_size, width, replace=False)] = p[row] / p[row].sum()
    return p_RV


def targets(spec: SamplerSpec, p_RV: np.ndarray, rng, empty_rows: bool = True) -> SparseTargets:
    """What the sampler of `spec` makes of the teacher; one row in eight is empty."""
    offsets, ids, weights, logp = [0], [], [], []
    for row, p in enumerate(p_RV):
        if empty_rows and row % 8 == 5:
            offsets.append(offsets[-1])
            continue
        id_E, weight_E = _row(spec, p, rng)
        ids.append(id_E)
        weights.append(weight_E)
        logp.append(np.log(p[id_E]))
        offsets.append(offsets[-1] + len(id_E))
    safe_RV = np.where(p_RV > 0, p_RV, 1.0)
    return SparseTargets(
        offsets=np.array(offsets),
        ids=np.concatenate(ids).astype(np.int32),
        weights=np.concatenate(weights).astype(np.float32),
        label_logp=np.log(p_RV.max(1)).astype(np.float32),
        entropy=-(p_RV * np.log(safe_RV)).sum(1).astype(np.float32),
        logp=None if spec.keep_logp == "none" else np.concatenate(logp).astype(np.float32),
    )


def _row(spec: SamplerSpec, p: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    n = spec.draws
    by_p = np.lexsort((np.arange(len(p)), -p))
    if spec.kind in ("top_k", "top_p"):
        keep = by_p[p[by_p] > 0][:n]
        if spec.kind == "top_p":
            keep = keep[: int(np.searchsorted(np.cumsum(p[keep]), spec.top_p)) + 1]
        return keep, p[keep]
    if spec.kind == "threshold":
        logp = np.log(p, where=p > 0, out=np.full(len(p), -np.inf)).astype(np.float32)
        head = by_p[logp[by_p] >= np.float32(-np.log(n))]
        rest = np.flatnonzero((logp < np.float32(-np.log(n))) & (p > 0))
        tau = 1 - p[head].sum() if len(rest) else 0.0
        many = max(1, int(n * tau)) if len(rest) else 0
        points = (rng.random() + np.arange(many)) / max(many, 1)
        cdf = np.cumsum(p[rest]) / max(p[rest].sum(), 1e-300)
        tail = np.unique(rest[np.minimum(np.searchsorted(cdf, points), len(rest) - 1)])
        assert len(tail) == many
        return np.concatenate([head, tail]), np.concatenate([p[head], np.full(many, tau / max(many, 1))])
    q = p**spec.exponent / (p**spec.exponent).sum()
    if spec.kind in ("systematic", "stratified"):
        u = rng.random(n if spec.kind == "stratified" else 1)
        drawn = np.searchsorted(np.cumsum(q) / q.sum(), (u + np.arange(n)) / n)
        count = np.bincount(np.minimum(drawn, len(p) - 1), minlength=len(p))
    else:
        count = rng.multinomial(n, q)
    id_E = np.lexsort((np.arange(len(p)), -count))[: np.count_nonzero(count)]
    weight_E = count[id_E] / n
    return id_E, weight_E if spec.exponent == 1.0 else weight_E * p[id_E] / q[id_E]


def shard_data(cache_manifest: Manifest, index: int, empty_rows: bool = True):
    """Tokens, targets and rounding numbers of a shard: a pure function of its index."""
    start, stop = cache_manifest.shard_range(index)
    rng = np.random.default_rng([cache_manifest.sampler.seed, index])
    rows = (stop - start) * cache_manifest.packing.seq_len
    p_RV = teacher(rng, rows, cache_manifest.vocab_size)
    tokens = rng.integers(0, cache_manifest.vocab_size, (stop - start, cache_manifest.packing.seq_len + 1))
    seam = np.arange(start, stop + 1) * 7919 % cache_manifest.vocab_size  # a sequence starts where the one before ends
    tokens[:, 0], tokens[:, -1] = seam[:-1], seam[1:]
    sampled = targets(cache_manifest.sampler, p_RV, rng, empty_rows)
    data = tokens.astype(np.uint32), sampled, rng.random((rows, 3))
    if cache_manifest.packing.policy != "documents":
        return data
    starts = document_starts(cache_manifest)[start:stop]
    return data[0], emptied(sampled, ~starts[:, 1:].ravel()), data[2], starts


def document_starts(cache_manifest: Manifest) -> np.ndarray:
    """[S, L+1]: documents of 5 and 8 tokens by turns, cut where a sequence ends."""
    seq_len, sequences = cache_manifest.packing.seq_len, cache_manifest.sequences
    stream = np.isin(np.arange(sequences * seq_len + 1) % 13, (0, 5))
    return np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]


def emptied(sampled: SparseTargets, keep_R: np.ndarray) -> SparseTargets:
    """The rows, those that are not to be kept without entries."""
    n_R = np.diff(sampled.offsets)
    keep_E = np.repeat(keep_R, n_R)
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(n_R * keep_R)]),
        ids=sampled.ids[keep_E],
        weights=sampled.weights[keep_E],
        label_logp=sampled.label_logp,
        entropy=sampled.entropy,
        logp=None if sampled.logp is None else sampled.logp[keep_E],
    )


def write(root, cache_manifest: Manifest) -> CacheWriter:
    """The whole cache."""
    writer = CacheWriter(root, cache_manifest)
    for index in range(cache_manifest.shards):
        writer.write_shard(index, *shard_data(cache_manifest, index))
    return writer


RACE = manifest(SamplerSpec(draws=20), vocab_size=500, sequences=60, sequences_per_shard=3)


def main() -> None:
    root, pause_s = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    writer = CacheWriter(root, RACE)
    for index in range(RACE.shards):
        if index not in writer.committed():
            data = shard_data(RACE, index)
            print("start", index, flush=True)
            writer.write_shard(index, *data)
            print("done", index, flush=True)
            time.sleep(pause_s)


if __name__ == "__main__":
    main()
