"""Who a teacher is: a hash of its tensors, of the adapter on top and of how it is quantised. A path plays no part.

Tensors are hashed by name, shape, dtype and values spread over them, so that one optimiser step anywhere changes the hash.
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


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a loaded model's identity.

    Args:
        model: with its adapter, if any. Tensors of wrapper classes (quantised ones) are hashed by the plain tensors inside.

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
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for inner in names:
            yield from _plain_tensors(f"{name}.{inner}", getattr(value, inner))
    else:
        yield name, value


def _settings(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What changes the result and is in no tensor: an adapter's scale, a quantisation's scheme."""
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        known = adapter.to_dict()
        yield f"adapter {name}", {key: value for key, value in known.items() if key not in _NOT_THE_ADAPTER}
    scheme = getattr(getattr(model, "config", None), "quantization_config", None)
    if scheme is not None:
        yield "quantization", scheme if isinstance(scheme, dict) else scheme.to_dict()


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
