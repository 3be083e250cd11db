"""LoRA students: small factors beside frozen matrices (Hu et al. 2021, arXiv 2106.09685), through the PEFT library."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillroom.storage.errors import InputError
from stillroom.train.config import TrainConfig
from stillroom.train.student import ModelInfo


def check_lora(config: TrainConfig, student: ModelInfo) -> None:
    """Refuse what can not be: no library, nothing to adapt.

    Raises:
        InputError: naming it.
    """
    if config.lora_rank is None:
        if config.lora_alpha is not None or config.lora_targets is not None:
            raise InputError("lora_alpha and lora_targets came without a rank: give --lora-rank, or drop them")
        return
    if importlib.util.find_spec("peft") is None:
        raise InputError("--lora-rank needs the PEFT library: pip install 'stillroom[peft]'")
    if not student.has_weights:
        raise InputError(
            f"student {student.name} has a configuration but no weights, and LoRA trains beside weights that stay as they are: "
            "give a student with weights, or drop --lora-rank"
        )


def add_lora(model: PreTrainedModel, config: TrainConfig) -> Any:
    """Put LoRA factors beside the model's matrices, in place, and freeze all else.

    Args:
        model: the student.
        config: with `lora_rank`; `lora_alpha` is twice that unless given; `lora_targets` are names of modules, all linear ones
            but the head unless given.

    Returns:
        PEFT's own wrapper, which saves and merges; the model itself goes on as it is.

    Raises:
        InputError: no module has such a name.
    """
    from peft import LoraConfig, get_peft_model

    assert config.lora_rank is not None
    targets = config.lora_targets
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules="all-linear" if targets is None else [t.strip() for t in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks the hub library by a name of before
            return get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"lora_targets came as {targets}, and {' '.join(str(error).split())[:200]}") from error


def merged(model: PreTrainedModel, config: TrainConfig, tensors: dict[str, torch.Tensor], adapter: Path) -> Any:
    """The student with the trained factors added to its weights; the factors alone are saved, as PEFT does, in `adapter`.

    Args:
        model: the student as it was before training.
        config: of the run.
        tensors: the trained factors.
        adapter: folder for them.
    """
    wrapper = add_lora(model, config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, found in tensors.items():
            parameters[name].copy_(found)
    wrapper.save_pretrained(adapter)
    return wrapper.merge_and_unload()
