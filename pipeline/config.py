"""Settings of `stillroom cache`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from stillroom.storage.depot import path_or_url
from stillroom.storage.spec import KeepLogp, SamplerKind, SamplerSpec


class CorpusConfig(BaseModel):
    """Where text comes from and how it is cut into sequences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        description="text, .jsonl, .parquet or .arrow file, .bin (with .idx) or .ds file of token ids, a folder of them, the "
        "name of a `datasets` dataset, or several with commas between; NAME:WEIGHT,NAME:WEIGHT draws documents by weight"
    )
    text_column: str = Field("text", description="column or JSON key that holds the text")
    messages_column: str | None = Field(
        None, description="column of chat messages, put through the chat template; only assistant tokens become targets"
    )
    ids_column: str | None = Field(None, description="column of token ids, for a corpus that is tokenised already")
    split: str = Field("train", description="split of a `datasets` dataset")
    subset: str | None = Field(None, description="configuration of a `datasets` dataset that has several")
    streaming: bool = Field(False, description="read a `datasets` dataset from afar instead of downloading it first")
    skip_bad: int = Field(0, ge=0, description="pass over so many broken records before giving up")
    tokenize_workers: int = Field(
        0, ge=0, le=256, description="processes that tokenise ahead (0: this one; changes speed only)"
    )
    packing: Literal["concat", "documents"] = Field(
        "concat",
        description="documents end to end; with `documents` positions and attention begin anew at each, for teacher and student",
    )
    seq_len: int = Field(1024, ge=2, le=1 << 20, description="rows per sequence")
    max_sequences: int | None = Field(None, ge=1, description="keep only the first so many sequences of the corpus")

    @model_validator(mode="after")
    def _one_column(self) -> Self:
        if self.messages_column is not None and self.ids_column is not None:
            raise ValueError("messages_column and ids_column both came, and a document is one or the other: drop one")
        return self


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
    attn_implementation: str | None = Field(
        None, description="attention of the teacher: sdpa, eager, flash_attention_2 or another that transformers knows"
    )
    device_map: str | None = Field(
        None, description="spread one teacher over the devices of this process: auto, balanced, sequential or a device"
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="under torchrun, hold one teacher with so many processes, each a slice of its matrices; such a group is one "
        "worker",
    )
    adapter: str | None = Field(None, description="folder or hub id of a PEFT adapter to put on the teacher")
    vocab_size: int | None = Field(
        None,
        ge=1,
        description="ids the teacher knows, where its logits are padded to more: columns beyond are left out",
    )
    skip_bad_rows: bool = Field(
        False, description="keep nothing for rows whose logits are NaN or infinite, and count them, instead of stopping"
    )


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
    entries_per_row: float | None = Field(
        None, gt=0, description="solve for the draws that keep so many entries per row of the corpus' first sequences"
    )
    top_p: float = Field(1.0, description="probability mass that top_p keeps")
    exponent: float = Field(1.0, description="proposal exponent of `random`: draws come from p**exponent")
    keep_logp: KeepLogp = Field("all", description="which entries keep the teacher's exact log-probability")
    seed: int = Field(0, description="key of the sampler's generator")
    batch_size: int = Field(8, ge=1, description="sequences per teacher forward (changes speed, not the cache)")
    sequences_per_shard: int = Field(1024, ge=1, description="sequences per shard: the unit of work and of commit")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        # By value: a worker gets all settings spelled out, and the default of `draws` then says nothing.
        if self.entries_per_row is not None and self.draws != type(self).model_fields["draws"].default:
            raise ValueError("draws and entries_per_row both came, and the second is solved for the first: give one")
        return self

    def sampler_spec(self) -> SamplerSpec:
        """The sampler these settings ask for; where `entries_per_row` is given, its draws are still to be solved for.

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
