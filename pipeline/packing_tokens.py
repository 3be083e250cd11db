"""Documents to token ids, here or ahead of need in worker processes; the order and the ids are the same either way.

Shapes: `D` documents of a batch, `N` tokens of all of them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.corpus import documents, wanted_of
from stillroom.pipeline.corpus_bins import Ids
from stillroom.pipeline.corpus_files import Document, Kind, Tally
from stillroom.pipeline.packing_chat import ChatError, encode_chat
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL: Final = 256
BATCHES_PER_WORKER: Final = 3  # in hand or waiting: what bounds the memory

BoolN = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of tokenised documents.

    Attributes:
        ids_N: uint32, documents end to end.
        lengths_D: int64, tokens of each document.
        mask_N: tokens that are to be learnt; None: all.
        bad: what was wrong with the documents that are left out.
        skipped: broken records among what was read up to here, not counting `bad`.
        empty: empty documents up to here.
    """

    ids_N: npt.NDArray[np.uint32]
    lengths_D: npt.NDArray[np.int64]
    mask_N: BoolN | None = None
    bad: tuple[str, ...] = ()
    skipped: int = 0
    empty: int = 0


def tokenised(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """The corpus in batches of `DOCUMENTS_PER_CALL` documents, in order.

    Args:
        config: what to read; with `tokenize_workers` that many processes tokenise ahead.
        tokenizer: the teacher's.

    Raises:
        InputError: a source that can not be used, ids outside the vocabulary, or a worker that was killed.
    """
    kind, workers = wanted_of(config).kind, config.tokenize_workers
    if kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"tokenizer {tokenizer.name_or_path} has no chat template, which --messages-column needs: "
            "give the teacher a tokenizer with one, or name a --text-column"
        )
    batches = _batches(config)
    if workers == 0 or kind == "ids":  # ids need no work
        for batch, skipped, empty in batches:
            yield _with_counts(encode(tokenizer, kind, batch), skipped, empty)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tokenizer, kind)) as pool:
        try:
            yield from _ahead(pool, batches, workers * BATCHES_PER_WORKER, partial(encode, tokenizer, kind))
        except BrokenProcessPool as error:
            raise InputError(
                "a tokenising process died (killed, or out of memory): lower --tokenize-workers and run again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def encode(tokenizer: PreTrainedTokenizerBase, kind: Kind, batch: list[Any]) -> Tokens:
    """Ids of a batch of documents; text and ids are closed by the end-of-text id, a conversation ends as its template says.

    Raises:
        InputError: ids outside the vocabulary.
    """
    if kind == "messages":
        return _encode_messages(tokenizer, batch)
    eos, texts = tokenizer.eos_token_id, [document for document in batch if isinstance(document, str)]
    # The tokenizer's own special tokens (a begin-of-text id, say) stay: they are what the teacher was trained with.
    encoded: Any = tokenizer(texts, return_attention_mask=False, verbose=False) if texts else {"input_ids": []}
    found = iter(encoded["input_ids"])
    return _joined([_closed(next(found) if isinstance(d, str) else _known(tokenizer, d), eos) for d in batch])


def _known(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> Ids:
    """`ids`, none outside the vocabulary."""
    known, least, most = len(tokenizer), int(ids.min()), int(ids.max())
    if least < 0 or most >= known:
        raise InputError(
            f"a document holds the token id {most if most >= known else least}, the teacher's tokenizer has {known}: "
            "tokenise the corpus with that tokenizer"
        )
    return ids


def _closed(ids: Any, eos: int | None) -> Any:
    if eos is None or (len(ids) and ids[-1] == eos):
        return ids
    return [*ids, eos] if isinstance(ids, list) else np.append(ids, eos)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, batch: list[Any]) -> Tokens:
    ids: list[Any] = []
    masks: list[BoolN] = []
    bad: list[str] = []
    for document in batch:
        if isinstance(document, np.ndarray):  # of a bin mixed with conversations: all of it is learnt
            ids.append(_closed(_known(tokenizer, document), tokenizer.eos_token_id))
            masks.append(np.ones(len(ids[-1]), np.bool_))
            continue
        try:
            encoded = encode_chat(tokenizer, document)
        except ChatError as error:
            bad.append(str(error))
            continue
        ids.append(encoded.ids_N)
        masks.append(encoded.mask_N)
    tokens = _joined(ids)
    mask_N = np.concatenate([np.zeros(0, np.bool_), *masks])
    return Tokens(tokens.ids_N, tokens.lengths_D, mask_N, tuple(bad))


def _joined(documents_ids: list[Any]) -> Tokens:
    lengths_D = np.array([len(ids) for ids in documents_ids], np.int64)
    parts = [np.asarray(ids, np.uint32) for ids in documents_ids]
    return Tokens(np.concatenate([np.zeros(0, np.uint32), *parts]), lengths_D)


def _with_counts(tokens: Tokens, skipped: int, empty: int) -> Tokens:
    return Tokens(tokens.ids_N, tokens.lengths_D, tokens.mask_N, tokens.bad, skipped, empty)


def _batches(config: CorpusConfig) -> Iterator[tuple[list[Document], int, int]]:
    """Batches of documents, with what had been left out when each was full."""
    tally = Tally(config.skip_bad)
    items = documents(config, tally)
    while batch := list(itertools.islice(items, DOCUMENTS_PER_CALL)):
        yield batch, tally.skipped, tally.empty


def _ahead(
    pool: ProcessPoolExecutor, batches: Iterator[Any], waiting: int, here: Callable[[list[Document]], Tokens]
) -> Iterator[Tokens]:
    """Results in order, up to `waiting` batches ahead; those of ids alone are made `here`. A source that fails does so when its
    turn comes, as without workers.
    """
    queue: deque[tuple[Future[Tokens], int, int]] = deque()
    failed: InputError | None = None
    more = True
    while more or queue:
        while more and len(queue) < waiting:
            try:
                batch, skipped, empty = next(batches)
                if all(isinstance(document, np.ndarray) for document in batch):
                    future: Future[Tokens] = Future()
                    future.set_result(here(batch))
                else:
                    future = pool.submit(_work, batch)
            except StopIteration:
                more = False
            except InputError as error:
                more, failed = False, error
            else:
                queue.append((future, skipped, empty))
        if queue:
            future, skipped, empty = queue.popleft()
            yield _with_counts(future.result(), skipped, empty)
    if failed is not None:
        raise failed


_here: list[tuple[Any, Kind]] = []  # in a worker: its tokenizer


def _start(tokenizer: PreTrainedTokenizerBase, kind: Kind) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _here.append((tokenizer, kind))


def _work(batch: list[Document]) -> Tokens:
    return encode(*_here[0], batch)
