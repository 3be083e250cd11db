"""Opening a teacher and its tokenizer with the hub library, every failure said in one sentence."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from stillroom.pipeline.config import TeacherConfig
from stillroom.storage.errors import InputError

_KEYS: Final = ("k_proj", "qkv_proj", "query_key_value")  # layers cut head by head


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


def load_model(config: TeacherConfig, device: torch.device, dtype: torch.dtype, processes: int | None = None) -> Any:
    """The causal language model of `config`, its adapter in place, on its devices, ready to be run.

    A quantised checkpoint is opened as its own settings say. An adapter is not merged: rounding its product into low-precision
    weights would make another teacher. With `processes` it is the library that cuts the model over those of this group, by the
    plan that comes with its architecture; all of them have to call this.

    Raises:
        InputError: it can not be loaded, or has no head.
    """
    from transformers import AutoModelForCausalLM

    _check_path(config.teacher)
    if processes is None and config.tensor_parallel > 1:
        raise InputError(
            f"--tensor-parallel came as {config.tensor_parallel} to one process alone: run `stillroom cache` under torchrun"
        )
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if processes is None and (config.device_map is not None or device.type == "cuda"):
        options["device_map"] = config.device_map or str(device)  # straight to the device, never whole on the host
    try:
        if processes is not None:
            options["distributed_config"] = _cut_by_plan(config, processes)
        model, info = AutoModelForCausalLM.from_pretrained(
            config.teacher,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except InputError:
        raise
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
        model = _with_adapter(model, config.adapter, config.teacher, cut=processes is not None)
    return model.eval()


def _cut_by_plan(config: TeacherConfig, processes: int) -> Any:
    """What tells the library to cut the model over `processes`.

    Raises:
        InputError: a model that can not be cut, or not by so many.
    """
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    if "tp_size" not in DistributedConfig.__dataclass_fields__:
        raise InputError(
            "--tensor-parallel needs a newer transformers (5.23 is known to do): pip install -U transformers"
        )
    settings = AutoConfig.from_pretrained(
        config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if getattr(settings, "quantization_config", None) is not None:
        raise InputError(
            f"teacher {config.teacher} is quantised, and --tensor-parallel cuts plain weights only: take the checkpoint it was "
            "made from, or spread this one with --device-map auto"
        )
    text = settings.get_text_config()
    plan = text.base_model_tp_plan or {}
    if not plan:
        raise InputError(
            f"teacher {config.teacher} ({settings.model_type}) has no tensor-parallel plan in transformers: spread it over "
            "the GPUs of one process with --device-map auto"
        )
    if any(style == "colwise" and key.rsplit(".", 1)[-1] in _KEYS for key, style in plan.items()):
        heads = [getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
        if any(isinstance(count, int) and count % processes for count in heads):
            raise InputError(
                f"--tensor-parallel came as {processes}, teacher {config.teacher} has {heads[0]} attention heads and {heads[1]} "
                "key-value heads: take a number that divides both"
            )
    return DistributedConfig(tp_size=processes)


def _with_adapter(model: Any, adapter: str, teacher: str, *, cut: bool) -> Any:
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
    if cut and (wrapped.active_peft_config.peft_type != "LORA" or wrapped.active_peft_config.use_dora):
        raise InputError(
            f"adapter {adapter} is no plain LoRA, the only kind known to work with --tensor-parallel: merge it into its teacher "
            "and save that, or spread the teacher with --device-map auto"
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
