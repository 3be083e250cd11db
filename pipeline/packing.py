"""Pack: documents become sequences of `L` rows, `L + 1` token ids each, in a file that is mapped, not held.

Shapes: `S` sequences, `L` rows per sequence, `L1` = L + 1, `N` tokens of the whole stream.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.packing_tokens import Tokens, tokenised
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HASHED_TOKENS: Final = 1 << 22  # at a time


@dataclass(frozen=True, slots=True)
class PackedCorpus:
    """A corpus as the teacher will see it, and as every student will. Its arrays are views of mapped files.

    Attributes:
        tokens_SL1: `[S, L+1]` uint32; the last id of a sequence is the first of the next, so every token after the first
            is the label of exactly one row.
        documents: number of documents packed.
        fingerprint: SHA-256 over the packed ids, and over mask and beginnings where there are any: the same text under the same
            tokenizer and packing, whatever its files.
        mask_SL: `[S, L]` bool, rows that get targets: their label is the assistant's and, with packing `documents`, of the
            row's own document; None: all rows.
        starts_SL1: `[S, L+1]` bool, tokens that begin a document; None: packing `concat`, which does not tell them apart.
        skipped: broken records that were passed over.
        empty: documents without text that were passed over.
    """

    tokens_SL1: npt.NDArray[np.uint32]
    documents: int
    fingerprint: str
    mask_SL: npt.NDArray[np.bool_] | None = None
    starts_SL1: npt.NDArray[np.bool_] | None = None
    skipped: int = 0
    empty: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over, in words."""
        counts = ((self.skipped, "broken record", "--skip-bad"), (self.empty, "empty document", "nothing in them"))
        return tuple(
            f"{count:,} {what}{'' if count == 1 else 's'} passed over ({why})" for count, what, why in counts if count
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how text becomes ids: the tokenizer's full JSON, or its vocabulary and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set by the last call's arguments, not by the tokenizer's identity.
        state["truncation"] = state["padding"] = None
        text = json.dumps(state, sort_keys=True)
    else:
        text = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pack(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int], None] = lambda documents: None,
) -> PackedCorpus:
    """Read, tokenise and pack the corpus: documents end to end, text closed by the end-of-text id.

    Memory does not grow with the corpus: ids go to a file without a name (4 bytes a token, one more for a loss mask and one for
    beginnings), whose room is given back when the last view of it is gone.

    Args:
        config: source, column, sequence length, number of sequences to keep.
        tokenizer: the teacher's.
        folder: where the file is made; None: the folder for temporary files (`TMPDIR`).
        on_progress: told the number of documents tokenised so far.

    Raises:
        InputError: a source that can not be used, text shorter than one sequence, or one that leaves no row to learn.
    """
    wanted = None if config.max_sequences is None else config.max_sequences * config.seq_len + 1
    with ExitStack() as open_files:
        spill = _Spill(folder, open_files, with_starts=config.packing == "documents")
        for tokens in tokenised(config, tokenizer):
            _check_bad(config, tokens, spill.bad)
            spill.add(tokens, wanted)
            on_progress(spill.documents)
            if wanted is not None and spill.length >= wanted:
                break
        sequences = (spill.length - 1) // config.seq_len
        if config.max_sequences is not None:
            sequences = min(sequences, config.max_sequences)
        if spill.documents == 0:
            raise InputError(f"source {config.data} holds no text: every document is empty")
        if sequences < 1:
            raise InputError(
                f"source {config.data} gives {spill.length} tokens, wanted at least {config.seq_len + 1} for one sequence: "
                "add text or lower --seq-len"
            )
        ids_N, mask_N, starts_N = spill.mapped()
    tokens_SL1 = _windows(ids_N, sequences, config.seq_len)
    mask_SL = None if mask_N is None else _windows(mask_N, sequences, config.seq_len)[:, 1:]
    if mask_SL is not None and not any(block.any() for block in _blocks(mask_SL)):
        raise InputError(
            f"source {config.data} holds no token of the assistant's, so there is nothing to learn: "
            "check the roles in --messages-column and the chat template"
            if config.messages_column is not None
            else f"every document of {config.data} is one token long, so there is nothing to learn: use --packing concat"
        )
    starts_SL1 = None if starts_N is None else _windows(starts_N, sequences, config.seq_len)
    return PackedCorpus(
        tokens_SL1,
        documents=spill.documents,
        fingerprint=_fingerprint(tokens_SL1, mask=mask_SL, starts=starts_SL1),
        mask_SL=mask_SL,
        starts_SL1=starts_SL1,
        skipped=spill.skipped,
        empty=spill.empty,
    )


