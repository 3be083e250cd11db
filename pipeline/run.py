"""The run of stage one: plan, then one shard after another, each a pure function of (manifest, shard index).

Data flow: packed tokens -> teacher logits, one sequence at a time -> sampler -> CSR rows of a shard -> encode and commit.
Shapes: `S` sequences of a shard, `B` sequences of a batch, `L` rows per sequence, `V` vocabulary, `R` = S * L rows.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from stillroom.kernels import targets as torch_targets
from stillroom.kernels.sample import sample, uniforms
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.packing import PackedCorpus, pack, tokenizer_fingerprint
from stillroom.pipeline.teacher import Teacher, load_tokenizer
from stillroom.storage.errors import InputError
from stillroom.storage.index import write_index
from stillroom.storage.manifest import CorpusInfo, Manifest, PackingInfo, TeacherInfo, TokenizerInfo
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets
from stillroom.storage.writer import CacheWriter

ROUNDING_STREAM: Final = 1  # stream 0 draws the targets; this one rounds them to codes
ROUNDING_UNIFORMS: Final = 3
LIBRARIES: Final = ("stillroom", "torch", "transformers", "tokenizers", "numpy")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What a run of stage one did.

    Attributes:
        out: directory or URL of the cache.
        sequences, rows: size of the whole cache.
        shards: shards of the plan; `shards_before` of them were there already.
        seconds: wall time of this run's shards.
    """

    out: Path | str
    sequences: int
    rows: int
    shards: int
    shards_before: int
    seconds: float

    @property
    def already_done(self) -> bool:
        """True when there was nothing left to do."""
        return self.shards_before == self.shards


