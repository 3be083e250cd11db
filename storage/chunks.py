"""One chunk to bytes and back, for each codec of `layout`. Nothing is unfolded into more room than a chunk may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numcodecs import zstd

from stillroom.storage.errors import InputError
from stillroom.storage.layout import PCODEC, ZSTD_LEVEL, Codec

CRC_BYTES: Final = 4
_MISSING: Final = "profile small needs the package pcodec: pip install 'stillroom[small]'"


def encoder(codec: Codec) -> Callable[[npt.NDArray[Any]], bytes]:
    """What turns the elements of a chunk into bytes, the same ones each time.

    Raises:
        InputError: the package that it needs is missing.
    """
    if codec == "zstd":
        return lambda chunk: bytes(zstd.compress(chunk, ZSTD_LEVEL, checksum=True))
    if codec == "crc32c":
        return lambda chunk: _with_crc(chunk.tobytes())
    pcodec = _pcodec()
    return lambda chunk: _with_crc(bytes(pcodec.encode(chunk.ravel())))


def decode_chunk(codec: Codec, data: memoryview, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """The `count` elements of a chunk.

    Raises:
        ValueError: the bytes are not what they were, or not of so many elements.
    """
    if codec == "zstd":
        try:
            # Decodes into exactly so many bytes: a frame that unfolds to more or less is an error, not an allocation.
            return np.frombuffer(pa.Codec("zstd").decompress(data, count * dtype.itemsize), dtype)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(str(error)) from error
    body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if google_crc32c.value(np.frombuffer(body, np.uint8)) != int.from_bytes(crc, "little"):
        raise ValueError("its checksum fails")
    if codec == "crc32c":
        if len(body) != count * dtype.itemsize:
            raise ValueError(f"it holds {len(body)} bytes")
        return np.frombuffer(body, dtype)
    elements = np.zeros(count, dtype)
    try:
        from pcodec import standalone  # numcodecs calls the same, and does not tell how many elements there were
    except ImportError as error:
        raise InputError(_MISSING) from error
    try:
        progress = standalone.simple_decompress_into(bytes(body), elements)
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    if progress.n_processed != count or not progress.finished:
        raise ValueError(f"it holds {progress.n_processed} elements or more, wanted {count}")
    return elements


def _with_crc(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def _pcodec() -> Any:
    try:
        from numcodecs.pcodec import PCodec
    except ImportError as error:
        raise InputError(_MISSING) from error
    return PCodec(**PCODEC)
