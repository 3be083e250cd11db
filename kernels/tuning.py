"""Launch parameters of the Triton kernels: one table, by kernel and width of the row, each row with where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched for rows up to a width.

    Attributes:
        kernel: name of the family and, after a dot, the kernel.
        up_to: widest row (vocabulary) it is for.
        block: elements of a row in work at a time; a power of two.
        num_warps: warps of a program.
        source: why these numbers.
    """

    kernel: str
    up_to: int
    block: int
    num_warps: int
    source: str


WIDEST: Final = 1 << 31
_DERIVED = "derived, not measured on a GPU yet: "

LAUNCHES: Final[tuple[Launch, ...]] = (
    Launch("sparse_kd.rows", 1 << 10, 1024, 4, _DERIVED + "the row in one tile of 8 elements per thread"),
    Launch("sparse_kd.rows", 1 << 12, 4096, 8, _DERIVED + "the row in one tile of 16 elements per thread"),
    Launch("sparse_kd.rows", WIDEST, 8192, 16,
           _DERIVED + "16 elements per thread; compiled for sm_90 that is 40 registers (64 with marks and a second softmax), "
           "16-byte accesses and so two or three rows on a multiprocessor; 16384 with 32 warps is the other candidate"),
    Launch("sparse_kd.scale", WIDEST, 8192, 16, _DERIVED + "as sparse_kd.rows; one read, one write"),
    Launch("sparse_kd.mark", WIDEST, 64, 1, _DERIVED + "a few entries per row; the time is the launch"),
    Launch("sample.tile", WIDEST, 4096, 8, _DERIVED + "16 ids per thread: their int64 weights still fit in registers"),
    Launch("sample.block", 1 << 18, 512, 8, _DERIVED + "near the root of the row: blocks to search, ids to scan"),
    Launch("sample.block", WIDEST, 4096, 8, _DERIVED + "at most 1,024 blocks of 2**22 ids are searched at once"),
    Launch("sample.locate", WIDEST, 2048, 8, _DERIVED + "four draws of a row scan a block of 512 each"),
    Launch("sample.key_block", WIDEST, 128, 8, _DERIVED + "near the root of vocabulary/k: maxima and windows are as many"),
)  # fmt: skip


def launch(kernel: str, width: int) -> Launch:
    """The narrowest row of the table that fits.

    Args:
        kernel: its name in the table.
        width: elements of a row.
    """
    return min((row for row in LAUNCHES if row.kernel == kernel and width <= row.up_to), key=lambda row: row.up_to)
