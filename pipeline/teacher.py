"""The teacher: a Hugging Face causal language model, run in batches of one shape, its head in row chunks, logits float32.

Shapes: `B` sequences, `L` positions, `N` rows, `V` vocabulary, `D` hidden size, `X` = D, or the model's own width of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from stillroom.kernels.apart import mixing
from stillroom.pipeline.config import TeacherConfig
from stillroom.pipeline.teacher_identity import fingerprint
from stillroom.pipeline.teacher_load import load_model, load_tokenizer
from stillroom.storage.errors import InputError

__all__ = ["Teacher", "load_tokenizer"]

PROBE_LENGTH: Final = 16


class Teacher:
    """A loaded teacher.

    Attributes:
        name: as the user gave it.
        fingerprint: hash of its weights, adapter and quantisation; a path plays no part.
        device: where its tokens go.
        vocab_size: V: ids it is asked about, the width of its logits unless `vocab_size` is set. Columns beyond, which pad the
            matrix of many models, have no part in the softmax.
        max_length: longest sequence its configuration allows, or None.
        chunked_head: False where the model does more than a linear head after its body (a soft-cap, a scale, a quantised or
            adapted head), so that whole logits are taken from its own forward.

    Raises:
        InputError: it can not be loaded or run.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.name = config.teacher
        self.revision = config.revision
        device = _device(config.device)
        self.dtype = _dtype(config.dtype, device)
        self._model = load_model(config, device, self.dtype)
        self.device: torch.device = self._model.get_input_embeddings().weight.device
        self.fingerprint = fingerprint(self._model)
        text_config = self._model.config.get_text_config()
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self._body: nn.Module = self._model.base_model
        own_LV = self._probe(text_config.vocab_size)
        self.vocab_size = _vocabulary(config, int(own_LV.shape[1]))
        self._weight_VD, self._bias_V = self._plain_head()
        self.chunked_head = self._weight_VD is not None and self._head_is_linear(text_config.vocab_size, own_LV)

    @torch.inference_mode()
    def logits(self, tokens_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        """Next-token logits, one `[L, V]` float32 chunk per sequence, in order: `body`, then `head` of each sequence."""
        for states_LX in self.body(tokens_BL):
            yield self.head(states_LX)

    @torch.inference_mode()
    def body(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None = None) -> torch.Tensor:
        """What `head` makes logits of, `[B, L, X]`: hidden states, or the model's own logits.

        Batches of one size (the caller pads) keep the shapes of the matrix products fixed, so that a result does not move with
        the batch.

        Args:
            tokens_BL: int64 ids.
            positions_BL: int64 positions that start again with every document, which the model then reads on its own.
        """
        length = tokens_BL.shape[1]
        if positions_BL is not None:
            # The library builds its mask of documents where a batch has more than one in a sequence, and otherwise computes
            # another way: a last token that is a document of its own keeps it at one way, whatever the batch.
            tokens_BL, positions_BL = (functional.pad(x, (0, 1)) for x in (tokens_BL, positions_BL))
        inputs = {"input_ids": tokens_BL.to(self.device, non_blocking=True), "use_cache": False}
        if positions_BL is not None:
            inputs["position_ids"] = positions_BL.to(self.device, non_blocking=True)
        model = self._body if self.chunked_head else self._model
        output = model(**inputs)
        states_BLX: torch.Tensor = output.last_hidden_state if self.chunked_head else output.logits
        return states_BLX[:, :length]

    def check_documents(self) -> None:
        """Refuse a model that can not read packed documents apart.

        Raises:
            InputError: naming what it does instead.
        """

        def logits(tokens_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.head(states_LX) for states_LX in self.body(tokens_BL, positions_BL)])

        wrong = mixing(logits, vocab_size=self.vocab_size, dtype=self.dtype, device=self.device)
        if wrong is not None:
            raise InputError(
                f"teacher {self.name} ({self._model.config.model_type}) does not read packed documents apart ({wrong}): use "
                "--attn-implementation sdpa, or --packing concat"
            )

    @torch.inference_mode()
    def head(self, states_NX: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits `[N, V]` of rows of `body`; in chunks of one size they do not move with the batch.

        float32 because rounding logits to bfloat16 moves probabilities by up to 7.6 % (shared measurements), far more than
        any sampler error. Products of 16-bit numbers are exact in float32, so a GPU may multiply in 16 bits and add in 32.

        Args:
            states_NX: rows.
            out: where to put them.
        """
        if out is None:
            out = torch.empty(len(states_NX), self.vocab_size, device=states_NX.device)
        if not self.chunked_head:
            return out.copy_(states_NX[:, : self.vocab_size])
        assert self._weight_VD is not None
        if self._weight_VD.dtype != torch.float32:
            torch.mm(states_NX, self._weight_VD.T, out_dtype=torch.float32, out=out)
        else:
            torch.mm(states_NX.float(), self._weight_VD.T, out=out)
        return out if self._bias_V is None else out.add_(self._bias_V)

    def _plain_head(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weight and bias of the head, or None where it is no plain matrix."""
        head = self._model.get_output_embeddings()
        if type(head) is not nn.Linear or type(head.weight) not in (nn.Parameter, torch.Tensor):
            return None, None
        weight_VD: torch.Tensor = head.weight
        if not weight_VD.is_floating_point() or weight_VD.element_size() < 2:
            return None, None
        weight_VD = weight_VD.detach()[: self.vocab_size]
        if weight_VD.device.type != "cuda":  # only CUDA multiplies 16-bit matrices into float32
            weight_VD = weight_VD.float()
        return weight_VD, None if head.bias is None else head.bias.detach()[: self.vocab_size].float()

    @torch.inference_mode()
    def _probe(self, vocabulary: int) -> torch.Tensor:
        """The model's own logits of a few tokens, `[L, V]`."""
        logits_LV: torch.Tensor = self._model(input_ids=self._probe_tokens(vocabulary), use_cache=False).logits[0]
        return logits_LV.float()

    def _probe_tokens(self, vocabulary: int) -> torch.Tensor:
        return (torch.arange(PROBE_LENGTH, device=self.device) * 31 % vocabulary)[None]

    @torch.inference_mode()
    def _head_is_linear(self, vocabulary: int, own_LV: torch.Tensor) -> bool:
        """Whether body + linear head gives the model's own logits (it does not with a soft-cap or a logit scale)."""
        self.chunked_head = True
        try:
            ours_LV = self.head(self.body(self._probe_tokens(vocabulary))[0])
        except (AttributeError, RuntimeError, TypeError):  # a body without last_hidden_state, or of another width
            return False
        tolerance = 1e-4 if self.dtype == torch.float32 else 3e-2
        own_LV = own_LV[:, : self.vocab_size]
        return own_LV.shape == ours_LV.shape and torch.allclose(own_LV, ours_LV, rtol=tolerance, atol=tolerance)


def _vocabulary(config: TeacherConfig, width: int) -> int:
    if config.vocab_size is None:
        return width
    if config.vocab_size > width:
        raise InputError(
            f"vocab_size came as {config.vocab_size}, the logits of teacher {config.teacher} are {width} wide: "
            "lower --vocab-size, or leave it out"
        )
    return config.vocab_size


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
