"""Teachers of the audit's power study: their rows are recomputed once, and every trial is drawn from logits that are there.

A Llama of random weights whose head is scaled until a row keeps about as many entries as a trained teacher's, and text that
it wrote itself: speed and statistics do not ask whether it makes sense, and its labels are calibrated.

Shapes: `B` sequences, `L` rows of a sequence, `N` = B * L rows, `V` vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.kernels.sample import STREAM_ROUNDING, uniforms
from stillroom.pipeline.audit.draws import coded, drawn
from stillroom.pipeline.audit.findings.independence import independence
from stillroom.pipeline.audit.findings.stored import stored
from stillroom.pipeline.audit.findings.test import Judged, judge
from stillroom.pipeline.audit.forward import logits, readings, states
from stillroom.pipeline.audit.record import Record
from stillroom.pipeline.audit.reduce import Rows, Seen, cached_facts, seeded, seen
from stillroom.pipeline.audit.run import tests_of, unigram
from stillroom.pipeline.config import TeacherConfig
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.manifest import CorpusInfo, Manifest, PackingInfo, TeacherInfo, TokenizerInfo
from stillroom.storage.spec import SamplerKind, SamplerSpec
from stillroom.storage.targets import SparseTargets

LENGTH: Final = 64
SHARDS: Final = 50
PER_SHARD: Final = 4
REPLAY_ROWS: Final = 1024
LOGIT_DEVIATION: Final = 5.5
SHAPE: Final = dict(
    hidden_size=256, intermediate_size=672, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4
)
WIDE: Final = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)


@dataclass
class Scene:
    """A teacher's rows as an audit sees them, and as one stage one or another could have seen them.

    Attributes:
        manifest: of the cache, sampler aside.
        rows: where the rows stand.
        starts_BL1: where documents begin, or None.
        plain_NV, control_NV, apart_NV: the audit's readings.
        written: logits from which a cache is drawn, by name: `as audited`, other batch shapes, and those of faults.
    """

    manifest: Manifest
    rows: Rows
    starts_BL1: npt.NDArray[np.bool_] | None
    plain_NV: Tensor
    control_NV: Tensor
    apart_NV: Tensor | None
    written: dict[str, Tensor]
    replay_rows: int = REPLAY_ROWS
    _parts: dict[str, Seen] = field(default_factory=dict)
    _pools: dict[tuple[str, str], list[SparseTargets]] = field(default_factory=dict)

    def spec(self, kind: SamplerKind, seed: int) -> SamplerSpec:
        """The study's setting of each sampler."""
        return SamplerSpec(kind=kind, draws=50, seed=seed, top_p=0.9 if kind == "top_p" else 1.0)

    def part(self, kind: SamplerKind) -> Seen:
        """The teacher's side for a sampler, made once."""
        if kind not in self._parts:
            manifest = replace(self.manifest, sampler=self.spec(kind, 0))
            self._parts[kind] = seen(
                manifest, self.rows, self.plain_NV, self.control_NV, self.apart_NV, seed=0, replay_rows=self.replay_rows
            )
        return self._parts[kind]

    def draw(self, kind: SamplerKind, seed: int, source: str = "as audited", key_N: Any = None) -> SparseTargets:
        """A cache's rows: drawn, coded and read back.

        Args:
            kind: sampler.
            seed: of the draws and their rounding.
            source: which of `written`.
            key_N: what keys the draws instead of the sequence.
        """
        sequence_N = torch.from_numpy(self.rows.sequence_N if key_N is None else key_N)
        row_N, labels_N = torch.from_numpy(self.rows.row_N), torch.from_numpy(self.rows.labels_N)
        spec = self.spec(kind, seed)
        targets = drawn(spec, self.written[source], labels_N, sequence_N, row_N)
        rounding_N3 = uniforms(seed, sequence_N, row_N, stream=STREAM_ROUNDING, count=3).numpy()
        return coded(replace(self.manifest, sampler=spec), targets, rounding_N3)

    def pooled(self, kind: SamplerKind, rng: np.random.Generator, pool: int) -> SparseTargets:
        """As `draw`, each row's target taken at random from `pool` draws made once: where drawing takes minutes."""
        key = (kind, "as audited")
        if key not in self._pools:
            self._pools[key] = [self.draw(kind, 1_000_000 + number) for number in range(pool)]
        return rows_from(self._pools[key], rng.integers(pool, size=len(self.rows.row_N)))

    def judged(self, kind: SamplerKind, seed: int, targets: SparseTargets, *, replay: bool) -> list[Judged]:
        """What an audit of these targets finds; `replay` draws with the manifest's seed again, else that of seed 0 stands."""
        manifest = replace(self.manifest, sampler=self.spec(kind, seed))
        part = self.part(kind)
        if replay and part.replayed_N.any():
            part = replace(part, seed_keys=seeded(manifest, self.rows, self.plain_NV, part.lse_N, part.replayed_N))
        facts = cached_facts(manifest, part, targets)
        rows = self.rows
        record = Record.of_targets(targets, rows.labels_N, rows.sequence_N, rows.shard_N, rows.row_N)
        counts_V = np.bincount(rows.labels_N, minlength=manifest.vocab_size)
        writers = dict.fromkeys(range(manifest.shards), "one")
        alone = [*stored(manifest, record), *independence(manifest, record)]
        return judge([*alone, *tests_of(manifest, facts, unigram(counts_V, manifest.vocab_size), writers)])

    def judged_alone(self, kind: SamplerKind, targets: SparseTargets) -> list[Judged]:
        """What an audit without a teacher finds in these rows."""
        manifest, rows = replace(self.manifest, sampler=self.spec(kind, 0)), self.rows
        record = Record.of_targets(targets, rows.labels_N, rows.sequence_N, rows.shard_N, rows.row_N)
        return judge([*stored(manifest, record), *independence(manifest, record)])


