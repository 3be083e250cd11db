"""The teacher: a Hugging Face causal language model, run in batches of one shape, its head in row chunks, logits float32.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `V` vocabulary, `D` hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from stillroom.pipeline.config import TeacherConfig
from stillroom.storage.errors import InputError

FINGERPRINT_VALUES: Final = 1024  # values read per tensor: enough that one optimiser step anywhere changes the hash


class Teacher:
    """A loaded teacher.

    Attributes:
        name: as the user gave it.
        fingerprint: hash of every tensor's name, shape, dtype and of values spread over it; a path plays no part.
        vocab_size: width V of its logits.
        max_length: longest sequence its configuration allows, or None.
        chunked_head: False where the model does more than a linear head after its body, so that whole logits are taken
            from its own forward.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.name = config.teacher
        self.revision = config.revision
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        self._model = _load(config, self.dtype).to(self.device).eval()
        head = self._model.get_output_embeddings()
        self.vocab_size = int(head.weight.shape[0])
        self.fingerprint = _fingerprint(self._model)
        self.max_length: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._body: nn.Module = self._model.base_model
        # float32 head: rounding logits to bfloat16 moves probabilities by up to 7.6 % (shared measurements), far more
        # than any sampler error.
        self._weight_VD = head.weight.detach().float()
        self._bias_V = None if getattr(head, "bias", None) is None else head.bias.detach().float()
        self.chunked_head = self._head_is_linear()

    @torch.inference_mode()
    def logits(self, tokens_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        """Next-token logits, one `[L, V]` float32 chunk per sequence, in order.

        Chunks of one size, and batches of one size (the caller pads), keep the matrix products' shapes fixed, so that the
        result does not move with the batch.
        """
        tokens_BL = tokens_BL.to(self.device)
        if not self.chunked_head:
            yield from self._model(input_ids=tokens_BL, use_cache=False).logits.float()
            return
        for hidden_LD in self._hidden(tokens_BL):
            yield nn.functional.linear(hidden_LD.float(), self._weight_VD, self._bias_V)

    def _hidden(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        hidden_BLD: torch.Tensor = self._body(input_ids=tokens_BL, use_cache=False).last_hidden_state
        return hidden_BLD

    @torch.inference_mode()
    def _head_is_linear(self) -> bool:
        """Whether body + linear head gives the model's own logits (it does not with a soft-cap or a logit scale)."""
        tokens_BL = (torch.arange(16, device=self.device) * 31 % self.vocab_size)[None]
        own = self._model(input_ids=tokens_BL, use_cache=False).logits.float()
        try:
            ours = nn.functional.linear(self._hidden(tokens_BL).float(), self._weight_VD, self._bias_V)
        except (AttributeError, RuntimeError, TypeError):  # a body without last_hidden_state, or of another width
            return False
        tolerance = 1e-4 if self.dtype == torch.float32 else 3e-2
        return own.shape == ours.shape and torch.allclose(own, ours, rtol=tolerance, atol=tolerance)


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


def _load(config: TeacherConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    _check_path(config.teacher)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.teacher,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"teacher {config.teacher} can not be loaded as a causal language model ({_first_line(error)}): "
            "name a folder or hub id that AutoModelForCausalLM opens"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing or model.get_output_embeddings() is None:
        what = f"its weights lack {missing[0]}" if missing else "it has no output embeddings"
        raise InputError(f"teacher {config.teacher} has no causal-LM head ({what}): name a causal language model")
    return model


def _check_path(name: str) -> None:
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or len(Path(name).parts) > 2
    if (looks_local and not path.is_dir()) or (path.exists() and not (path / "config.json").is_file()):
        raise InputError(
            f"teacher {name} is not a model folder (no config.json there): name one that save_pretrained wrote, or a hub id"
        )


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // FINGERPRINT_VALUES)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device came as cuda, but torch sees no CUDA device: use --device cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
