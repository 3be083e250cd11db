"""Sources of text: files, folders, `datasets` names and mixtures of them become one deterministic stream of documents.

A document is text, token ids (`ids_column`, or bins of ids) or a conversation (`messages_column`). The order depends on
names and contents alone: files of a folder come sorted, sources one after the other, or, where they have weights, drawn in turn
by a fixed key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.corpus_bins import index_of
from stillroom.pipeline.corpus_files import SUFFIXES, Document, Tally, Wanted, check_column, file_documents, values_of
from stillroom.storage.errors import InputError

# Key of the draws between weighted sources. Not the sampler's seed: a second cache with another seed has the same text.
MIXTURE_KEY: Final = 0x5711_0C09
DRAWS_AT_A_TIME: Final = 1024
DATASET_BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """One part of `data`: a file, folder or `datasets` name, and its share of the documents (None: all of it)."""

    name: str
    weight: float | None


def documents(config: CorpusConfig, tally: Tally | None = None) -> Iterator[Document]:
    """Documents of the corpus, none empty.

    A text file is one document; so is a line of .jsonl and a row of .parquet or .arrow. Sources with weights are drawn in turn
    until the first of them ends, so that the shares hold to the end.

    Args:
        config: what to read.
        tally: counts what is left out; a fresh one, which allows `config.skip_bad`, where none is given.

    Raises:
        InputError: a source that is missing, unreadable, of an unknown kind, or without the column.
    """
    tally = Tally(config.skip_bad) if tally is None else tally
    parts = sources(config.data)
    streams = [_source_documents(config, part.name, tally) for part in parts]
    if parts[0].weight is None:
        for stream in streams:
            yield from stream
        return
    weights = np.array([part.weight for part in parts])
    for choice in _choices(weights / weights.sum()):
        try:
            yield next(streams[choice])
        except StopIteration:
            return


def sources(data: str) -> list[Source]:
    """The parts of `data`: `a.jsonl`, `a.jsonl,b.parquet` or `a.jsonl:0.7,b.parquet:0.3`.

    Raises:
        InputError: an empty part, a weight that is not above 0, or weights for some parts only.
    """
    if "," not in data or Path(data).expanduser().exists():
        return [Source(data, None)]
    found = []
    for part in data.split(","):
        name, _, tail = part.strip().rpartition(":")
        weight = _number(tail) if name else None
        found.append(Source(part.strip() if weight is None else name, weight))
        if not found[-1].name or (weight is not None and not 0 < weight < np.inf):
            raise InputError(f"source {part!r} of {data} is no NAME or NAME:WEIGHT with a weight above 0: change it")
    if len({source.weight is None for source in found}) > 1:
        raise InputError(f"some sources of {data} have weights and some have none: give each its NAME:WEIGHT, or none")
    return found


def wanted_of(config: CorpusConfig) -> Wanted:
    """The column that `config` asks for, and what it holds."""
    if config.ids_column is not None:
        return Wanted(config.ids_column, "ids")
    if config.messages_column is not None:
        return Wanted(config.messages_column, "messages")
    return Wanted(config.text_column)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _choices(share_P: np.ndarray[Any, np.dtype[np.float64]]) -> Iterator[int]:
    """Endless draws of parts, part i with probability `share_P[i]`: raw Philox words, which no version of numpy changes."""
    words = np.random.Philox(key=MIXTURE_KEY)
    edges = np.cumsum(share_P)[:-1]
    while True:
        u = (words.random_raw(DRAWS_AT_A_TIME) >> np.uint64(11)) * 2.0**-53
        yield from np.searchsorted(edges, u, side="right").tolist()


def _source_documents(config: CorpusConfig, name: str, tally: Tally) -> Iterator[Document]:
    wanted, path = wanted_of(config), Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if wanted.kind != "text":
            files = [file for file in files if SUFFIXES[file.suffix] != "text"]
        # Many things are called .bin; with an .idx beside it one is a corpus.
        files = [file for file in files if file.suffix != ".bin" or index_of(file).is_file()]
        if not files:
            kinds = ", ".join(SUFFIXES)
            raise InputError(f"folder {path} holds no text: put {kinds} files in it or name another source")
        for file in files:
            yield from file_documents(file, wanted, tally)
    elif path.is_file():
        yield from file_documents(path, wanted, tally)
    elif (bins := path.with_name(f"{path.name}.bin")).is_file():  # Megatron-LM names both files by what they share
        yield from file_documents(bins, wanted, tally)
    elif path.suffix or len(path.parts) > 2 or name.startswith((".", "/", "~")):
        raise InputError(f"source {name} does not exist: name a file, a folder or a `datasets` dataset")
    else:
        yield from _dataset_documents(config, name, wanted, tally)


def _dataset_documents(config: CorpusConfig, name: str, wanted: Wanted, tally: Tally) -> Iterator[Document]:
    import datasets

    try:
        data = datasets.load_dataset(name, config.subset, split=config.split, streaming=config.streaming)
        if data.column_names is None:  # a stream without declared columns: its first record tells
            data = data._resolve_features()
        check_column(name, wanted, list(data.column_names or ()))
        for batch in data.select_columns([wanted.column]).iter(batch_size=DATASET_BATCH):
            yield from values_of(name, wanted, batch[wanted.column], tally)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"source {name} is neither a file nor a dataset that can be loaded ({reason}): "
            "check the name, the split and the network"
        ) from error
