"""Optimizers and the learning-rate schedule.

AdamW for everything, or Muon for the hidden matrices with AdamW for the rest (K. Jordan, "Muon: An optimizer for hidden
layers in neural networks", 2024). Muon's rate is per unit of spectral norm, scaled by sqrt(max(1, rows / columns)); it has
nothing to do with an AdamW rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, final

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from stillroom.train.config import OptimizerName, ScheduleName
from stillroom.train.sharded import cut_like, whole

BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively; emulation on a CPU is some fifty times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def make_optimizer(
    model: nn.Module,
    *,
    name: OptimizerName,
    lr: float,
    embedding_lr: float,
    weight_decay: float,
) -> Optimizer:
    """The optimizer of a run.

    `adamw`: matrices decay, vectors do not. `muon`: 2-D weights that are neither embedding nor head go to Muon with
    `weight_decay`; all else, without decay, to AdamW at `embedding_lr`. Of weights that FSDP2 has cut, Muon gathers one update at
    a time and orthogonalises it in every process.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    if name == "adamw":
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, fused=True)
    ends = {id(p) for end in _ends(model) for p in end.parameters()}
    hidden = [p for p in trained if p.ndim == 2 and id(p) not in ends]
    taken = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in taken]
    fast, cut = fast_bfloat16(device), any(isinstance(p, DTensor) for p in hidden)
    kind = torch.optim.Muon if fast and not cut else Float32Muon
    muon = kind(hidden, lr=lr, weight_decay=weight_decay, momentum=MUON_MOMENTUM)
    if isinstance(muon, Float32Muon) and fast:
        muon.iterated_in = torch.bfloat16
    return CombinedOptimizer(
        [
            muon,
            AdamW(rest, lr=embedding_lr, betas=BETAS, weight_decay=0.0, fused=True),
        ]
    )


def rate_multiplier(schedule: ScheduleName, *, steps: int, warmup: float, decay: float) -> Callable[[int], float]:
    """Factor of the peak rate at step k = 0 ... steps - 1; the warm-up starts above zero, so no step is lost."""
    rise = math.ceil(warmup * steps)

    def multiplier(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, steps - rise)  # in [0, 1)
        if schedule == "linear":
            return max(0.0, 1.0 - progress)
        if schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        if schedule == "wsd":
            return min(1.0, max(0.0, (steps - step) / (decay * steps)))
        return 1.0

    return multiplier


@final
class CombinedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters behind the interface of one: schedulers and checkpoints see one."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        # No super().__init__: there is no group or state here that is not a part's (accelerate's wrapper does the same).
        self.optimizers = list(optimizers)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parts' groups, one list."""
        return list(chain.from_iterable(o.param_groups for o in self.optimizers))

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        """The parts' states, one mapping."""
        return {p: s for o in self.optimizers for p, s in o.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every part."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """`{"parts": [state of each]}`."""
        return {"parts": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for optimizer, part in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(part)


@final
class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the Newton-Schulz iteration in float32, for CPUs that emulate bfloat16; and for cut weights.

    Attributes:
        iterated_in: dtype of the iteration.
    """

    iterated_in = torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step: momentum, orthogonalisation, decay, update."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1.0 - group["momentum"])
                nesterov = whole(weight.grad.lerp(buffer, group["momentum"])).to(self.iterated_in)
                update = cut_like(
                    weight, orthogonalise(nesterov, group["ns_coefficients"], group["ns_steps"], group["eps"])
                )
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                scale = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(
    gradient_MK: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The quintic Newton-Schulz iteration: singular values of a `[M, K]` matrix pulled towards one, in its own dtype."""
    a, b, c = coefficients
    tall = gradient_MK.shape[0] > gradient_MK.shape[1]
    x = gradient_MK.T if tall else gradient_MK
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _ends(model: nn.Module) -> list[nn.Module]:
    ends = [getattr(model, f"get_{end}_embeddings")() for end in ("input", "output")]
    return [end for end in ends if end is not None]
