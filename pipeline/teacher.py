"""The teacher: a Hugging Face causal language model, run in batches of one shape, its head in row chunks, logits float32.

Several processes may hold it together (`group`): then each has the logits of its own slice of the vocabulary.

Shapes: `B` sequences, `L` positions, `N` rows, `V` vocabulary, `C` columns of the logits held here (V, without a group), `D`
hidden size, `X` = D, or the model's own width of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn import functional

from stillroom.kernels.apart import mixing
from stillroom.pipeline.config import TeacherConfig
from stillroom.pipeline.teacher_identity import fingerprint
from stillroom.pipeline.teacher_load import load_model, load_tokenizer
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from stillroom.pipeline.group import Group

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
        group: the processes that hold it together, or None. Then `body` and all that follows are for all of them to call at once:
            `together` tells the others.
        ids_here: `start, stop` of the ids whose logits `head` gives.

    Raises:
        InputError: it can not be loaded or run.
    """

    def __init__(self, config: TeacherConfig, group: Group | None = None) -> None:
        self.name = config.teacher
        self.revision = config.revision
        device = _device(config.device)
        self.dtype = _dtype(config.dtype, device)
        self.group = group
        self._model = load_model(config, device, self.dtype, None if group is None else group.size)
        self.device: torch.device = self._model.get_input_embeddings().weight.device
        self.fingerprint = fingerprint(self._model)
        text_config = self._model.config.get_text_config()
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self._body: nn.Module = self._model.base_model
        own_LV = self._probe(text_config.vocab_size)
        width = int(own_LV.shape[1])
        self.vocab_size = _vocabulary(config, width)
        self._edges = [(0, self.vocab_size)] if group is None else group.edges(width, self.vocab_size)
        self.ids_here = self._edges[0 if group is None else group.rank]
        self._weight_CD, self._bias_C = self._plain_head()
        self.chunked_head = self._weight_CD is not None and self._head_is_linear(text_config.vocab_size, own_LV)
        if not self.chunked_head:
            self.ids_here = 0, self.vocab_size

    def together(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Have the other processes that hold this teacher, if there are any, do `work(teacher, ...)` while this one does."""
        if self.group is not None:
            self.group.tell(work, *arguments, **options)

    @property
    def sharded(self) -> bool:
        """Whether `head` gives a slice of the vocabulary."""
        return self.group is not None and self.chunked_head

    @torch.inference_mode()
    def logits(self, tokens_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        """Next-token logits, one `[L, V]` float32 chunk per sequence, in order: `body`, then `head` of each sequence."""
        for states_LX in self.body(tokens_BL):
            yield self.whole(self.head(states_LX))

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
        self.together(Teacher.check_documents)

        def logits(tokens_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.whole(self.head(states_LX)) for states_LX in self.body(tokens_BL, positions_BL)])

        wrong = mixing(logits, vocab_size=self.vocab_size, dtype=self.dtype, device=self.device)
        if wrong is not None:
            raise InputError(
                f"teacher {self.name} ({self._model.config.model_type}) does not read packed documents apart ({wrong}): use "
                "--attn-implementation sdpa, or --packing concat"
            )

    @contextmanager
    def other_attention(self) -> Iterator[None]:
        """Attention computed another way meanwhile, where the model knows one: the same teacher but for its last bits."""
        inner = self._model
        used = getattr(inner.config, "_attn_implementation", None)
        other = {"sdpa": "eager", "eager": "sdpa"}.get(str(used))
        if other is None or not hasattr(inner, "set_attn_implementation"):
            yield
            return
        try:
            inner.set_attn_implementation(other)
        except (ValueError, ImportError):  # a model that has one way only
            other = None
        try:
            yield
        finally:
            if other is not None:
                inner.set_attn_implementation(used)

    @torch.inference_mode()
    def head(self, states_NX: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits `[N, C]` of rows of `body`; in chunks of one size they do not move with the batch.

        float32 because rounding logits to bfloat16 moves probabilities by up to 7.6 % (shared measurements), far more than
        any sampler error. Products of 16-bit numbers are exact in float32, so a GPU may multiply in 16 bits and add in 32.

        Args:
            states_NX: rows.
            out: where to put them.
        """
        start, stop = self.ids_here
        if out is None:
            out = torch.empty(len(states_NX), stop - start, device=states_NX.device)
        if not self.chunked_head:
            return out.copy_(states_NX[:, : self.vocab_size])
        assert self._weight_CD is not None
        if self._weight_CD.dtype != torch.float32:
            torch.mm(states_NX, self._weight_CD.T, out_dtype=torch.float32, out=out)
        else:
            torch.mm(states_NX.float(), self._weight_CD.T, out=out)
        return out if self._bias_C is None else out.add_(self._bias_C)

    def whole(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """Logits of `head` with the columns of the other processes, `[N, V]`; for few rows."""
        return self.group.whole(logits_NC, self._edges) if self.group is not None and self.sharded else logits_NC

    def tops(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """Largest logit of every row over all processes, `[N]`, NaN where there is one."""
        top_N = logits_NC.amax(1)
        return self.group.gathered(top_N).amax(0) if self.group is not None and self.sharded else top_N

    def _plain_head(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weight and bias of this process's part of the head, or None where it is no plain matrix."""
        head = self._model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return None, None
        weight_CD: torch.Tensor | None = head.weight
        bias_C: torch.Tensor | None = head.bias
        if self.group is not None:
            if any(start == stop for start, stop in self._edges):  # more processes than the ids in use go round
                return None, None
            weight_CD, bias_C = (x if x is None else self.group.rows_here(x.detach()) for x in (weight_CD, bias_C))
        if (
            weight_CD is None
            or type(weight_CD) not in (nn.Parameter, torch.Tensor)
            or (bias_C is None) != (head.bias is None)
        ):
            return None, None
        if not weight_CD.is_floating_point() or weight_CD.element_size() < 2:
            return None, None
        count = self.ids_here[1] - self.ids_here[0]
        weight_CD = weight_CD.detach()[:count]
        if weight_CD.device.type != "cuda":  # only CUDA multiplies 16-bit matrices into float32
            weight_CD = weight_CD.float()
        return weight_CD, None if bias_C is None else bias_C.detach()[:count].float()

    @torch.inference_mode()
    def _probe(self, vocabulary: int) -> torch.Tensor:
        """The model's own logits of a few tokens, `[L, V]`."""
        try:
            logits_LV: torch.Tensor = self._model(input_ids=self._probe_tokens(vocabulary), use_cache=False).logits[0]
        except RuntimeError as error:
            if self.group is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"teacher {self.name} can not be run by {self.group.size} processes together ({str(error).splitlines()[0]}): "
                "take another --tensor-parallel, or --device-map auto"
            ) from error
        return logits_LV.float()

    def _probe_tokens(self, vocabulary: int) -> torch.Tensor:
        return (torch.arange(PROBE_LENGTH, device=self.device) * 31 % vocabulary)[None]

    @torch.inference_mode()
    def _head_is_linear(self, vocabulary: int, own_LV: torch.Tensor) -> bool:
        """Whether body + linear head gives the model's own logits (it does not with a soft-cap or a logit scale)."""
        self.chunked_head = True
        try:
            ours_LV = self.whole(self.head(self.body(self._probe_tokens(vocabulary))[0]))
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
