"""Settings of `stillroom plan`: those of `stillroom cache`, and what it should reckon with. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from stillroom.pipeline.config import CacheConfig
from stillroom.storage.depot import path_or_url


class PlanConfig(CacheConfig):
    """Settings of `stillroom plan`. A number that is given is not measured."""

    teacher: str = Field(
        "", description="folder or hub id of a causal language model (needed unless numbers are given)"
    )
    data: str = Field("", description="the corpus, as for `stillroom cache` (needed unless numbers are given)")
    out: Annotated[Path | str, BeforeValidator(path_or_url)] = Field(
        "", description="not written: taken so that the command line of `stillroom cache` can be planned as it stands"
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="tokens to plan for, one row each (unset: the corpus, counted by streaming through its text)",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="workers that share the run, one GPU each, whatever starts them (unset: --ranks, else 1)",
    )
    measure_sequences: int | None = Field(
        None, ge=2, description="sequences really run to measure sizes, rate and noise (unset: 8,192 rows, at least 8)"
    )
    gpu_hour_price: float | None = Field(None, ge=0, description="price of one hour of one worker, in any currency")
    gb_month_price: float | None = Field(None, ge=0, description="price of keeping 10**9 bytes for a month")
    rows_per_s: float | None = Field(
        None, gt=0, description="rows per second of one worker, instead of measuring it here"
    )
    bytes_per_row: float | None = Field(None, gt=0, description="bytes per row on disk, instead of measuring them")
    entries_per_row_measured: float | None = Field(None, gt=0, description="entries per row, instead of measuring them")
