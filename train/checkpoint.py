"""What a checkpoint holds, written by the first process, read by all: whole tensors by name, for any number of processes.

    model.safetensors       trained weights (with LoRA the factors alone) and buffers; config.json beside a whole model
    ema.safetensors         their running average, where there is one
    optimizer.pt            {"state": {parameter: {name: tensor}}, "groups": [settings of each group]}
    scheduler.pt            the learning rate's schedule
    generators.pt           random generators of every process
    trainer_state.json      the library's record of steps
    complete.json           size and SHA-256 of each of these

A checkpoint of one process, of DDP and of FSDP2 are the same files, so each goes on as any other. It is written under another
name and renamed when whole; the last two are kept. Nothing in it runs code when it is read.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stillroom.storage.errors import InputError
from stillroom.train.folder import RunFolder, mark_complete
from stillroom.train.ranks import Ranks
from stillroom.train.sharded import fill, whole

MODEL, EMA, OPTIMIZER, SCHEDULER = "model.safetensors", "ema.safetensors", "optimizer.pt", "scheduler.pt"
GENERATORS, STATE = "generators.pt", "trainer_state.json"
KEPT: Final = 2
_UNWRITTEN: Final = ("PytorchStreamWriter", "iostream", "I/O error", "write", "No space", "File too large")

Tensors = dict[str, torch.Tensor]


def tensors_of(model: nn.Module, *, trained_only: bool = False) -> Tensors:
    """Parameters by name, each once however many names it has, and the buffers that are kept; as they are, cut or whole."""
    found: Tensors = {n: p for n, p in model.named_parameters() if p.requires_grad or not trained_only}
    if not trained_only:
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        found.update((name, x) for name, x in model.state_dict().items() if name not in every)
    return found


def gather(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> Tensors:
    """The whole tensors, on the host, in the first process; nothing in the others, which must ask too."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        made = whole(tensor)
        if ranks.first:
            found[name] = made.cpu().contiguous()
    return found


def gather_optimizer(optimizer: Any, model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """State by name of parameter, and the settings of the groups; see `gather`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    for parameter, kept in optimizer.state.items():
        state[names[id(parameter)]] = gather(kept, ranks)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {"state": state, "groups": groups}


def save_checkpoint(
    folder: RunFolder,
    step: int,
    ranks: Ranks,
    *,
    tensors: Mapping[str, Tensors],
    objects: Mapping[str, Any],
    finish: Callable[[Path], None],
) -> None:
    """Write `checkpoint-<step>` and drop all but the last two.

    Args:
        folder: the run's.
        step: steps done.
        ranks: the processes; every one of them calls this.
        tensors: file to tensors, gathered.
        objects: file to what `torch.save` is to write.
        finish: writes what else belongs into the folder it is given.

    Raises:
        InputError: it could not be written; nothing is left of it, and earlier ones are as they were.
    """

    def write() -> None:
        final = folder.path / f"checkpoint-{step}"
        part = folder.path / f".{final.name}.part"
        last = folder.checkpoints()[-1:]
        kept = f"it will go on from {last[0].name}" if last else "it will begin anew"
        try:
            with writing(f"{final.name} could not be written", f"run the same command again: {kept}"):
                for old in (part, final):  # left by a killed process
                    shutil.rmtree(old, ignore_errors=True)
                part.mkdir()
                for name, found in tensors.items():
                    save_file(found, part / name, metadata={"format": "pt"})
                for name, found in objects.items():
                    torch.save(found, part / name)
                finish(part)
                mark_complete(part)
                part.rename(final)
        except InputError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for old in folder.checkpoints()[:-KEPT]:
            shutil.rmtree(old)

    ranks.once(write)


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Turn the errors of a disk that takes no more into one sentence: torch and safetensors each have their own.

    Raises:
        InputError: in their place.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not any(word in said for word in _UNWRITTEN):
            raise
        raise InputError(f"{what} ({said[:200]}): make room and {remedy}") from error


def load_weights(checkpoint: Path, name: str, into: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors of a file into those of the same name.

    Raises:
        InputError: the file holds others.
    """
    found = load_file(checkpoint / name)
    if found.keys() != into.keys():
        strange = sorted(found.keys() ^ into.keys())
        raise InputError(
            f"{checkpoint / name} holds other tensors than the student ({strange[0]} first of {len(strange)}): it was written by "
            "another version; start in a new --out, or with --resume false"
        )
    for key, target in into.items():
        fill(target, found[key])


def load_optimizer(checkpoint: Path, optimizer: Any, model: nn.Module) -> None:
    """Give an optimizer the state and the settings that were saved; each process takes its part of cut tensors.

    Raises:
        InputError: other parameters or groups than the optimizer's.
    """
    saved = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    groups = iter(saved["groups"])
    if len(saved["groups"]) != len(inner.param_groups):
        raise InputError(f"{checkpoint} was written with another optimizer: start in a new --out")
    for part in getattr(inner, "optimizers", [inner]):
        for group in part.param_groups:
            group.update(next(groups))
            for parameter in group["params"]:
                kept = saved["state"].get(names[id(parameter)], {})
                part.state[parameter] = {k: _state_like(parameter, x) for k, x in kept.items()}


def _state_like(parameter: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """A state tensor on the parameter's device, cut as it is cut; counters have no dimensions."""
    if found.shape != parameter.shape:
        return found.to(parameter.device, copy=True)
    made = torch.empty_like(parameter, dtype=found.dtype, requires_grad=False)
    fill(made, found)
    return made


def generators() -> dict[str, Any]:
    """The state of this process's random generators, in types that `torch.load` takes without running code."""
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_generators(found: dict[str, Any]) -> None:
    """Inverse of `generators`."""
    random.setstate(found["python"])
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(found["cpu"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])


def scatter_generators(seed: int, step: int, rank: int) -> None:
    """Generators that differ between processes, where there are none to go on with: dropout must not be the same in all."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
