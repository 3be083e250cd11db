"""Stillroom: distil language models from a shelf.

The teacher runs once; its next-token distributions are kept as sparse, unbiased samples; any number of students train
from them. The public names below are loaded on first use, so `import stillroom` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.kernels.fused_linear import fused_linear_sparse_kd as fused_linear_sparse_kd
    from stillroom.kernels.sparse_kd import sparse_kd_loss as sparse_kd_loss
    from stillroom.pipeline.config import CacheConfig as CacheConfig
    from stillroom.pipeline.run import build_cache as build_cache
    from stillroom.storage.cache import Cache as Cache
    from stillroom.storage.cache import open_cache as open_cache
    from stillroom.storage.choose import Wanted as Wanted
    from stillroom.storage.choose import choose as choose
    from stillroom.storage.errors import StillroomError as StillroomError
    from stillroom.storage.manifest import Manifest as Manifest
    from stillroom.storage.rows import row_statistics as row_statistics
    from stillroom.storage.selection import Selection as Selection
    from stillroom.storage.spec import SamplerSpec as SamplerSpec
    from stillroom.storage.targets import SparseTargets as SparseTargets
    from stillroom.train.config import TrainConfig as TrainConfig
    from stillroom.train.evaluate import evaluate as evaluate
    from stillroom.train.run import train_student as train_student
    from stillroom.train.stream import Stream as Stream

_HOMES = {
    "Cache": "stillroom.storage.cache",
    "CacheConfig": "stillroom.pipeline.config",
    "Manifest": "stillroom.storage.manifest",
    "Selection": "stillroom.storage.selection",
    "SamplerSpec": "stillroom.storage.spec",
    "SparseTargets": "stillroom.storage.targets",
    "StillroomError": "stillroom.storage.errors",
    "Stream": "stillroom.train.stream",
    "TrainConfig": "stillroom.train.config",
    "Wanted": "stillroom.storage.choose",
    "build_cache": "stillroom.pipeline.run",
    "choose": "stillroom.storage.choose",
    "evaluate": "stillroom.train.evaluate",
    "fused_linear_sparse_kd": "stillroom.kernels.fused_linear",
    "open_cache": "stillroom.storage.cache",
    "row_statistics": "stillroom.storage.rows",
    "sparse_kd_loss": "stillroom.kernels.sparse_kd",
    "train_student": "stillroom.train.run",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stillroom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
