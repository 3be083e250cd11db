"""Who a teacher is: a hash of its tensors, of its configuration, of the adapter on top and of how it is quantised. A path plays
no part.

Tensors are hashed by name, shape, dtype and values spread over them, so that one optimiser step anywhere changes the hash.

Of the configuration counts what is in no tensor and changes the logits: rotary base and scaling, epsilons, soft-caps, scales,
windows, activations, heads. Rather than list these, which every new model adds to, everything counts that is neither the
default of its class nor known to leave the logits alone: a field that a later version of the library adds is at its
default in every model that came before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from stillroom.storage.errors import InputError

FINGERPRINT_VALUES: Final = 1024  # values read per tensor
# Where an adapter came from and who loaded it, not what it does.
_NOT_THE_ADAPTER: Final = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
# What a configuration says of loading, serving, training and other heads, and what the tensors say better.
_NOT_THE_MODEL: Final = frozenset({
    "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "quantization_config", "tokenizer_class",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "torchscript",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "is_encoder_decoder", "prefix",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "initializer_range", "initializer_factor", "router_aux_loss_coef", "router_jitter_noise", "gradient_checkpointing",
    "chunk_size_feed_forward", "pretraining_tp", "vocab_size", "tie_word_embeddings", "head_dim",
})  # fmt: skip
_DROPOUT: Final = ("dropout", "pdrop")  # a teacher in evaluation mode drops nothing


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a loaded model's identity.

    Args:
        model: with its adapter, if any. Tensors of wrapper classes (quantised ones) are hashed by the plain tensors inside,
            those cut over processes as a whole: every process of the group has to call this, and all get the same.

    Raises:
        InputError: some of its weights are not on a device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        for inner, plain in _plain_tensors(name, tensor):
            flat = plain.detach().flatten()
            step = max(1, flat.numel() // FINGERPRINT_VALUES)
            digest.update(f"{inner} {plain.dtype} {list(plain.shape)}\n".encode())
            digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    for what, settings in _settings(model):
        digest.update(f"{what} {json.dumps(settings, sort_keys=True, default=_as_json)}\n".encode())
    return digest.hexdigest()


def _plain_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(value, torch.Tensor):  # extra state of a quantised layer, say
        yield name, torch.frombuffer(bytearray(repr(value).encode() or b"\0"), dtype=torch.uint8)
    elif value.is_meta:
        raise InputError(
            f"the teacher's {name} is left off the devices, so that it is neither fast nor to be identified: "
            "give it more devices or memory, or another --device-map"
        )
    elif hasattr(value, "full_tensor"):  # a DTensor: one at a time is put together, and forgotten
        yield from _plain_tensors(name, value.detach().full_tensor())  # type: ignore[attr-defined]  # asked just now
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for inner in names:
            yield from _plain_tensors(f"{name}.{inner}", getattr(value, inner))
    else:
        yield name, value


def _settings(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What changes the result and is in no tensor: the configuration, an adapter's scale, a quantisation's scheme."""
    if (config := getattr(model, "config", None)) is not None:
        yield "config", _not_by_default(config.get_text_config())
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        known = adapter.to_dict()
        yield f"adapter {name}", {key: value for key, value in known.items() if key not in _NOT_THE_ADAPTER}
    scheme = getattr(getattr(model, "config", None), "quantization_config", None)
    if scheme is not None:
        yield "quantization", scheme if isinstance(scheme, dict) else scheme.to_dict()


def _not_by_default(config: Any) -> dict[str, Any]:
    try:
        usual = type(config)().to_dict()
    except TypeError:  # a class of foreign code that has no defaults
        usual = {}
    known = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and name not in _NOT_THE_MODEL and not name.endswith(_DROPOUT)
    }
    return {"model_type": config.model_type, **_differing(known, usual)}


def _differing(known: dict[Any, Any], usual: dict[Any, Any]) -> dict[str, Any]:
    """What of `known` is not as in `usual`, dictionaries inside it likewise; None is what a missing field is."""
    found: dict[str, Any] = {}
    for name, value in known.items():
        default = usual.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _differing(value, default):
                found[str(name)] = inner
        elif value != default:
            found[str(name)] = _number(value)
    return found


def _number(value: Any) -> Any:
    """`value` with numbers as JSON may spell them either way, 10000.0 and 10000, spelled one way."""
    if isinstance(value, dict):
        return {str(key): _number(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_number(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
