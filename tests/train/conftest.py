"""Tiny models, token sequences with a pattern to learn, and caches made by the real sampler and writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stillroom.kernels.sample import sample, uniforms
from stillroom.storage.manifest import CorpusInfo, Manifest, PackingInfo, TeacherInfo, TokenizerInfo
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets
from stillroom.storage.writer import CacheWriter
from stillroom.train.config import TrainConfig

VOCAB = 97
SEQ_LEN = 16
SEQUENCES = 40

Maker = Callable[..., Path]
Settings = Callable[..., TrainConfig]


def save_config(folder: Path, **changes: Any) -> Path:
    """A Llama configuration, no weights."""
    from transformers import LlamaConfig

    settings: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=SEQ_LEN, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaConfig(**{**settings, **changes}).save_pretrained(folder)
    return folder


def empty_row() -> SparseTargets:
    """A row outside the loss mask."""
    zero, none = np.zeros(1, np.float32), np.zeros(0, np.float32)
    return SparseTargets(np.zeros(2, np.int64), np.zeros(0, np.int32), none, zero, zero, none)


def save_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with weights, peaked enough to be worth imitating."""
    from transformers import AutoConfig, AutoModelForCausalLM

    save_config(folder, **{"initializer_range": 0.3, **changes})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small spend two threads' time on waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", name="save_config")
def _save_config() -> Maker:
    return save_config


@pytest.fixture(scope="session", name="save_model")
def _save_model() -> Maker:
    return save_model


@pytest.fixture(scope="session")
def tokens_SL1() -> npt.NDArray[np.uint32]:
    """Arithmetic progressions: the next token follows from the last two."""
    rng = np.random.default_rng(0)
    start, stride = rng.integers(0, VOCAB, (SEQUENCES, 1)), rng.integers(1, 5, (SEQUENCES, 1))
    return ((start + stride * np.arange(SEQ_LEN + 1)) % VOCAB).astype(np.uint32)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of the student."""
    return save_config(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with weights."""
    return save_model(tmp_path_factory.mktemp("teacher"), hidden_size=48, seed=1)


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, tokens_SL1: npt.NDArray[np.uint32]) -> Maker:
    """Write a cache of the teacher's distributions over the tokens; keyword arguments are `SamplerSpec`'s, `hole`
    empties row 4 of sequence 0, and `corpus` is the letter its corpus goes by.
    """

    def make(*, hole: bool = False, corpus: str = "c", **sampler: Any) -> Path:
        from transformers import AutoModelForCausalLM

        spec = SamplerSpec(**{"draws": 12, **sampler})
        root = tmp_path_factory.mktemp("cache")
        manifest = Manifest(
            teacher=TeacherInfo(name="teacher", revision=None, fingerprint="t" * 64, vocab_size=VOCAB, dtype="float32"),
            tokenizer=TokenizerInfo(fingerprint="k" * 64, vocab_size=VOCAB),
            corpus=CorpusInfo(
                name="progressions", fingerprint=corpus * 64, documents=SEQUENCES, tokens=tokens_SL1.size
            ),
            packing=PackingInfo(seq_len=SEQ_LEN),
            sampler=spec,
            vocab_size=VOCAB,
            sequences=SEQUENCES,
            sequences_per_shard=16,
        )
        model = AutoModelForCausalLM.from_pretrained(teacher).eval()
        writer = CacheWriter(root, manifest)
        for shard in range(manifest.shards):
            start, stop = manifest.shard_range(shard)
            tokens = torch.from_numpy(tokens_SL1[start:stop].astype(np.int64))
            sequence_N = torch.arange(start, stop).repeat_interleave(SEQ_LEN)
            row_N = torch.arange(SEQ_LEN).repeat(stop - start)
            with torch.no_grad():
                drawn = sample(
                    model(input_ids=tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten(), kind=spec.kind,
                    draws=spec.draws, seed=spec.seed, sequence_N=sequence_N, row_N=row_N, top_p=spec.top_p,
                    exponent=spec.exponent,
                )  # fmt: skip
            names = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
            targets = SparseTargets(*(getattr(drawn, name).numpy() for name in names))
            if hole and shard == 0:
                targets = SparseTargets.concat(
                    [targets.slice_rows(0, 4), empty_row(), targets.slice_rows(5, targets.rows)]
                )
            rounding_R3 = uniforms(spec.seed, sequence_N, row_N, stream=1, count=3).numpy()
            writer.write_shard(shard, tokens_SL1[start:stop], targets, rounding_R3)
        return root

    return make


@pytest.fixture(scope="session")
def cache(make_cache: Maker) -> Path:
    """A threshold cache."""
    return make_cache()


@pytest.fixture
def settings(tmp_path: Path, student: Path) -> Settings:
    """`TrainConfig` with small defaults: ten steps of eight sequences, float32, no checkpoints."""

    def make(**changes: Any) -> TrainConfig:
        defaults: dict[str, Any] = dict(
            student=str(student), out=tmp_path / "out", batch_size=8, steps=10, lr=1e-2, dtype="float32", save_every=0,
            log_every=1,
        )  # fmt: skip
        return TrainConfig(**{**defaults, **changes})

    return make