class _Spill:
    """The stream of ids on its way to disk, beside it those of the loss mask and of beginnings where there are any."""

    def __init__(self, folder: Path | None, open_files: ExitStack, *, with_starts: bool) -> None:
        self._folder, self._open_files = folder, open_files
        self._ids = self._new_file()
        self._mask: IO[bytes] | None = None
        self._starts = self._new_file() if with_starts else None
        self.length = self.documents = self.skipped = self.empty = self.bad = 0

    def _new_file(self) -> IO[bytes]:
        return self._open_files.enter_context(tempfile.TemporaryFile(dir=self._folder))

    def add(self, tokens: Tokens, wanted: int | None) -> None:
        """Append documents, up to the one that makes the stream `wanted` tokens long."""
        ends_D = self.length + np.cumsum(tokens.lengths_D)
        many = len(ends_D)
        if wanted is not None:
            many = min(many, int(np.searchsorted(ends_D, wanted)) + 1)
        count = int(ends_D[many - 1]) - self.length if many else 0
        try:
            tokens.ids_N[:count].astype("<u4", copy=False).tofile(self._ids)
            mask_N = None if tokens.mask_N is None else tokens.mask_N[:count]
            if self._starts is not None:
                starts_N = np.zeros(count, np.bool_)
                starts_N[(ends_D - tokens.lengths_D)[:many] - self.length] = True
                starts_N.tofile(self._starts)
                mask_N = ~starts_N if mask_N is None else mask_N & ~starts_N
            if mask_N is not None:
                self._mask = self._new_file() if self._mask is None else self._mask
                mask_N.tofile(self._mask)
        except OSError as error:
            raise InputError(
                f"the packed corpus does not fit on its disk ({error.strerror or error}) after {self.length:,} tokens: "
                "point TMPDIR at a larger one"
            ) from error
        self.length += count
        self.documents += many
        self.bad += len(tokens.bad)
        self.skipped, self.empty = self.bad + tokens.skipped, tokens.empty

    def mapped(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_] | None, npt.NDArray[np.bool_] | None]:
        """Ids, mask and beginnings, `[N]`; they outlive the open files."""
        self._ids.flush()
        ids_N: npt.NDArray[np.uint32] = np.memmap(self._ids, "<u4", mode="r")
        return ids_N, _flags(self._mask), _flags(self._starts)


def _flags(file: IO[bytes] | None) -> npt.NDArray[np.bool_] | None:
    if file is None:
        return None
    file.flush()
    flags_N: npt.NDArray[np.bool_] = np.memmap(file, np.bool_, mode="r")
    return flags_N


def _check_bad(config: CorpusConfig, tokens: Tokens, before: int) -> None:
    if tokens.bad and before + len(tokens.bad) + tokens.skipped > config.skip_bad:
        complaint = tokens.bad[max(0, config.skip_bad - before - tokens.skipped)]
        more = f"; {config.skip_bad} before it were skipped" if config.skip_bad else ""
        raise InputError(f"{complaint}, or pass over it with --skip-bad{more}")


def _windows(stream_N: npt.NDArray[Any], sequences: int, seq_len: int) -> npt.NDArray[Any]:
    return np.lib.stride_tricks.sliding_window_view(stream_N, seq_len + 1)[::seq_len][:sequences]


def _blocks(array_SL: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, HASHED_TOKENS // array_SL.shape[1])
    for start in range(0, len(array_SL), step):
        yield array_SL[start : start + step]


def _fingerprint(tokens_SL1: npt.NDArray[np.uint32], **flags: npt.NDArray[np.bool_] | None) -> str:
    digest = hashlib.sha256(np.array(tokens_SL1.shape, "<i8").tobytes())
    for block in _blocks(tokens_SL1):
        digest.update(np.ascontiguousarray(block, "<u4").data)
    for name, array in flags.items():
        if array is not None:
            digest.update(name.encode())
            for block in _blocks(array):
                digest.update(np.packbits(block, axis=1).data)
    return digest.hexdigest()
