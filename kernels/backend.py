"""Which implementation of a kernel runs: `resolve(impl, tensor)` gives "triton" or "reference"."""

from __future__ import annotations

import importlib.util
import os
from typing import Final, Literal

import torch

IMPLEMENTATIONS: Final = ("auto", "triton", "reference")
Backend = Literal["triton", "reference"]
_INSTALLED: Final = importlib.util.find_spec("triton") is not None


def resolve(impl: str, tensor: torch.Tensor) -> Backend:
    """The implementation for a tensor.

    Args:
        impl: `auto` takes Triton where the tensor is on a CUDA device and Triton is installed, plain PyTorch elsewhere;
            `triton` and `reference` ask for one. Triton on a CPU tensor is its interpreter: slow, for tests.
        tensor: the main input.

    Raises:
        ValueError: an unknown name, or Triton where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"`impl` came as {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return "reference"
    on_cuda = tensor.device.type == "cuda"
    if impl == "auto":
        return "triton" if on_cuda and _INSTALLED and tensor.dtype != torch.float64 else "reference"
    if not _INSTALLED:
        raise ValueError(
            "`impl` came as 'triton', which is not installed here: install triton or take impl='reference'"
        )
    if not on_cuda and not interpreted():
        raise ValueError(
            f"`impl` came as 'triton' with a tensor on {tensor.device}, wanted one on a CUDA device: take "
            "impl='reference', or set TRITON_INTERPRET=1 before Python starts to run the kernel in its interpreter"
        )
    if tensor.dtype == torch.float64:
        raise ValueError(
            "`impl` came as 'triton' with float64, wanted float32 or half precision: take impl='reference'"
        )
    return "triton"


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
