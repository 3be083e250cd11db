"""How many bytes of text each token id stands for, read off a `tokenizer.json`: what turns nats per token into bits per byte.

Bits per byte compare models of different tokenizers; nats per token do not.

Shapes: `V` ids.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE: Final = "\u2581"  # what SentencePiece writes for a space
FloatV = npt.NDArray[np.float64]


def token_bytes(file: Path) -> FloatV | None:
    """Bytes of text that each id stands for, `[V]`.

    In a byte-level vocabulary (GPT-2 and after) every character of a token is a byte; in SentencePiece's (Llama 2, Gemma) a token
    is its text, or one byte where it says so. Special tokens have no text, hence 0 bytes; an "unknown" token may stand for any:
    NaN.

    Args:
        file: `tokenizer.json`.

    Returns:
        None where the tokens do not spell the text: word pieces, say, whose spaces are lost.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    model, decoders = state["model"], list(_parts(state.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    pieces = _pieces(model.get("vocab"))
    falls_back = "ByteFallback" in kinds or bool(model.get("byte_fallback"))
    if "ByteLevel" in kinds:
        sizes = {index: float(len(piece)) for piece, index in pieces.items()}
    elif "Metaspace" in kinds or any(d["type"] == "Replace" and d["pattern"].get("String") == _SPACE for d in decoders):
        sizes = {
            index: 1.0 if falls_back and _BYTE.fullmatch(piece) else float(len(piece.replace(_SPACE, " ").encode()))
            for piece, index in pieces.items()
        }
    else:
        return None
    for token in state.get("added_tokens", []):
        sizes[token["id"]] = 0.0 if token["special"] else float(len(token["content"].encode()))
    unknown = model.get("unk_id") if "unk_id" in model else pieces.get(model.get("unk_token"))
    if unknown is not None and not falls_back and "ByteLevel" not in kinds:
        sizes[unknown] = math.nan
    bytes_V = np.full(max(sizes, default=-1) + 1, math.nan)
    bytes_V[list(sizes)] = list(sizes.values())
    return bytes_V


def bits_per_byte(loss: float, rows_V: FloatV, bytes_V: FloatV | None) -> float | None:
    """Bits the student needs for a byte of the text: loss * rows / (ln 2 * bytes).

    Args:
        loss: nats per row.
        rows_V: rows with each label; an end-of-text label costs its bits and has no bytes.
        bytes_V: as `token_bytes` gives them.

    Returns:
        None where the bytes of a label are not known, or there are none.
    """
    if bytes_V is None:
        return None
    seen = np.flatnonzero(rows_V)
    if not len(seen) or seen[-1] >= len(bytes_V):
        return None
    size = float(rows_V[seen] @ bytes_V[seen])
    return loss * float(rows_V.sum()) / (math.log(2) * size) if size > 0 else None  # NaN is not above 0


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    else:
        yield decoder


def _pieces(vocab: Any) -> dict[str, int]:
    """A token's text to its id."""
    if isinstance(vocab, dict):
        return vocab
    return {piece: index for index, (piece, _) in enumerate(vocab or [])}  # Unigram's list of (piece, score)
