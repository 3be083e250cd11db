"""`transformers.Trainer` with our order of data, loss, optimizer and log; everything else is the library's.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `V` vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stillroom.storage.errors import InputError
from stillroom.storage.stream import StreamOrder
from stillroom.train.batch import Batch
from stillroom.train.config import TrainConfig
from stillroom.train.data import OrderSampler, Source
from stillroom.train.folder import RunFolder, mark_complete
from stillroom.train.objective import Objective
from stillroom.train.optim import BETAS, make_optimizer, rate_multiplier

Progress = Callable[[int, int, dict[str, Any]], None]


@final
class StillroomTrainer(Trainer):  # type: ignore[misc]  # the library is untyped
    """One run over a `Source`.

    Args:
        model: the student.
        config: resolved settings (`steps`, `lr`, `weight_decay` and `dtype` are set).
        source: sequences.
        objective: the loss.
        order: which sequence stands where.
        folder: where checkpoints and metrics go.
        first_step: step of the checkpoint the run goes on from.
        last_metrics: the last line of the log up to there; empty for a new run.
        on_progress: told (steps done, steps in all, last metrics) after every step.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        config: TrainConfig,
        source: Source,
        objective: Objective,
        order: StreamOrder,
        folder: RunFolder,
        first_step: int,
        last_metrics: dict[str, Any],
        on_progress: Progress,
    ) -> None:
        assert config.steps is not None
        self.optimizer: torch.optim.Optimizer | None  # the library's attributes, which mypy cannot see
        self.lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
        self.run_config = config
        self.source = source
        self.objective = objective
        self.order = order
        self.first_step = first_step
        self.last_metrics = last_metrics
        self._logged_step, self._logged_s = first_step, time.perf_counter()
        super().__init__(
            model=model,
            args=training_arguments(config, folder.path),
            callbacks=[_RunCallback(self, folder, on_progress)],
        )
        self.remove_callback(PrinterCallback)
        # Our loss is a mean over the whole step already, so the Trainer must not divide it by the number of parts.
        self.model_accepts_loss_kwargs = True
        # kd and ce since the last log, kept on the device so that a step does not wait for it
        self._terms = torch.zeros(2, device=self.args.device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this process, from `first_step` on."""
        config = self.run_config
        sampler = OrderSampler(
            self.order,
            batch_size=config.batch_size,
            steps=self.args.max_steps,
            parts=config.grad_accumulation,
            rank=self.args.process_index,
            ranks=self.args.world_size,
            first_step=self.first_step,
            follow=self.source.follow,
        )
        # A generator of its own: the loader would otherwise draw a seed from the global one, and dropout after a resume
        # would differ.
        return DataLoader(
            self.source,  # type: ignore[arg-type]  # __getitems__ is the loader's own protocol
            batch_sampler=sampler,
            collate_fn=_wrap,  # type: ignore[arg-type]  # __getitems__ hands it one batch
            generator=torch.Generator(),
            pin_memory=False,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Batch]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Batch]], torch.Tensor]:
        """The micro-batches of one step and the number of rows with a label in it, over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        rows = torch.tensor(float(sum(int(b["batch"].mask_BL.sum()) for b in batches)), device=device)
        if self.args.world_size > 1:
            rows = self.accelerator.gather(rows).sum()
        return batches, rows.clamp(min=1.0)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Batch],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the step's mean loss."""
        assert num_items_in_batch is not None
        assert not return_outputs
        batch = inputs["batch"].to(self.args.device)
        logits_BLV: torch.Tensor = model(**batch.inputs, use_cache=False).logits
        terms = self.objective(logits_BLV.flatten(0, 1), batch, num_items_in_batch, self.state.global_step)
        self._terms += torch.stack([terms.kd, terms.ce])
        world_size: int = self.args.world_size
        return terms.loss * world_size  # data-parallel gradients are averaged over processes

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon with AdamW."""
        if self.optimizer is None:
            config = self.run_config
            assert config.lr is not None
            assert config.weight_decay is not None
            self.optimizer = make_optimizer(
                self.model if model is None else model,
                name=config.optimizer,
                lr=config.lr,
                embedding_lr=config.embedding_lr,
                weight_decay=config.weight_decay,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up, then the schedule of the settings."""
        if self.lr_scheduler is None:
            config = self.run_config
            multiplier = rate_multiplier(
                config.schedule, steps=num_training_steps, warmup=config.warmup, decay=config.decay
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), multiplier)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Turn the library's figures into a line of `metrics.jsonl`; its summary at the end is dropped."""
        if "loss" not in logs:
            return
        done = self.state.global_step
        span, self._logged_step = done - self._logged_step, done
        now_s = time.perf_counter()
        passed_s, self._logged_s = now_s - self._logged_s, now_s
        rows = self.run_config.batch_size * self.source.seq_len
        kd, ce = (self.accelerator.reduce(self._terms, "sum") / span).tolist()
        self._terms.zero_()
        self.last_metrics = {
            "step": done,
            "epoch": done * self.run_config.batch_size / self.order.size,
            "tokens": done * rows,
            "loss": logs["loss"],
            **({} if self.objective.name == "ce" else {"kd": kd}),
            "ce": ce,
            "grad_norm": logs["grad_norm"],
            "lr": logs["learning_rate"],
            "tokens_per_s": span * rows / passed_s,
            "seconds": self.last_metrics.get("seconds", 0.0) + passed_s,
        }
        super().log({}, start_time)
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"the loss became {logs['loss']} by step {done}: lower --lr (it is {self.run_config.lr}) and start in a new --out"
            )

    def start_clock(self) -> None:
        """Called when the first step begins: what comes before is no training time."""
        self._logged_s = time.perf_counter()


class _RunCallback(TrainerCallback):  # type: ignore[misc]
    """Metrics file, progress, completeness of checkpoints."""

    def __init__(self, trainer: StillroomTrainer, folder: RunFolder, on_progress: Progress) -> None:
        self._trainer, self._folder, self._on_progress = trainer, folder, on_progress

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        # A resumed state carries the intervals it was saved with; those of this command count.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self._trainer.start_clock()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps
        self._on_progress(state.global_step, state.max_steps, self._trainer.last_metrics)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._folder.append_metrics(self._trainer.last_metrics)
        self._on_progress(state.global_step, state.max_steps, self._trainer.last_metrics)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """The library's arguments for a resolved configuration."""
    assert config.steps is not None
    assert config.lr is not None
    return TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=max(1, config.batch_size // config.grad_accumulation),
        gradient_accumulation_steps=config.grad_accumulation,
        learning_rate=config.lr,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=config.clip,
        bf16=config.dtype == "bfloat16",
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it hides a diverged run, and synchronises every step
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        save_total_limit=2,
        ignore_data_skip=True,  # the order is a function of the step: nothing to read past
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _wrap(batch: Batch) -> dict[str, Batch]:
    return {"batch": batch}  # the Trainer passes mappings on as they are
