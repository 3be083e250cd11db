"""A student cut over processes by FSDP2, and its whole tensors again.

`fully_shard` is called here and not through accelerate, which shards on accelerators only: so what the tests run on CPUs is what
a GPU run does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, *, processes: int, device: torch.device, dtype: torch.dtype) -> None:
    """Cut the model in place: every block for itself, what is left (embeddings, last norm, head) with the root.

    Args:
        model: whole, the same in every process.
        processes: how many.
        device: where this process computes.
        dtype: of matrix products; in bfloat16 weights are gathered as such and gradients added up in float32.
    """
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model._is_accelerate_prepared = True  # accelerate would wrap it in DDP


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The model's repeated blocks, as its class names them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be cut; every process must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """A whole tensor in dtype and device of another, and cut as that is; nothing is sent, each process takes its part."""
    found = found.to(target.device, target.dtype)
    if not isinstance(target, DTensor):
        return found
    return distribute_tensor(found, target.device_mesh, target.placements, src_data_rank=None)


def fill(target: torch.Tensor, found: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be cut."""
    with torch.no_grad():
        target.copy_(cut_like(target, found))