def rows_from(pool: list[SparseTargets], choice_N: npt.NDArray[np.int64]) -> SparseTargets:
    """Row n of `pool[choice_N[n]]`."""
    starts = np.array([each.offsets[:-1] for each in pool])[choice_N, np.arange(len(choice_N))]
    many_N = np.array([np.diff(each.offsets) for each in pool])[choice_N, np.arange(len(choice_N))]
    before = np.cumsum([0, *(each.entries for each in pool)])
    row_E = np.repeat(np.arange(len(choice_N)), many_N)
    within_E = np.arange(len(row_E)) - np.repeat(np.cumsum(many_N) - many_N, many_N)
    place_E = before[choice_N][row_E] + starts[row_E] + within_E

    def entries(name: str) -> Any:
        return np.concatenate([getattr(each, name) for each in pool])[place_E]

    def of_rows(name: str) -> Any:
        return np.array([getattr(each, name) for each in pool])[choice_N, np.arange(len(choice_N))]

    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(many_N)]).astype(np.int64), ids=entries("ids"), weights=entries("weights"),
        label_logp=of_rows("label_logp"), entropy=of_rows("entropy"),
        logp=entries("logp") if pool[0].logp is not None else None,
    )  # fmt: skip


def plain_scene(dtype: str, rates: tuple[float, ...]) -> Scene:
    """V = 4,096, 64 sequences of 50 shards; written in other batch shapes, from bfloat16 logits, and by other checkpoints.

    Args:
        dtype: of the teacher's arithmetic.
        rates: learning rates of the optimiser steps that make the other checkpoints.
    """
    model = _model(4096, SHAPE)
    tokens_BL1 = _text(model, 64, 4096)
    with tempfile.TemporaryDirectory() as folder:
        teacher = _teacher(model, folder, dtype)
        plain_NV, control_NV, _ = _readings(teacher, tokens_BL1, None)
        written = {"as audited": plain_NV, "batch of 3": _written(teacher, tokens_BL1, 3)}
        with teacher.other_attention():
            written["other attention"] = _written(teacher, tokens_BL1, 8)
        written["bf16 logits"] = plain_NV.bfloat16().float()
        written["temperature 1.05"] = plain_NV / 1.05
        written["temperature 1.02"] = plain_NV / 1.02
    for rate in rates:
        with tempfile.TemporaryDirectory() as folder:
            written[f"step {rate:g}"] = _written(
                _teacher(_stepped(model, tokens_BL1, rate), folder, dtype), tokens_BL1, 8
            )
    return _scene(4096, dtype, tokens_BL1, None, plain_NV, control_NV, None, written)


def documents_scene() -> Scene:
    """The same teacher on packed documents of 8 to 40 tokens; `leaking`: written across their borders."""
    model = _model(4096, SHAPE)
    tokens_BL1 = _text(model, 64, 4096)
    rng = np.random.default_rng(0)
    starts_BL1 = np.zeros(tokens_BL1.shape, np.bool_)
    for starts_L1 in starts_BL1:
        ends = np.cumsum(rng.integers(8, 40, 10))
        starts_L1[ends[ends <= LENGTH]] = True
    with tempfile.TemporaryDirectory() as folder:
        teacher = _teacher(model, folder, "float32")
        plain_NV, control_NV, apart_NV = _readings(teacher, tokens_BL1, starts_BL1)
    assert apart_NV is not None
    written = {"as audited": plain_NV, "leaking": apart_NV}
    return _scene(4096, "float32", tokens_BL1, starts_BL1, plain_NV, control_NV, apart_NV, written)


