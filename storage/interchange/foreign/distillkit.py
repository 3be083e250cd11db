"""DistillKit's compressed log-probabilities: `input_ids`, `compressed_logprobs`, `bytepacked_indices`.

The layout, by its published schema. A list holds k ids and k values, by value descending. Ids: ceil(log2 d) bits each, the
highest first, back to back. Values: the first `exact_k` as they are; then, where there are `polynomial_terms`,
the coefficients of a fit over t = 0, 1, ... (or t from 0 to 1: `normalize_t`) of the other k - exact_k; then the residual bins,
each a scale and packed integers. With `delta_encoding` all of these are steps from the value before. Nothing in the files
says any of it: it is in the configuration the capture wrote beside them.

Its capture leaves out the first token's list, which is empty, so a sequence of T tokens has T - 1 lists and list t is the
distribution of what follows token t. Fitted values are no log-probabilities of any model exactly: they may sum to more than 1.

Shapes: `B` sequences, `M` lists, `K` entries of a list, `C` coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError
from stillroom.storage.interchange.foreign.came import Came
from stillroom.storage.interchange.foreign.files import column_names, read_columns
from stillroom.storage.interchange.foreign.lists import BYTES2, INTS, as_many, lists, numbers
from stillroom.storage.spec import MAX_DRAWS
from stillroom.storage.targets import MAX_VOCAB_SIZE

TermDtype = Literal["float16", "bfloat16", "float32", "float64"]
WIDTH_BYTES: Final = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MASS_TOLERANCE: Final = 0.25  # of fitted values; its presets were seen to reach 1.16
_MOST_BITS: Final = 53  # of a residual: a float64 holds it
_LOGPROBS, _INDICES, _TOKENS = "compressed_logprobs", "bytepacked_indices", "input_ids"
_LEGACY: Final = ("packed_indices", "exact_values", "coeffs")
_DEFAULTS: Final = {
    "exact_dtype": "float32", "polynomial_terms": None, "term_dtype": "float32", "delta_encoding": True,
    "error_diffusion": False, "normalize_t": False,
}  # fmt: skip
_NEEDED: Final = ("d", "k", "exact_k", "residual_bins")

Bytes = npt.NDArray[np.uint8]
FloatMK = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bin:
    """One run of quantised residuals: the dtype of its scale, bits of an element, and how many there are."""

    scale_dtype: TermDtype
    element_bits: int
    num_elements: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of its elements."""
        return -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """The configuration a dataset was compressed with, by the names DistillKit gives its keys."""

    d: int
    k: int
    exact_k: int
    exact_dtype: TermDtype
    polynomial_terms: tuple[int | str, ...]
    term_dtype: TermDtype
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Compression:
        """From the keys and values of its file.

        Raises:
            InputError: a key is missing, unknown or out of range, or it is of the legacy format.
        """
        if "polynomial_degree" in values:
            raise InputError(
                f"{where} is of the legacy format, which keeps centred logits and no normaliser, so that no probability can be "
                "told from it: capture again in the present format"
            )
        known = {**_DEFAULTS, **values}
        for key in _NEEDED:
            if key not in known:
                raise InputError(
                    f"{where} lacks the key {key!r}: name the compression_config.yaml that the capture wrote"
                )
        if unknown := known.keys() - {*_DEFAULTS, *_NEEDED}:
            raise InputError(f"{where} has the unknown key {min(map(str, unknown))!r}: its layout is not known here")
        bins = known["residual_bins"] or []
        if not isinstance(bins, list) or not all(isinstance(item, dict) and item.keys() == _BIN_KEYS for item in bins):
            raise InputError(f"{where}: residual_bins are no list of {', '.join(sorted(_BIN_KEYS))}: mend the file")
        made = cls(
            d=known["d"],
            k=known["k"],
            exact_k=known["exact_k"],
            exact_dtype=known["exact_dtype"],
            polynomial_terms=tuple(known["polynomial_terms"] or ()),
            term_dtype=known["term_dtype"],
            residual_bins=tuple(Bin(**item) for item in bins),
            delta_encoding=known["delta_encoding"],
            normalize_t=known["normalize_t"],
        )
        made._check(where)
        return made

    def _check(self, where: str) -> None:
        rest = self.k - self.exact_k if type(self.k) is type(self.exact_k) is int else -1
        fits: list[tuple[str, Any, bool]] = [
            ("d", self.d, type(self.d) is int and 2 <= self.d <= MAX_VOCAB_SIZE),
            ("k", self.k, type(self.k) is int and 1 <= self.k <= MAX_DRAWS),
            ("exact_k", self.exact_k, rest >= 0 and self.exact_k >= 0),
            ("exact_dtype", self.exact_dtype, self.exact_dtype in WIDTH_BYTES),
            ("term_dtype", self.term_dtype, self.term_dtype in WIDTH_BYTES),
            ("delta_encoding", self.delta_encoding, type(self.delta_encoding) is bool),
            ("normalize_t", self.normalize_t, type(self.normalize_t) is bool),
        ]
        fits += [
            ("polynomial_terms", term, term in ("sqrt", "exp") or (type(term) is int and 0 <= term <= 64))
            for term in self.polynomial_terms
        ]
        for item in self.residual_bins:
            sizes = type(item.element_bits) is type(item.num_elements) is int and 0 < item.num_elements <= rest
            fits.append(("residual_bins", asdict(item), sizes and item.scale_dtype in WIDTH_BYTES))
            fits.append(("element_bits", item.element_bits, sizes and 1 <= item.element_bits <= _MOST_BITS))
        for name, value, fit in fits:
            if not fit:
                raise InputError(f"{where}: {name} came as {value!r}, which no such configuration has: mend the file")
        if sum(item.num_elements for item in self.residual_bins) > rest:
            raise InputError(f"{where}: its residual bins hold more than k - exact_k = {rest} elements: mend the file")
        if rest and not self.polynomial_terms and not self.residual_bins:
            raise InputError(f"{where}: nothing stands for the {rest} values beyond exact_k: mend the file")

    @property
    def id_bits(self) -> int:
        """Bits of an id, computed in float32 as the writer does."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        """Bytes of the ids of a list."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of a list."""
        total = self.exact_k * WIDTH_BYTES[self.exact_dtype]
        total += len(self.polynomial_terms) * WIDTH_BYTES[self.term_dtype]
        return total + sum(WIDTH_BYTES[item.scale_dtype] + item.packed_bytes for item in self.residual_bins)

    def values(self, packed_MB: Bytes) -> FloatMK:
        """Log-probabilities of lists, `[M, k]` nats, from their bytes, `[M, value_bytes]`; of wild bytes, perhaps NaN."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._values(packed_MB)

    def _values(self, packed_MB: Bytes) -> FloatMK:
        taken = _Taker(packed_MB)
        exact_MK = taken.floats(self.exact_dtype, self.exact_k)
        rest = self.k - self.exact_k
        rest_MK = np.zeros((len(packed_MB), rest))
        if self.polynomial_terms:
            coefficient_MC = taken.floats(self.term_dtype, len(self.polynomial_terms))
            rest_MK += self._fit(coefficient_MC)
        start = 0
        for item in self.residual_bins:
            scale_M1 = taken.floats(item.scale_dtype, 1)
            code_MK = unpacked(taken.take(item.packed_bytes), item.element_bits, item.num_elements).astype(np.float64)
            code_MK = 2 * code_MK - 1 if item.element_bits == 1 else code_MK - 2.0 ** (item.element_bits - 1)
            rest_MK[:, start : start + item.num_elements] += code_MK * scale_M1
            start += item.num_elements
        value_MK = np.concatenate([exact_MK, rest_MK], axis=1)
        return np.cumsum(value_MK, axis=1) if self.delta_encoding else value_MK

    def _fit(self, coefficient_MC: FloatMK) -> FloatMK:
        """The fitted curve, in the arithmetic it was fitted with: residuals are what it lacked."""
        rest = self.k - self.exact_k
        t_K = rounded(
            np.linspace(0, 1, rest) if self.normalize_t else np.arange(rest, dtype=np.float64), self.term_dtype
        )
        powers = [
            t_K**term if isinstance(term, int) else np.sqrt(t_K) if term == "sqrt" else np.exp(t_K)
            for term in self.polynomial_terms
        ]
        basis_KC = rounded(np.stack(powers, axis=1), self.term_dtype)
        product_MKC = rounded(basis_KC * coefficient_MC[:, None, :], self.term_dtype)
        return rounded(product_MKC.sum(-1), self.term_dtype)


_BIN_KEYS: Final = {"scale_dtype", "element_bits", "num_elements"}


class _Taker:
    """Cuts bytes off the front of every list."""

    def __init__(self, packed_MB: Bytes) -> None:
        self._packed_MB, self._start = packed_MB, 0

    def take(self, many: int) -> Bytes:
        self._start += many
        return np.ascontiguousarray(self._packed_MB[:, self._start - many : self._start])

    def floats(self, dtype: TermDtype, many: int) -> FloatMK:
        raw = self.take(many * WIDTH_BYTES[dtype]).reshape(-1)
        if dtype == "bfloat16":
            found = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            found = raw.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype])
        return found.reshape(len(self._packed_MB), many).astype(np.float64)


def rounded(values: npt.NDArray[np.float64], dtype: TermDtype) -> npt.NDArray[np.float64]:
    """Values to the nearest that `dtype` has, as float64."""
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def unpacked(packed_MB: Bytes, bits: int, many: int) -> npt.NDArray[np.int64]:
    """`many` integers of so many bits from each row of bytes, highest bit first."""
    bit_MKb = np.unpackbits(packed_MB, axis=1, count=many * bits).reshape(len(packed_MB), many, bits)
    found = np.zeros((len(packed_MB), many), np.int64)
    for place in range(bits):
        found = (found << 1) | bit_MKb[:, :, place]
    return found


@dataclass(frozen=True, slots=True)
class DistillKit:
    """How to read a captured dataset."""

    compression: Compression

    def settings(self) -> dict[str, Any]:
        """What of this decides what the files mean."""
        return asdict(self.compression)

    def read(self, files: tuple[Path, ...]) -> Iterator[Came]:
        """Sequences of the files, in order, some at a time.

        Raises:
            InputError: a file, column or length that does not fit, named.
        """
        first = 0
        for path in files:
            _check_columns(path)
            for columns in read_columns(path, {_TOKENS: INTS, _LOGPROBS: BYTES2, _INDICES: BYTES2}):
                tokens_B, tokens = lists(columns[_TOKENS], _TOKENS, path.name, first=first)
                lists_B, values = lists(columns[_LOGPROBS], _LOGPROBS, path.name, first=first)
                ids_B, ids = lists(columns[_INDICES], _INDICES, path.name, first=first)
                as_many(lists_B, ids_B, f"{_LOGPROBS!r} and {_INDICES!r}", path.name, first=first)
                value_MB = self._square(values, _LOGPROBS, self.compression.value_bytes, path.name, lists_B, first)
                id_MB = self._square(ids, _INDICES, self.compression.id_bytes, path.name, lists_B, first)
                ids_MK = unpacked(id_MB, self.compression.id_bits, self.compression.k)
                n_M = np.full(len(id_MB), self.compression.k, np.int64)
                logp_E = self.compression.values(value_MB).ravel()
                tokens_T = numbers(tokens, _TOKENS, path.name)
                yield Came(path.name, first, tokens_T, tokens_B, lists_B, n_M, ids_MK.ravel(), logp_E)
                first += len(tokens_B)

    def _square(self, packed: Any, name: str, wanted: int, file: str, lists_B: Any, first: int) -> Bytes:
        many_M, elements = lists(packed, name, file, first=0, empty=True)
        if np.any(many_M != wanted):
            bad = int(np.argmax(many_M != wanted))
            number = int(np.searchsorted(np.cumsum(lists_B), bad, side="right"))
            raise InputError(
                f"{file}: sequence {first + number}: a list of {name!r} has {many_M[bad]} bytes, by the compression "
                f"configuration it has {wanted}: name the compression_config.yaml that was written beside these files"
            )
        found: Bytes = numbers(elements, name, file).reshape(-1, wanted)
        return found


def _check_columns(path: Path) -> None:
    names = column_names(path)
    if set(_LEGACY) <= set(names):
        raise InputError(
            f"{path.name} is of DistillKit's legacy format, which keeps centred logits and no normaliser, so that no "
            "probability can be told from it: capture again in the present format"
        )
    if {"token_ids", "top_values"} <= set(names):
        raise InputError(
            f"{path.name} holds plain top-k rows: import them with --from topk --tokens-column {_TOKENS} --ids-column token_ids "
            "--logprobs-column top_values"
        )
