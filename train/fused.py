"""The student's forward with the loss inside, from logits or, without any, from hidden states and head.

DDP, FSDP2, activation checkpointing and autocast all work on a module's forward: what they are to see must happen there. So the
model's own `forward` is put behind one that takes a batch and returns loss terms. Called without a batch it is what it was.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from stillroom.train.batch import Batch
from stillroom.train.objective import Objective

PROBE_LENGTH: Final = 16
PROBE_DEVIATION: Final = 20.0  # of the probe's logits: a soft-cap bends them, a scale shows
TOLERANCE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of a body's last hidden states: softcap * tanh(scale * (W h + b) / softcap).

    Attributes:
        scale: factor of the logits.
        softcap: their soft limit, or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states_BLD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        """Logits `[B, L, V]`."""
        logits_BLV = self.scale * functional.linear(states_BLD, weight_VD, bias_V)
        return logits_BLV if self.softcap is None else self.softcap * torch.tanh(logits_BLV / self.softcap)


def find_head(model: PreTrainedModel) -> Head | None:
    """How the model makes logits of its body's last hidden states, if that is a plain linear head with at most scale and cap.

    It is tried, not looked up: a probe's hidden states are blown up until the logits' deviation is 20, and the model's own logits
    of them must be ours.

    Returns:
        None where it is anything else: then the loss needs the model's own logits.
    """
    linear, body = model.get_output_embeddings(), model.base_model
    if type(linear) is not nn.Linear or body is model:
        return None
    training, weight_VD = model.training, linear.weight
    tokens_BL = (torch.arange(PROBE_LENGTH, device=weight_VD.device) * 31 % weight_VD.shape[0])[None]
    seen: list[torch.Tensor] = []
    factor = 1.0

    def blow_up(_: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        seen.append(output.last_hidden_state)
        return output

    handle = body.register_forward_hook(blow_up)
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens_BL, use_cache=False)
            plain_BLV = functional.linear(seen[-1], weight_VD, linear.bias)
            factor = PROBE_DEVIATION / max(float(plain_BLV.std()), 1e-30)
            own_BLV = model(input_ids=tokens_BL, use_cache=False).logits
            for head in _candidates(model):
                ours_BLV = head.logits(seen[-1], weight_VD, linear.bias)
                if ours_BLV.shape == own_BLV.shape and torch.allclose(own_BLV, ours_BLV, TOLERANCE, TOLERANCE):
                    return head
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no last_hidden_state, or of another width
        return None
    finally:
        handle.remove()
        model.train(training)
    return None


def with_loss(model: PreTrainedModel, objective: Objective, head: Head | None, dtype: torch.dtype) -> None:
    """Replace `model.forward`: `model(batch=..., rows=..., step=...)` returns (loss, kd, ce), see `Objective`.

    Args:
        model: the student; undone by `without_loss`.
        objective: the loss.
        head: as `find_head` found it: no logits are made; None: the model's own logits are.
        dtype: of matrix products; bfloat16 is autocast.
    """
    own, body, linear = model.forward, model.base_model, model.get_output_embeddings()

    def forward(
        *args: Any, batch: Batch | None = None, rows: float = 1.0, step: int = 0, **inputs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if batch is None:
            found: torch.Tensor = own(*args, **inputs)
            return found
        lower = torch.autocast(batch.tokens_BL.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        if head is None:
            with lower:
                logits_BLV = own(**batch.inputs, use_cache=False).logits
            terms = objective(logits_BLV.flatten(0, 1), batch, rows, step)
        else:
            with lower:  # the products' dtype is autocast's
                states_BLD = body(**batch.inputs, use_cache=False).last_hidden_state
                terms = objective.fused(
                    states_BLD.flatten(0, 1), linear.weight, linear.bias, batch, rows, step,
                    logit_scale=head.scale, softcap=head.softcap,
                )  # fmt: skip
        return terms.loss, terms.kd, terms.ce

    model.forward = forward


def without_loss(model: nn.Module) -> None:
    """Give the model its own forward back."""
    model.__dict__.pop("forward", None)


def _candidates(model: PreTrainedModel) -> Iterator[Head]:
    """Heads that the model's configuration speaks of; the plain one first."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if isinstance(found := getattr(config, "logit_scale", None), int | float) and found:
        scales.append(float(found))  # Cohere
    if isinstance(found := getattr(config, "logits_scaling", None), int | float) and found:
        scales.append(1.0 / float(found))  # Granite
    for scale in scales:
        yield Head(scale)
        if softcap:
            yield Head(scale, float(softcap))