def wide_scene() -> Scene:
    """V = 151,936; 16 sequences only, so a quarter of the rows: the logits of all would not fit a small machine."""
    model = _model(151_936, WIDE)
    with torch.no_grad():
        model.lm_head.weight[1 << 17 :] *= 0.8  # the late ids of a real vocabulary are rare
    tokens_BL1 = _text(model, 16, 151_936)
    with tempfile.TemporaryDirectory() as folder:
        plain_NV, control_NV, _ = _readings(_teacher(model, folder, "float32"), tokens_BL1, None)
    scene = _scene(151_936, "float32", tokens_BL1, None, plain_NV, control_NV, None, {"as audited": plain_NV})
    scene.replay_rows = 0
    return scene


def _scene(
    vocab_size: int,
    dtype: str,
    tokens_BL1: npt.NDArray[np.int64],
    starts_BL1: npt.NDArray[np.bool_] | None,
    plain_NV: Tensor,
    control_NV: Tensor,
    apart_NV: Tensor | None,
    written: dict[str, Tensor],
) -> Scene:
    manifest = Manifest(
        teacher=TeacherInfo(name="study", revision=None, fingerprint="study", vocab_size=vocab_size, dtype=dtype),
        tokenizer=TokenizerInfo(fingerprint="study", vocab_size=vocab_size),
        corpus=CorpusInfo(name="study", fingerprint="study", documents=1, tokens=SHARDS * PER_SHARD * LENGTH + 1),
        packing=PackingInfo(policy="concat" if starts_BL1 is None else "documents", seq_len=LENGTH),
        sampler=SamplerSpec(), vocab_size=vocab_size, sequences=SHARDS * PER_SHARD, sequences_per_shard=PER_SHARD,
    )  # fmt: skip
    # As `pick` chooses: one place of every shard, then another place of some.
    sequences = sorted(
        [shard * PER_SHARD + 1 for shard in range(SHARDS)] + [shard * PER_SHARD + 2 for shard in range(SHARDS)]
    )
    some = [*sequences[::2], *sequences[1::2]][: len(tokens_BL1)]
    return Scene(manifest, Rows.of(manifest, tokens_BL1, some), starts_BL1, plain_NV, control_NV, apart_NV, written)


def _model(vocab_size: int, shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0,
                         eos_token_id=0, **shape)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        deviation = model(torch.randint(0, vocab_size, (4, 16))).logits.std()
        model.lm_head.weight.mul_(LOGIT_DEVIATION / deviation)
    return model


@torch.no_grad()
def _text(model: Any, sequences: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """Text the model writes."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (sequences, 1), generator=generator)
    past, last = DynamicCache(), tokens
    for _ in range(LENGTH):
        p_BV = model(last, past_key_values=past, use_cache=True).logits[:, -1].softmax(-1)
        last = torch.multinomial(p_BV, 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    result: npt.NDArray[np.int64] = tokens.numpy()
    return result


def _stepped(model: Any, tokens_BL1: npt.NDArray[np.int64], rate: float) -> Any:
    """The model after one step of AdamW on text of its own kind."""
    import copy

    other = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(other.parameters(), lr=rate)
    tokens = torch.from_numpy(tokens_BL1[:8])
    other(tokens, labels=tokens).loss.backward()
    optimiser.step()
    return other


def _teacher(model: Any, folder: str, dtype: str) -> Teacher:
    model.save_pretrained(Path(folder))
    return Teacher(TeacherConfig(teacher=folder, dtype=dtype))


def _readings(
    teacher: Teacher, tokens_BL1: npt.NDArray[np.int64], starts_BL1: npt.NDArray[np.bool_] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    found: list[Any] = []
    for begin in range(0, len(tokens_BL1), 8):
        some = slice(begin, begin + 8)
        found += readings(teacher, tokens_BL1[some], None if starts_BL1 is None else starts_BL1[some], batch_size=8)
    apart = None if starts_BL1 is None else torch.cat([each.apart_LV for each in found])
    return torch.cat([each.logits_LV for each in found]), torch.cat([each.control_LV for each in found]), apart


def _written(teacher: Teacher, tokens_BL1: npt.NDArray[np.int64], batch_size: int) -> Tensor:
    parts = []
    for begin in range(0, len(tokens_BL1), batch_size):
        states_BLX = states(teacher, tokens_BL1[begin : begin + batch_size], None, batch_size)
        parts += [logits(teacher, states_LX) for states_LX in states_BLX]
    return torch.cat(parts)


Fault = Callable[[Scene, int, np.random.Generator], SparseTargets]
