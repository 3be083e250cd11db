"""Settings of `stillroom train`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

LossName = Literal[
    "ce",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "dkd",
    "atkd",
    "taid",
    "akl",
    "tail_aware",
]
MissingMass = Literal["truncate", "renormalise_teacher", "renormalise_both", "tail_bucket"]
OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["constant", "linear", "cosine", "wsd"]
RowValue = Literal["entropy", "surprise", "column"]
DtypeName = Literal["auto", "float32", "bfloat16"]
NOT_YET: Final = {
    "uld": "a student with another tokenizer needs ranks of the whole vocabulary (ULD, arXiv 2402.12030)",
    "delta_kd": "it needs two teachers at the same ids (arXiv 2509.14526)",
    "minillm": "it needs text that the student wrote (arXiv 2306.08543)",
}
HeadName = Literal["auto", "fused", "logits"]
ParallelName = Literal["ddp", "fsdp"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


class TrainConfig(BaseModel):
    """Settings of `stillroom train`: one student, one source of targets, one run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache: Path | str | None = Field(
        None,
        description="cache with the tokens and the teacher's targets: a directory or a URL (s3://, gs://, hf://, https://); A,B "
        "reads one after the other; A:0.7,B:0.3 mixes the targets of caches of the same tokens",
    )
    cache_dir: Path | None = Field(
        None,
        description="directory of the local copies of a remote cache (unset: stillroom/ in the hub library's cache)",
    )
    cache_bytes: int | None = Field(None, ge=1, description="the most bytes of shards kept there (unset: 64 GiB)")
    window: int | None = Field(
        None, ge=1, description="shards mixed at a time (unset: all; of a remote cache 8, or what cache_bytes holds)"
    )

    select_by: str | None = Field(
        None,
        description="read only a quantile range of the sequences by label_logp, entropy, difference or a file of one number each",
    )
    select_from: float = Field(0.0, ge=0, le=1, description="lower end of that range: 0.5 leaves the lower half out")
    select_to: float = Field(1.0, ge=0, le=1, description="upper end of that range")
    reference_losses: Path | None = Field(
        None, description="losses of a reference model (`stillroom losses`), which make the column difference"
    )
    sequence_weights: Path | None = Field(
        None, description="file of one weight a sequence (text or .npy): how often it is read in an epoch, on average"
    )
    domains: Path | None = Field(
        None, description="file of one domain a sequence, to be weighted by the gap between student and teacher"
    )
    student_losses: Path | None = Field(
        None, description="losses of the student to be (`stillroom losses`), for --domains"
    )
    domain_smoothing: float = Field(
        0.5, ge=0, le=1, description="share of the visits that the gap decides; the rest is even over the domains"
    )
    curriculum: str | None = Field(
        None, description="let sequences in from easy to hard, by label_logp, entropy, difference or a file of numbers"
    )
    curriculum_start: float = Field(
        0.2, gt=0, le=1, description="share of the sequences, the easiest, that take part at the beginning"
    )
    curriculum_share: float = Field(
        0.5, gt=0, le=1, description="share of the steps over which the curriculum lets all sequences in"
    )

    student: str = Field(
        description="folder with weights, folder or .json file with a configuration only (random weights), or hub id"
    )
    out: Path = Field(description="run folder; the trained student is saved in it")
    teacher: str | None = Field(
        None,
        description="folder or hub id of a live teacher: targets are its whole distributions, not those of a cache",
    )
    loss: LossName = Field(
        "forward_kl",
        description="ce: the text alone; any other: a divergence from the teacher (docs/losses.md has them all)",
    )
    alpha: float = Field(0.0, description="share of hard-label cross-entropy beside the divergence, 0 to 1")
    alpha_end: float | None = Field(None, description="share at the last step (unset: alpha throughout)")
    alpha_schedule: ScheduleName = Field(
        "linear", description="how alpha gets to alpha_end; wsd: in the last part of the run, see decay"
    )
    temperature: float = Field(1.0, gt=0, description="of both distributions in the divergence, whose value takes T**2")
    temperature_end: float | None = Field(None, gt=0, description="temperature at the last step")
    temperature_schedule: ScheduleName = Field("linear", description="how temperature gets to temperature_end")
    missing: MissingMass | None = Field(
        None,
        description="what becomes of the mass a top_k or top_p cache dropped; must be named for those, for no other",
    )
    allow_biased: bool = Field(False, description="train all the same where the cache carries the loss badly biased")
    beta: float = Field(0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    skew: float = Field(0.1, gt=0, lt=1, description="skew_kl, skew_reverse_kl: share of the mixture")
    label_factor: float = Field(1.0, ge=0, description="dkd: factor of the label against the rest")
    rest_factor: float = Field(0.5, ge=0, description="dkd: factor of the distribution over the rest")
    easy_weight: float = Field(0.2, ge=0, le=1, description="atkd: share of easy rows in the loss")
    hard_share: float = Field(
        0.5, gt=0, lt=1, description="atkd, hard_weight: share of rows that are hard, those of least p(label)"
    )
    taid_start: float = Field(0.4, ge=0, le=1, description="taid: the teacher's share at the first step")
    taid_end: float = Field(1.0, ge=0, le=1, description="taid: the teacher's share at the last step")
    taid_schedule: ScheduleName = Field("linear", description="taid: how the share gets there")
    head_mass: float = Field(0.5, ge=0, le=1, description="akl: mass of the head")
    head_size: int = Field(10, ge=1, description="tail_aware: ids of the head")
    tail_factor: float = Field(2.0, ge=0, description="tail_aware: factor of the divergence within the tail")
    row_weight: RowValue | None = Field(
        None,
        description="weigh rows by the teacher's entropy, its surprise at the label, or a column (mean weight 1)",
    )
    row_weight_power: float = Field(1.0, gt=0, le=4, description="exponent of that value")
    row_weight_file: Path | None = Field(None, description="the column: a .npy of floats [sequences, seq_len]")
    hard_weight: float = Field(1.0, gt=0, description="factor of hard rows (hard_share) against the others")
    id_map: Path | None = Field(
        None, description="for a student with fewer ids: a .npy of its id for each of the teacher's, -1 for none"
    )
    unknown_id: int = Field(0, ge=0, description="the student's id for tokens it lacks (with id_map)")

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
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep a running average of the weights with this decay, and save it in ema/ as well",
    )
    lora_rank: int | None = Field(
        None, ge=1, description="train LoRA factors of this rank beside frozen weights (unset: train all weights)"
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="scale of the factors, over the rank (unset: twice the rank)"
    )
    lora_targets: str | None = Field(
        None, description="modules that get factors, comma-separated names (unset: every linear one but the head)"
    )
    head: HeadName = Field(
        "auto",
        description="fused: loss from hidden states, a chunk of logits at a time; logits: all at once (auto: fused on a GPU)",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep the input of every block only and compute the block again in the backward pass"
    )
    compile: bool = Field(False, description="compile every block with torch.compile")
    parallel: ParallelName = Field(
        "ddp", description="of several processes: ddp, a whole student in each; fsdp, one student cut over them"
    )
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="processes that read and decode ahead of each training process (unset: 2 on a GPU, else 0)",
    )
    report_to: TrackerName | None = Field(None, description="tracker to report to as well, if it is installed")

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

    eval_cache: str | None = Field(
        None,
        description="cache (directory or URL) of held-out text, to evaluate on during training: LM loss, KL, acceptance",
    )
    eval_data: str | None = Field(
        None,
        description="held-out text instead (file, folder or `datasets` name): LM loss, and with --teacher the rest",
    )
    eval_every: int = Field(500, ge=1, description="steps between evaluations; the last step is one as well")
    eval_rows: int = Field(65536, ge=1, description="held-out rows, rounded up to whole sequences")
    save_every: int = Field(500, ge=0, description="steps between checkpoints (0: none); the last two are kept")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    resume: bool = Field(True, description="go on from the last checkpoint in the run folder, if there is one")

    @field_validator("loss", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value in NOT_YET:
            raise ValueError(f"is not to be had yet: {NOT_YET[value]}")
        return value
