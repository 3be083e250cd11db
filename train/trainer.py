"""`transformers.Trainer` with our order of data, loss, optimizer, checkpoints and log; loop and wrappers are the library's.

Shapes: `B` sequences, `L` positions, `N` = B * L rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, final

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stillroom.storage.errors import InputError, StillroomError
from stillroom.storage.stream import StreamOrder
from stillroom.train import checkpoint
from stillroom.train.batch import Batch
from stillroom.train.config import TrainConfig
from stillroom.train.data import OrderSampler, Source, loader_of
from stillroom.train.ema import Ema
from stillroom.train.engine import training_arguments
from stillroom.train.folder import RunFolder
from stillroom.train.optim import make_optimizer, rate_multiplier
from stillroom.train.ranks import Ranks
from stillroom.train.stop import Stop
from stillroom.train.watch import Watch

Progress = Callable[[int, int, dict[str, Any]], None]
GPU_WORKERS: Final = 2


@final
class StillroomTrainer(Trainer):  # type: ignore[misc]  # the library is untyped
    """One run over a `Source`.

    Args:
        model: the student, its forward already that of `fused.with_loss`.
        config: resolved settings (`steps`, `lr`, `weight_decay` and `dtype` are set).
        source: sequences.
        order: which sequence stands where.
        folder: where checkpoints and metrics go.
        ranks: the processes of the run.
        stop: asked after every step whether to save and leave; None: never.
        watch: evaluates the student as it goes; None: nothing is held out.
        first_step: step of the checkpoint the run goes on from.
        last_metrics: the last line of the log up to there; empty for a new run.
        on_progress: told (steps done, steps in all, last metrics) after every step, in the first process.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        config: TrainConfig,
        source: Source,
        order: StreamOrder,
        folder: RunFolder,
        ranks: Ranks,
        stop: Stop | None,
        watch: Watch | None,
        first_step: int,
        last_metrics: dict[str, Any],
        on_progress: Progress,
    ) -> None:
        assert config.steps is not None
        self.optimizer: torch.optim.Optimizer | None  # the library's attributes, which mypy cannot see
        self.lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
        self.control: Any
        self.run_config = config
        self.source = source
        self.order = order
        self.folder = folder
        self.ranks = ranks
        self.watch = watch
        self.first_step = first_step
        self.last_metrics = last_metrics
        self.held_out: dict[str, float] = {}  # the last held-out figures
        self.ema: Ema | None = None
        self._logged_step, self._logged_s = first_step, time.perf_counter()
        self._wait_s = 0.0
        super().__init__(
            model=model,
            args=training_arguments(config, folder.path),
            callbacks=[_RunCallback(self, stop, on_progress)],
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
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            first_step=self.first_step,
            follow=self.source.follow,
        )
        workers = config.loader_workers
        if workers is None:
            workers = GPU_WORKERS if self.args.device.type == "cuda" else 0
        return loader_of(self.source, sampler, workers=workers, collate=_wrap)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Batch]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Batch]], float]:
        """The micro-batches of one step and the number of rows with a label in it, over all processes."""
        begun_s, failed = time.perf_counter(), None
        batches: list[dict[str, Batch]] = []
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except StillroomError as error:
            failed = error
        self._wait_s += time.perf_counter() - begun_s
        mine = float(sum(int(b["batch"].mask_BL.sum()) for b in batches))
        rows, failures = self.ranks.total(mine, float(failed is not None))
        if failures:
            raise failed or InputError("another process of the run could not read its part of a batch and says why")
        return batches, max(rows, 1.0)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Batch],
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the step's mean loss."""
        assert num_items_in_batch is not None
        assert not return_outputs
        batch = inputs["batch"].to(self.args.device)
        loss: torch.Tensor
        loss, kd, ce = model(batch=batch, rows=num_items_in_batch, step=self.state.global_step)
        self._terms += torch.stack([kd, ce])
        return loss * self.ranks.count  # data-parallel gradients are averaged over processes

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon with AdamW; and the running average, now that the weights are where they stay."""
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
            if config.ema is not None:
                self.ema = Ema(self.model, config.ema)
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

    def trained(self) -> checkpoint.Tensors:
        """What is trained, and with all weights trained the buffers too; by name, cut as they are."""
        return checkpoint.tensors_of(self.model, trained_only=self.run_config.lora_rank is not None)

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
            **({} if self.run_config.loss == "ce" else {"kd": kd}),
            "ce": ce,
            "grad_norm": logs["grad_norm"],
            "lr": logs["learning_rate"],
            "tokens_per_s": span * rows / passed_s,
            "data_wait": self._wait_s / passed_s,
            "seconds": self.last_metrics.get("seconds", 0.0) + passed_s,
        }
        self._wait_s = 0.0
        if self.watch is not None and self.watch.due(done, self.args.max_steps):
            self.held_out = self.watch(self.model, done, self.args.device, self.ranks)
            self.last_metrics |= self.held_out
            self._logged_s = time.perf_counter()
        # Not `super().log`, which would keep every line in the state that goes into checkpoints.
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(self.last_metrics))
        if not math.isfinite(logs["loss"]):  # a mean over all processes, so all of them see it
            raise InputError(
                f"the loss became {logs['loss']} by step {done}: lower --lr (it is {self.run_config.lr}) and start in a new --out"
            )

    def start_clock(self) -> None:
        """Called when the first step begins: what comes before is no training time."""
        self._logged_s, self._wait_s = time.perf_counter(), 0.0

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if self.run_config.parallel != "fsdp":  # cut for FSDP2 it is in place
            super()._move_model_to_device(model, device)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # Checkpoints are ours (see `checkpoint.py`): whole, hashed, the same for any number of processes.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        ranks, inner = self.ranks, self.model
        tensors = {checkpoint.MODEL: checkpoint.gather(self.trained(), ranks)}
        if self.ema is not None:
            tensors[checkpoint.EMA] = checkpoint.gather(self.ema.average, ranks)
        assert self.lr_scheduler is not None
        objects = {
            checkpoint.OPTIMIZER: checkpoint.gather_optimizer(self.optimizer, inner, ranks),
            checkpoint.SCHEDULER: self.lr_scheduler.state_dict(),
            checkpoint.GENERATORS: ranks.each(checkpoint.generators()),
        }

        def finish(part: Path) -> None:
            self.state.save_to_json(str(part / checkpoint.STATE))
            if self.run_config.lora_rank is None:
                inner.config.save_pretrained(part)

        checkpoint.save_checkpoint(
            self.folder, self.state.global_step, ranks, tensors=tensors, objects=objects, finish=finish
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        checkpoint.load_weights(Path(resume_from_checkpoint), checkpoint.MODEL, self.trained())

    def _load_optimizer_and_scheduler(self, checkpoint_: str | None) -> None:
        if checkpoint_ is None:
            return
        kept = Path(checkpoint_)
        checkpoint.load_optimizer(kept, self.optimizer, self.model)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(kept / checkpoint.SCHEDULER, weights_only=True))
        if self.ema is not None:
            checkpoint.load_weights(kept, checkpoint.EMA, self.ema.average)

    def _load_rng_state(self, checkpoint_: str | None) -> None:
        if checkpoint_ is None:
            return
        kept = torch.load(Path(checkpoint_) / checkpoint.GENERATORS, map_location="cpu", weights_only=True)
        if len(kept) == self.ranks.count:
            checkpoint.set_generators(kept[self.ranks.rank])
        else:
            checkpoint.scatter_generators(self.run_config.seed, self.first_step, self.ranks.rank)


class _RunCallback(TrainerCallback):  # type: ignore[misc]
    """Metrics file, progress, running average, stopping."""

    def __init__(self, trainer: StillroomTrainer, stop: Stop | None, on_progress: Progress) -> None:
        self._trainer, self._stop, self._on_progress = trainer, stop, on_progress

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        # A resumed state carries the intervals it was saved with; those of this command count.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        if trainer.ranks.rank > 0 and trainer.first_step == 0:  # the library has given all processes one seed
            checkpoint.scatter_generators(trainer.run_config.seed, 0, trainer.ranks.rank)
        if self._stop is not None:
            self._stop.working = True
        trainer.start_clock()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer, done = self._trainer, state.global_step
        if trainer.ema is not None:
            trainer.ema.update(done - 1)
        due = trainer.watch is not None and trainer.watch.due(done, state.max_steps)
        control.should_log = control.should_log or due or done >= state.max_steps
        if self._stop is not None:
            (asked,) = trainer.ranks.total(float(self._stop.number > 0))  # one may know of it, all must leave
            if asked and done < state.max_steps:
                control.should_log = control.should_save = control.should_training_stop = True
        self._progress(state)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.ranks.first:
            self._trainer.folder.append_metrics(self._trainer.last_metrics)
        self._progress(state)

    def _progress(self, state: Any) -> None:
        if self._trainer.ranks.first:
            told = self._trainer.last_metrics | self._trainer.held_out
            self._on_progress(state.global_step, state.max_steps, told)


def _wrap(batch: Batch) -> dict[str, Batch]:
    return {"batch": batch}  # the Trainer passes mappings on as they are
