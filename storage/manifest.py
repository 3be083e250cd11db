"""`Manifest`: what made a cache. Written once as manifest.json; a run with another one is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, get_args

from stillroom.storage import strict
from stillroom.storage.errors import FormatError, InputError, NotACacheError
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import MAX_VOCAB_SIZE

FORMAT: Final = "stillroom-cache"
FORMAT_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
CONCAT: Final = "concat"
DOCUMENTS: Final = "documents"
SEPARATE: Final = "separate"
IMPORTED: Final = "imported:"
Profile = Literal["standard", "fast", "small"]
Values = tuple[tuple[str, Any], ...]
MAX_SEQ_LEN: Final = 1 << 17
MAX_SEQUENCES_PER_SHARD: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """The model whose distributions these are; `fingerprint` covers weights and config, `dtype` is its arithmetic.

    Of targets that another tool computed neither is known: then `name` is what the user says, and `fingerprint` is "imported:"
    and a hash of the files they came in, which no model has.
    """

    name: str
    revision: str | None
    fingerprint: str
    vocab_size: int
    dtype: str

    @property
    def imported(self) -> bool:
        """Whether the targets came from another tool, so that no model can be held against the fingerprint."""
        return self.fingerprint.startswith(IMPORTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer, by the hash of its full JSON."""

    fingerprint: str
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """The text: `fingerprint` covers its tokens, `tokens` counts them before packing."""

    name: str
    fingerprint: str
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingInfo:
    """How documents became sequences of `seq_len` rows and seq_len + 1 tokens.

    `concat` and `documents` both run them on, end to end; with `documents` positions and attention begin anew at every
    document, and the shards say where that is. With `separate` every sequence stands by itself, filled up at its end with
    rows that keep nothing.
    """

    policy: str = "concat"
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What made a cache and how it is cut into shards.

    Attributes:
        teacher, tokenizer, corpus, packing, sampler: the identity of the targets, with `vocab_size`.
        vocab_size: every target id is below it.
        sequences: number of sequences in the whole cache.
        sequences_per_shard: the shard plan; the last shard may be shorter.
        libraries: versions that started the run (not identity).
        created: ISO time the run was started (not identity).
        profile: how the shards store it (`layout`): `standard`, `fast` (plain arrays, for a local disk) or `small`. Left out of
            the file where it is `standard`.
        format_version: of the cache format.

    Raises:
        InputError: a size is out of range.
    """

    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    corpus: CorpusInfo
    packing: PackingInfo
    sampler: SamplerSpec
    vocab_size: int
    sequences: int
    sequences_per_shard: int
    libraries: dict[str, str] = field(default_factory=dict)
    created: str = ""
    profile: Profile = "standard"
    format_version: int = FORMAT_VERSION

    NOT_IDENTITY: ClassVar = frozenset({"teacher.name", "teacher.revision", "corpus.name", "libraries", "created"})

    def __post_init__(self) -> None:
        if self.profile not in get_args(Profile):
            raise InputError(f"profile {self.profile!r} is unknown: choose one of {', '.join(get_args(Profile))}")
        for name, value, top in (
            ("vocab_size", self.vocab_size, MAX_VOCAB_SIZE),
            ("tokenizer.vocab_size", self.tokenizer.vocab_size, MAX_VOCAB_SIZE),
            ("packing.seq_len", self.packing.seq_len, MAX_SEQ_LEN),
            ("sequences", self.sequences, 1 << 48),
            ("sequences_per_shard", self.sequences_per_shard, MAX_SEQUENCES_PER_SHARD),
        ):
            if not 1 <= value <= top:
                raise InputError(f"{name} came as {value}, wanted 1 to {top}: change it")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.sequences // self.sequences_per_shard)

    def shard_range(self, index: int) -> tuple[int, int]:
        """Sequences `start, stop` of shard `index`.

        Raises:
            InputError: there is no such shard.
        """
        if not 0 <= index < self.shards:
            raise InputError(f"shard {index} came, wanted 0 to {self.shards - 1}: the plan has {self.shards} shards")
        start = index * self.sequences_per_shard
        return start, min(start + self.sequences_per_shard, self.sequences)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object, sealed with its own digest; `from_json` gives an equal manifest back."""
        return strict.sealed({"format": FORMAT, **_unless_standard(asdict(self))})

    @property
    def identity(self) -> str:
        """Digest of the identity fields: two manifests have the same one where `differences` finds none."""
        return _identity(tuple(item for item in _values(self) if item[0] not in self.NOT_IDENTITY))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            FormatError: not a manifest, of a newer version, with an unknown or missing key, out of range, or changed since
                it was written.
        """
        if data.get("format") != FORMAT:
            raise FormatError(
                f"{MANIFEST_NAME} says format {data.get('format')!r}, wanted {FORMAT!r}: it is not a cache's"
            )
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            remedy = "upgrade stillroom" if type(version) is int and version > FORMAT_VERSION else "it is malformed"
            raise FormatError(
                f"{MANIFEST_NAME} has format_version {version!r}, this stillroom reads version {FORMAT_VERSION}: {remedy}"
            )
        body = {key: value for key, value in data.items() if key not in ("format", strict.SEAL)}
        body = {"profile": "standard", **body}
        manifest = strict.from_json(cls, body, MANIFEST_NAME)  # before the seal: its complaints name the key
        strict.unsealed(data, MANIFEST_NAME)
        return manifest

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """The manifest of the cache in `root`.

        Raises:
            NotACacheError: there is none.
            FormatError: as `from_json`.
        """
        try:
            data = strict.load_file(root / MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotACacheError(
                f"{root} holds no {MANIFEST_NAME}: name a cache directory or make one with `stillroom cache`"
            ) from error
        return cls.from_json(data)

    def differences(self, other: Manifest) -> list[str]:
        """Identity fields in which `other` differs, as "field: this one's value, other's value"; empty for the same run."""
        mine, theirs = _flat(_values(self)), _flat(_values(other))
        return [
            f"{name}: {json.dumps(mine[name])}, now {json.dumps(theirs[name])}"
            for name in mine
            if name not in self.NOT_IDENTITY and mine[name] != theirs[name]
        ]


def _unless_standard(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if (name, value) != ("profile", "standard")}


def _values(manifest: Manifest) -> Values:
    return tuple((item.name, getattr(manifest, item.name)) for item in fields(manifest))


def _flat(values: Values) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for top, value in values:
        if isinstance(value, dict) or not hasattr(value, "__dataclass_fields__"):
            result[top] = value
        else:
            result |= {f"{top}.{name}": inner for name, inner in asdict(value).items()}
    return result


@lru_cache(maxsize=64)  # a cache of 12,000 shards asks once a record
def _identity(values: Values) -> str:
    flat = {name: value for name, value in _flat(values).items() if name not in Manifest.NOT_IDENTITY}
    return strict.digest(_unless_standard(flat))
