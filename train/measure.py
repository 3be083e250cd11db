"""Losses of a model on the sequences of a cache: of a reference model for difference sampling, of a student for domain weights.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `S` sequences of the cache, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.losses import SequenceLosses, load_losses, save_losses
from stillroom.storage.manifest import DOCUMENTS
from stillroom.train.batch import Batch
from stillroom.train.data import CacheDataset
from stillroom.train.student import (
    check_documents,
    check_length,
    check_tokenizers,
    find_model,
    find_tokenizer,
    load_model,
)
from stillroom.train.targets import LiveTeacher

SAVE_EVERY_S: Final = 60.0
CHUNK_ELEMENTS: Final = 1 << 22  # logits whose softmax is in work at a time


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure_losses` did.

    Attributes:
        out: the file.
        model: what was measured.
        sequences: of the cache.
        measured: sequences whose loss is in the file; `new` of them were measured now.
        loss: mean over the measured sequences, nats per row.
        seconds: it took.
    """

    out: Path
    model: str
    sequences: int
    measured: int
    new: int
    loss: float
    seconds: float


def measure_losses(
    cache: str | Path,
    model: str,
    *,
    out: Path | None = None,
    sample: int | None = None,
    batch_size: int = 8,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Mean cross-entropy of a model on each sequence of a cache, over the rows that have a target; kept in a file.

    A file of the same model and cache is gone on with: what it holds is not measured again.

    Args:
        cache: directory or URL.
        model: folder or hub id of a causal language model with the cache's tokenizer.
        out: the file; None: `derived/losses-<fingerprint of the model>.arrow` in the cache, or in the local directory of a
            remote one.
        sample: measure so many sequences, spread evenly; None: all.
        batch_size: sequences per forward; changes speed only.
        cache_dir, cache_bytes: of a remote cache, as for `open_cache`.
        on_progress: told (sequences done, sequences to do).

    Raises:
        InputError: a model that does not fit, a file of something else, or one that can not be written.
        CacheError: a cache that cannot be read.
    """
    started = time.monotonic()
    opened = open_cache(cache, columns=("tokens",), cache_dir=cache_dir, cache_bytes=cache_bytes)
    source = CacheDataset(opened, with_targets=False)
    found = find_model(model, role="model")
    if not found.has_weights:
        raise InputError(f"model {model} has a configuration but no weights: give a trained model")
    check_length(found, source.seq_len, role="model")
    check_tokenizers(
        find_tokenizer(Path(found.name)), find_tokenizer(opened.path / "tokenizer"), roles=("model", "cache")
    )
    vocab_size = opened.manifest.vocab_size
    if found.vocab_size < vocab_size:
        raise InputError(
            f"model {model} has a vocabulary of {found.vocab_size}, the cache's is {vocab_size}: give a model with its tokenizer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(found, role="model").eval().to(device)
    if opened.manifest.packing.policy == DOCUMENTS:
        check_documents(loaded, found, role="model")
    fingerprint = _fingerprint(loaded)
    path = opened.derived(f"losses-{fingerprint[:16]}.arrow") if out is None else out
    loss_S = np.full(len(opened), np.nan, np.float32)
    if path.exists():
        before = load_losses(path, opened)
        if before.fingerprint != fingerprint:
            raise InputError(f"{path} holds the losses of {before.model}, another model: name another file with --out")
        loss_S = before.loss_S.copy()

    wanted = np.arange(len(opened))
    if sample is not None:
        wanted = np.unique(np.linspace(0, len(opened) - 1, min(sample, len(opened))).astype(np.int64))
    todo = wanted[np.isnan(loss_S[wanted])]
    save_losses(path, opened, SequenceLosses(model, fingerprint, loss_S))  # now: it may not be writable
    saved, score = time.monotonic(), LiveTeacher(loaded, vocab_size)
    for start in range(0, len(todo), batch_size):
        indices = todo[start : start + batch_size]
        loss_S[indices] = _losses(score, source.__getitems__(indices.tolist()).to(device))
        if time.monotonic() - saved > SAVE_EVERY_S:
            save_losses(path, opened, SequenceLosses(model, fingerprint, loss_S))
            saved = time.monotonic()
        on_progress(min(start + batch_size, len(todo)), len(todo))
    save_losses(path, opened, SequenceLosses(model, fingerprint, loss_S))
    valid_S = ~np.isnan(loss_S)
    return Measured(
        out=path,
        model=model,
        sequences=len(opened),
        measured=int(valid_S.sum()),
        new=len(todo),
        loss=float(loss_S[valid_S].mean(dtype=np.float64)) if valid_S.any() else float("nan"),
        seconds=time.monotonic() - started,
    )


def _losses(score: LiveTeacher, batch: Batch) -> npt.NDArray[np.float64]:
    """Mean over the rows that count of each sequence of a batch, `[B]`; NaN where there are none."""
    logits_NV = score.logits(batch)
    rows = max(1, CHUNK_ELEMENTS // score.vocab_size)
    chunks = zip(torch.split(logits_NV, rows), torch.split(batch.labels_BL.flatten(), rows))
    ce_N = torch.cat([functional.cross_entropy(z_NV.float(), y_N, reduction="none") for z_NV, y_N in chunks])
    mask_BL = batch.mask_BL.double()
    mean_B = (ce_N.view_as(mask_BL).double() * mask_BL).sum(1) / mask_BL.sum(1)  # 0 / 0: NaN
    return np.asarray(mean_B.cpu().numpy())


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of its weights, by name."""
    hasher = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
