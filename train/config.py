"""Settings of `stillroom train`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LossName = Literal["forward_kl", "ce", "full_kd"]
MissingMass = Literal["truncate", "renormalise_teacher", "renormalise_both", "tail_bucket"]
OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["constant", "linear", "cosine", "wsd"]
DtypeName = Literal["auto", "float32", "bfloat16"]


class TrainConfig(BaseModel):
    """Settings of `stillroom train`: one student, one source of targets, one run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache: Path | str | None = Field(
        None,
        description="cache with the tokens and the teacher's targets: a directory, or a URL (s3://, gs://, hf://, https://)",
    )
    cache_dir: Path | None = Field(
        None,
        description="directory of the local copies of a remote cache (unset: stillroom/ in the hub library's cache)",
    )
    cache_bytes: int | None = Field(None, ge=1, description="the most bytes of shards kept there (unset: 64 GiB)")
    window: int | None = Field(
        None, ge=1, description="shards mixed at a time (unset: all; of a remote cache 8, or what cache_bytes holds)"
    )
    student: str = Field(
        description="folder with weights, folder or .json file with a configuration only (random weights), or hub id"
    )
    out: Path = Field(description="run folder; the trained student is saved in it")
    loss: LossName = Field(
        "forward_kl",
        description="forward_kl: KL to the cached targets; ce: the text alone; full_kd: KL to a live teacher",
    )
    alpha: float = Field(0.0, description="share of hard-label cross-entropy beside the KL, 0 to 1")
    missing: MissingMass | None = Field(
        None,
        description="what becomes of the mass a top_k or top_p cache dropped; must be named for those, for no other",
    )
    teacher: str | None = Field(None, description="folder or hub id of the live teacher of full_kd")

    optimizer: OptimizerName = Field(
        "adamw", description="adamw, or muon for the hidden matrices with adamw for embeddings, head and norms"
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="peak learning rate (unset: 1e-3 for adamw; 0.02 for muon, which is per unit of spectral norm)",
    )
    embedding_lr: float = Field(
        4e-3, gt=0, description="peak learning rate of muon's adamw part (embeddings, head, norms)"
    )
    weight_decay: float | None = Field(
        None, ge=0, description="decoupled weight decay of matrices (unset: 0.1 for adamw, 0.05 for muon's matrices)"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps over which the rate rises from zero")
    schedule: ScheduleName = Field(
        "cosine",
        description="after the warm-up: constant, linear or cosine to zero, or wsd (constant, then linear to zero)",
    )
    decay: float = Field(0.5, gt=0, le=1, description="share of the steps, at the end, over which wsd falls to zero")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient (0: no clipping)")

    batch_size: int = Field(16, ge=1, description="sequences per optimizer step, over all processes")
    grad_accumulation: int = Field(1, ge=1, description="parts the batch is cut in to save memory; changes no result")
    steps: int | None = Field(None, ge=1, description="optimizer steps (unset: from epochs)")
    epochs: float = Field(1.0, gt=0, description="passes over the sequences, where steps is unset")
    max_sequences: int | None = Field(None, ge=1, description="train on the first so many sequences only")
    seed: int = Field(
        0, ge=0, lt=1 << 32, description="seed of random weights, of dropout and of the order of sequences"
    )
    dtype: DtypeName = Field(
        "auto",
        description="precision of matrix products; weights stay float32 (auto: bfloat16 where the hardware is fast at it)",
    )

    save_every: int = Field(500, ge=0, description="steps between checkpoints (0: none); the last two are kept")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    resume: bool = Field(True, description="go on from the last checkpoint in the run folder, if there is one")
