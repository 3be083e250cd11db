"""What stands between settings and the library's engine: checks, the student made ready, the library's arguments."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel, TrainingArguments

from stillroom.storage.errors import InputError
from stillroom.train.adapters import add_lora, check_lora
from stillroom.train.config import TrainConfig
from stillroom.train.fused import find_head, with_loss
from stillroom.train.objective import Objective
from stillroom.train.optim import BETAS
from stillroom.train.ranks import Ranks
from stillroom.train.sharded import blocks_of, shard
from stillroom.train.student import ModelInfo

TRACKERS: Final = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}

logger = logging.getLogger(__name__)


def check_engine(config: TrainConfig, student: ModelInfo, ranks: Ranks) -> None:
    """Refuse settings of the engine that can not be met; nothing has been written yet.

    Raises:
        InputError: naming the first.
    """
    check_lora(config, student)
    if config.parallel == "fsdp" and ranks.count == 1:
        raise InputError(
            "parallel came as fsdp with one process, which has nobody to share the student with: start several with torchrun, "
            "or drop --parallel"
        )
    if config.report_to is not None and not any(map(importlib.util.find_spec, TRACKERS[config.report_to])):
        raise InputError(
            f"report_to came as {config.report_to}, which is not installed: pip install {config.report_to}, or drop --report-to "
            "(metrics.jsonl is always written)"
        )


def make_ready(model: PreTrainedModel, config: TrainConfig, objective: Objective, ranks: Ranks) -> None:
    """Give a loaded student its LoRA factors, checkpointed and compiled blocks, the loss in its forward, and cut it for FSDP2.

    Raises:
        InputError: it can not be trained as asked.
    """
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if config.lora_rank is not None:
        add_lora(model, config)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"a {model.config.model_type} student can not compute its blocks again in the backward pass: drop "
                "--gradient-checkpointing"
            )
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    on_gpu = torch.cuda.is_available()
    head = None
    if config.head == "fused" or (config.head == "auto" and on_gpu):
        found = find_head(model)
        why = None
        if not objective.fusable:
            why = f"loss {objective.name} looks at whole rows of logits"
        elif found is None:
            why = f"the head of a {model.config.model_type} student is more than a matrix after its last hidden states"
        if why is not None and config.head == "fused":
            raise InputError(f"head came as fused, but {why}: use --head auto or logits")
        if why is not None:
            logger.warning("logits are made whole: %s", why)
        head = found if why is None else None
    blocks = blocks_of(model)
    if config.compile:
        for block in blocks or [model.base_model]:
            block.compile()
    with_loss(model, objective, head, dtype)
    if config.parallel == "fsdp":
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        shard(model, processes=ranks.count, device=device, dtype=dtype)


def training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """The library's arguments for a resolved configuration."""
    assert config.steps is not None
    assert config.lr is not None
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=max(1, config.batch_size // config.grad_accumulation),
        gradient_accumulation_steps=config.grad_accumulation,
        learning_rate=config.lr,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=config.clip,
        bf16=False,  # autocast is our forward's
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it hides a diverged run, and synchronises every step
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        ignore_data_skip=True,  # the order is a function of the step: nothing to read past
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=config.report_to or "none",
        run_name=out.resolve().name,
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # the library would wrap the student in DataParallel
        logger.warning("%d GPUs are here and one is used: start with torchrun to use them all", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments
