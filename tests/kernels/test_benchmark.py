"""The GPU benchmark goes through at toy sizes, so that its command stands ready where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels_gpu


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter multiplies what a mask then drops
def test_every_part_of_the_page_is_measured() -> None:
    page = kernels_gpu.page(kernels_gpu.measure(kernels_gpu.TINY, torch.device("cpu")))
    for words in (kernels_gpu.OURS, "fused_linear, D = 16, over three products", "sample, random", "torch.multinomial"):
        assert words in page