def build_cache(config: CacheConfig, *, on_progress: Progress = lambda stage, done, total: None) -> CacheResult:
    """Write the cache `config` describes, or what is missing of it.

    Args:
        config: teacher, corpus, sampler, directory.
        on_progress: told (stage, done, total): stage `pack` counts documents (total 0: unknown), `cache` sequences.

    Raises:
        InputError: a teacher or corpus that can not be used.
        PlanMismatchError: the directory belongs to another run.
    """
    spec = config.sampler_spec()
    tokenizer = load_tokenizer(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    teacher = Teacher(config)
    _check_fit(config, teacher, tokenizer)
    corpus = pack(config, tokenizer, on_progress=lambda done: on_progress("pack", done, 0))
    manifest = _manifest(config, spec, teacher, tokenizer, corpus)
    writer = CacheWriter(config.out, manifest)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        writer.add_folder("tokenizer", Path(folder))

    before = writer.committed()
    start_s, done = time.perf_counter(), sum(_length(manifest, shard) for shard in before)
    with writer:  # encodes and flushes one shard while the teacher runs on the next
        for shard in range(manifest.shards):
            if shard in before:
                continue
            first, stop = manifest.shard_range(shard)
            tokens_SL1 = corpus.tokens_SL1[first:stop]
            parts = []
            for begin in range(0, len(tokens_SL1), config.batch_size):
                batch_BL1 = tokens_SL1[begin : begin + config.batch_size]
                parts += sample_sequences(teacher, spec, batch_BL1, first + begin, batch_size=config.batch_size)
                on_progress("cache", done + begin + len(batch_BL1), manifest.sequences)
            rounding_R3 = _rounding(spec.seed, np.arange(first, stop), config.seq_len)
            writer.submit(shard, tokens_SL1, SparseTargets.concat(parts), rounding_R3)
            done += len(tokens_SL1)
    if len(before) < manifest.shards:
        write_index(writer.depot)  # one file to open instead of a record per shard
    return CacheResult(
        out=writer.root,
        sequences=manifest.sequences,
        rows=manifest.sequences * config.seq_len,
        shards=manifest.shards,
        shards_before=len(before),
        seconds=time.perf_counter() - start_s,
    )


def sample_sequences(
    teacher: Teacher, spec: SamplerSpec, tokens_BL1: npt.NDArray[np.uint32], first_sequence: int, *, batch_size: int
) -> list[SparseTargets]:
    """Targets of up to `batch_size` sequences, one `SparseTargets` of `L` rows each, exact (not yet coded).

    Args:
        teacher: who speaks.
        spec: how its distribution is thinned.
        tokens_BL1: `[B, L+1]` token ids.
        first_sequence: index in the corpus of the first of them: part of the generator's key.
        batch_size: the one batch shape of the run; a shorter batch is padded to it.

    Raises:
        InputError: the teacher's logits hold NaN or nothing finite, naming the sequence.
    """
    tokens = torch.from_numpy(tokens_BL1.astype(np.int64))
    count, rows = len(tokens), tokens.shape[1] - 1
    padded = tokens if count == batch_size else torch.cat([tokens, tokens[:1].expand(batch_size - count, -1)])
    row_N = torch.arange(rows, device=teacher.device)
    parts: list[SparseTargets] = []
    for index, logits_LV in enumerate(teacher.logits(padded[:, :-1])):
        if index == count:
            break
        try:
            targets = sample(
                logits_LV,
                tokens[index, 1:].to(teacher.device),
                kind=spec.kind,
                draws=spec.draws,
                seed=spec.seed,
                sequence_N=torch.full_like(row_N, first_sequence + index),
                row_N=row_N,
                exponent=spec.exponent,
                top_p=spec.top_p,
            )
        except ValueError as error:
            raise InputError(
                f"teacher {teacher.name} can not be sampled at sequence {first_sequence + index} ({error}): "
                "check the checkpoint, or run it with --dtype float32"
            ) from error
        parts.append(to_numpy(targets))
    return parts


def to_numpy(targets: torch_targets.SparseTargets) -> SparseTargets:
    """The storage twin of sampled targets, on the host."""
    arrays = {
        name: None if (tensor := getattr(targets, name)) is None else tensor.cpu().numpy()
        for name in ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
    }
    return SparseTargets(**arrays)  # type: ignore[arg-type]  # the six fields, by name


def _rounding(seed: int, sequences_S: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.float64]:
    sequence_R = torch.from_numpy(np.repeat(sequences_S.astype(np.int64), rows))
    row_R = torch.arange(rows).repeat(len(sequences_S))
    result: npt.NDArray[np.float64] = uniforms(
        seed, sequence_R, row_R, stream=ROUNDING_STREAM, count=ROUNDING_UNIFORMS
    ).numpy()
    return result


def _check_fit(config: CacheConfig, teacher: Teacher, tokenizer: Any) -> None:
    if len(tokenizer) > teacher.vocab_size:
        raise InputError(
            f"the tokenizer of {config.teacher} has {len(tokenizer)} ids, its model's vocabulary {teacher.vocab_size}: "
            "give the teacher the tokenizer it was trained with"
        )
    if teacher.max_length is not None and config.seq_len > teacher.max_length:
        raise InputError(
            f"seq_len came as {config.seq_len}, the teacher reads at most {teacher.max_length} positions: lower --seq-len"
        )


def _manifest(
    config: CacheConfig, spec: SamplerSpec, teacher: Teacher, tokenizer: Any, corpus: PackedCorpus
) -> Manifest:
    return Manifest(
        teacher=TeacherInfo(
            name=teacher.name,
            revision=teacher.revision,
            fingerprint=teacher.fingerprint,
            vocab_size=teacher.vocab_size,
            dtype=str(teacher.dtype).removeprefix("torch."),
        ),
        tokenizer=TokenizerInfo(fingerprint=tokenizer_fingerprint(tokenizer), vocab_size=len(tokenizer)),
        corpus=CorpusInfo(
            name=config.data,
            fingerprint=corpus.fingerprint,
            documents=corpus.documents,
            tokens=int(corpus.tokens_SL1.shape[0]) * config.seq_len + 1,
        ),
        packing=PackingInfo(policy="concat", seq_len=config.seq_len),
        sampler=spec,
        vocab_size=teacher.vocab_size,
        sequences=len(corpus.tokens_SL1),
        sequences_per_shard=config.sequences_per_shard,
        libraries={name: version(name) for name in LIBRARIES},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _length(manifest: Manifest, shard: int) -> int:
    first, stop = manifest.shard_range(shard)
    return stop - first
