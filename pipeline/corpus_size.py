"""How many tokens a corpus has, without tokenising it: characters are counted, tokens per character measured on its beginning.

Shapes: `U` documents of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.corpus import documents, wanted_of
from stillroom.pipeline.intervals import Estimate, ratio_of
from stillroom.pipeline.packing_tokens import encode
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_DOCUMENTS: Final = 512
SAMPLE_CHARACTERS: Final = 1 << 20  # enough, if documents are long
LEAST_DOCUMENTS: Final = 16
LONGEST: Final = 1 << 16  # characters of one document that are tokenised
PROGRESS_EVERY: Final = 4096


def corpus_tokens(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_progress: Callable[[int], None] = lambda documents: None,
) -> Estimate:
    """Tokens of the whole corpus, one row each; exact for token ids, else with the interval of a ratio estimator.

    Args:
        config: the corpus. It is streamed through once; memory does not grow with it. `max_sequences` caps the result.
        tokenizer: the teacher's.
        on_progress: told the number of documents seen.

    Raises:
        InputError: a source that can not be used, or one without documents.
    """
    kind, eos = wanted_of(config).kind, tokenizer.eos_token_id
    characters, known, count, whole = 0, 0, 0, True  # known: tokens of documents of ids
    tokens_U: list[int] = []
    characters_U: list[int] = []
    most = None if config.max_sequences is None else config.max_sequences * config.seq_len
    for document in documents(config):
        count += 1
        if isinstance(document, np.ndarray):
            known += len(document) + (eos is not None and document[-1] != eos)  # closed by the end-of-text id
        else:
            size = _size(document)
            few = len(tokens_U) < LEAST_DOCUMENTS
            if few or (len(tokens_U) < SAMPLE_DOCUMENTS and characters < SAMPLE_CHARACTERS):
                part = document[:LONGEST] if isinstance(document, str) else document
                taken = _size(part)
                tokens_U.append(int(encode(tokenizer, kind, [part]).lengths_D.sum()))
                characters_U.append(taken)
                whole &= taken == size
            else:
                whole = False
            characters += size
        if count % PROGRESS_EVERY == 0:
            on_progress(count)
        if most is not None and known + characters * _ratio(tokens_U, characters_U) > 2 * most:
            break
    if not count:
        raise InputError(f"source {config.data} holds no text: every document is empty")
    if whole:
        found = Estimate.exactly(float(known + sum(tokens_U)), "counted")
    else:
        text = ratio_of(np.array(tokens_U), np.array(characters_U)).times(Estimate.exactly(float(characters)))
        found = Estimate(text.value + known, text.low + known, text.high + known, text.source)
    return found if most is None else _at_most(found, most)


def _size(document: Any) -> int:
    """Characters of text or of a conversation's turns."""
    if isinstance(document, list):
        return sum(len(str(value)) for turn in document for value in turn.values())
    return len(document)


def _ratio(tokens_U: list[int], characters_U: list[int]) -> float:
    """About how many tokens a character is; 1 for ids."""
    return sum(tokens_U) / max(1, sum(characters_U)) if characters_U else 1.0


def _at_most(found: Estimate, most: int) -> Estimate:
    source = "counted" if found.low >= most else found.source
    return Estimate(min(found.value, most), min(found.low, most), min(found.high, most), source)
