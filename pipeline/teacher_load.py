"""Opening a teacher and its tokenizer with the hub library, every failure said in one sentence."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from stillroom.pipeline.config import TeacherConfig
from stillroom.storage.errors import InputError


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        InputError: none can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"no tokenizer can be loaded from {name} ({_first_line(error)}): save the teacher's tokenizer beside its weights"
        ) from error


def load_model(config: TeacherConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The causal language model of `config`, its adapter in place, on its devices, ready to be run.

    A quantised checkpoint is opened as its own settings say. An adapter is not merged: rounding its product into low-precision
    weights would make another teacher.

    Raises:
        InputError: it can not be loaded, or has no head.
    """
    from transformers import AutoModelForCausalLM

    _check_path(config.teacher)
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.device_map is not None or device.type == "cuda":
        options["device_map"] = config.device_map or str(device)  # straight to the device, never whole on the host
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.teacher,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(
            f"teacher {config.teacher} can not be loaded as a causal language model ({_first_line(error)}): "
            "name a folder or hub id that AutoModelForCausalLM opens, and settings that it knows"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing or model.get_output_embeddings() is None:
        what = f"its weights lack {missing[0]}" if missing else "it has no output embeddings"
        raise InputError(f"teacher {config.teacher} has no causal-LM head ({what}): name a causal language model")
    if config.adapter is not None:
        model = _with_adapter(model, config.adapter, config.teacher)
    return model.eval()


def _with_adapter(model: Any, adapter: str, teacher: str) -> Any:
    try:
        peft = import_module("peft")
    except ImportError as error:
        raise InputError(
            f"adapter {adapter} needs the package peft, which is not installed: pip install 'stillroom[peft]'"
        ) from error
    try:
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(
            f"adapter {adapter} can not be put on teacher {teacher} ({_first_line(error)}): name a PEFT adapter made for it"
        ) from error
    if wrapped.active_peft_config.is_prompt_learning:
        raise InputError(
            f"adapter {adapter} adds virtual tokens, which have no rows of their own: name one that changes weights (LoRA, say)"
        )
    inner = wrapped.get_base_model()
    inner.peft_config = wrapped.peft_config  # its settings are part of the teacher's identity
    return inner


def _check_path(name: str) -> None:
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or len(Path(name).parts) > 2
    if (looks_local and not path.is_dir()) or (path.exists() and not (path / "config.json").is_file()):
        raise InputError(
            f"teacher {name} is not a model folder (no config.json there): name one that save_pretrained wrote, or a hub id"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
