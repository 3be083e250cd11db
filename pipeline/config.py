"""Settings of `stillroom cache`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stillroom.storage.depot import path_or_url
from stillroom.storage.spec import KeepLogp, SamplerKind, SamplerSpec


class CorpusConfig(BaseModel):
    """Where text comes from and how it is cut into sequences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        description="text, .jsonl or .parquet file, a folder of them, or the name of a `datasets` dataset"
    )
    text_column: str = Field("text", description="column or JSON key that holds the text")
    split: str = Field("train", description="split of a `datasets` dataset")
    seq_len: int = Field(1024, ge=2, le=1 << 20, description="rows per sequence")
    max_sequences: int | None = Field(None, ge=1, description="keep only the first so many sequences of the corpus")


class TeacherConfig(BaseModel):
    """Which model speaks, and how it is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str = Field(description="folder or hub id of a causal language model")
    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="precision of the teacher's body (auto: bfloat16 on CUDA, float32 on a CPU); logits are float32",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the teacher runs")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the checkpoint")


class EngineConfig(BaseModel):
    """How the shards are spread over processes; none of it changes the cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["ranks", "local", "ray"] = Field(
        "ranks",
        description="ranks: this process, or its stripe of the shards where torchrun, SLURM or a Kubernetes Indexed Job started "
        "several; local: processes of this machine; ray: tasks on a Ray cluster",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="processes of engine local (one per GPU, else per core); most tasks at a time of engine ray",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a worker (local: its share of the cores; ray: 1)"
    )
    rank: int | None = Field(
        None, ge=0, description="which of several such commands this is, from 0 (else: from the scheduler)"
    )
    ranks: int | None = Field(None, ge=1, description="how many such commands there are")


class CacheConfig(CorpusConfig, TeacherConfig, EngineConfig):
    """Settings of `stillroom cache`: one teacher, one corpus, one sampler, one directory."""

    out: Annotated[Path | str, BeforeValidator(path_or_url)] = Field(
        description="directory of the cache, or s3://, gs:// or az:// URL of an object store"
    )
    sampler: SamplerKind = Field("threshold", description="how the teacher's distribution is thinned")
    draws: int = Field(50, description="N: number of draws, threshold 1/N; the k of top_k, the cap of top_p")
    top_p: float = Field(1.0, description="probability mass that top_p keeps")
    exponent: float = Field(1.0, description="proposal exponent of `random`: draws come from p**exponent")
    keep_logp: KeepLogp = Field("all", description="which entries keep the teacher's exact log-probability")
    seed: int = Field(0, description="key of the sampler's generator")
    batch_size: int = Field(8, ge=1, description="sequences per teacher forward (changes speed, not the cache)")
    sequences_per_shard: int = Field(1024, ge=1, description="sequences per shard: the unit of restart and of commit")

    def sampler_spec(self) -> SamplerSpec:
        """The sampler these settings ask for.

        Raises:
            InputError: a combination no sampler has.
        """
        return SamplerSpec(
            kind=self.sampler,
            draws=self.draws,
            seed=self.seed,
            exponent=self.exponent,
            top_p=self.top_p,
            keep_logp=self.keep_logp,
        )
