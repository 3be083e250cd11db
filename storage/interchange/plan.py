"""What an export is: its columns, its files, and stillroom.json, which makes it a cache again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from stillroom.storage import strict
from stillroom.storage.commits import CommitRecord
from stillroom.storage.errors import FormatError, InputError, NotACacheError
from stillroom.storage.layout import ArraySpec, code_arrays_of
from stillroom.storage.manifest import Manifest

To = Literal["parquet", "arrow", "datasets"]
KINDS: Final[tuple[To, ...]] = ("parquet", "arrow", "datasets")
FORMAT: Final = "stillroom-interchange"
FORMAT_VERSION: Final = 1
PLAN_NAME: Final = "stillroom.json"
METADATA_KEY: Final = b"stillroom"
CODE: Final = "code_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """How a cache is cut into files.

    Attributes:
        to: kind of file.
        shards_per_file: shards of the cache in one file; the last may hold fewer.
        manifest: of the cache.
    """

    to: To
    shards_per_file: int
    manifest: Manifest

    def __post_init__(self) -> None:
        if self.to not in KINDS:
            raise InputError(f"export to {self.to!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.shards_per_file < 1:
            raise InputError(f"shards_per_file came as {self.shards_per_file}, wanted 1 or more")
        if self.files > 99_999:
            raise InputError(f"{self.files:,} files would be made, wanted at most 99,999: raise shards_per_file")

    @property
    def files(self) -> int:
        """Number of data files."""
        return -(-self.manifest.shards // self.shards_per_file)

    def file_name(self, number: int) -> str:
        """Path of data file `number`, relative to the folder."""
        stem = f"{number:05d}-of-{self.files:05d}"
        if self.to == "datasets":
            return f"data-{stem}.arrow"
        return f"data/train-{stem}.{self.to}"

    def shards(self, number: int) -> range:
        """Shards in data file `number`."""
        start = number * self.shards_per_file
        return range(start, min(start + self.shards_per_file, self.manifest.shards))

    def sequences(self, number: int) -> tuple[int, int]:
        """Sequences `start, stop` in data file `number`."""
        shards = self.shards(number)
        return self.manifest.shard_range(shards[0])[0], self.manifest.shard_range(shards[-1])[1]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object, sealed."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, "to": self.to}
        return strict.sealed(body | {"shards_per_file": self.shards_per_file, "manifest": self.manifest.to_json()})

    @classmethod
    def load(cls, folder: Path) -> ExportPlan:
        """The plan of the export in `folder`.

        Raises:
            NotACacheError: there is none.
            FormatError: it is malformed, changed, or of a newer version.
        """
        try:
            data = strict.load_file(folder / PLAN_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotACacheError(
                f"{folder} holds no {PLAN_NAME}: name a folder that `stillroom export` wrote, whole"
            ) from error
        if data.get("format") != FORMAT or data.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{PLAN_NAME} says {data.get('format')!r} version {data.get('format_version')!r}, this stillroom reads "
                f"{FORMAT!r} version {FORMAT_VERSION}: upgrade stillroom, or name another folder"
            )
        body = strict.unsealed(data, PLAN_NAME)
        manifest = body.get("manifest")
        if not isinstance(manifest, dict):
            raise FormatError(f"{PLAN_NAME} lacks the key 'manifest': the file is malformed")
        plain = {key: body[key] for key in body.keys() - {"format", "format_version", "manifest"}}
        settings = strict.from_json(_Settings, plain, PLAN_NAME)
        try:
            return cls(**asdict(settings), manifest=Manifest.from_json(manifest))
        except InputError as error:
            raise FormatError(f"{PLAN_NAME}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    to: To
    shards_per_file: int


def code_arrays(manifest: Manifest) -> tuple[ArraySpec, ...]:
    """Arrays whose stored codes travel as they are: all but tokens, lengths and ids, which the plain columns give back."""
    return tuple(a for a in code_arrays_of(manifest) if a.name not in ("tokens", "n", "id_lo", "id_hi"))


def columns(manifest: Manifest) -> dict[str, pa.DataType]:
    """Columns of an export by name. Plain ones first: what they hold needs nothing of ours to read."""
    plain: dict[str, pa.DataType] = {
        "sequence": pa.int64(),
        "digest": pa.string(),
        "tokens": pa.list_(pa.uint32()),
        "n": pa.list_(pa.uint16()),
        "ids": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
        "logp": pa.list_(pa.float32()),
        "label_logp": pa.list_(pa.float32()),
        "entropy": pa.list_(pa.float32()),
    }
    if manifest.sampler.keep_logp == "none":
        del plain["logp"]
    codes = {CODE + a.name: pa.list_(pa.from_numpy_dtype(a.dtype.newbyteorder("="))) for a in code_arrays(manifest)}
    return plain | codes


def shard_digest(record: CommitRecord) -> str:
    """SHA-256 over names and hashes of a shard's objects: two shards have the same one where they are the same bytes."""
    return strict.digest({item.name: item.sha256 for item in record.objects})


def file_schema(plan: ExportPlan, number: int, digests: list[str]) -> pa.Schema:
    """Schema of data file `number`; its metadata says whose rows these are.

    Args:
        plan: of the export.
        number: of the file.
        digests: `shard_digest` of each of its shards.
    """
    about = {"plan": plan.to_json(), "file": number, "digests": digests}
    fields = [pa.field(name, kind) for name, kind in columns(plan.manifest).items()]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})


def file_about(schema: pa.Schema, plan: ExportPlan, number: int) -> list[str] | None:
    """Digests of the shards of data file `number`, or None if its metadata is not that of this plan's file."""
    text = (schema.metadata or {}).get(METADATA_KEY, b"")
    try:
        about = strict.loads(text, METADATA_KEY.decode())
    except (FormatError, UnicodeDecodeError):
        return None
    digests = about.get("digests")
    if about.get("plan") != plan.to_json() or about.get("file") != number:
        return None
    if not isinstance(digests, list) or len(digests) != len(plan.shards(number)):
        return None
    return [str(digest) for digest in digests]


def readme(plan: ExportPlan) -> str:
    """A dataset card that names configuration and split, so that `load_dataset(folder)` needs no code."""
    made = plan.manifest
    head = "tags:\n- stillroom\n- knowledge-distillation\n"
    opening = "`datasets.load_from_disk(folder)`"
    if plan.to != "datasets":
        head += "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
        head += f"    path: data/train-*.{plan.to}\n"
        opening = '`datasets.load_dataset(folder, split="train")`, with `streaming=True` too'
    rows = "\n".join(f"| `{name}` | `{kind}` |" for name, kind in columns(made).items())
    return (
        f"---\n{head}---\n\n# Sparse teacher distributions\n\n"
        f"Next-token targets of a language model, one row per sequence of {made.packing.seq_len} token positions: "
        f"sampler `{made.sampler.kind}`, N = {made.sampler.draws}, vocabulary {made.vocab_size:,}, "
        f"{made.sequences:,} sequences.\n\n"
        f"Open with {opening}. `stillroom import FOLDER --out CACHE` makes the cache again, bit for bit.\n"
        f"What made it is in `{PLAN_NAME}`.\n\n| column | type |\n|---|---|\n{rows}\n"
    )


def fingerprint(plan: ExportPlan) -> str:
    """16 hex digits that name this export to `datasets`."""
    return hashlib.sha256(strict.dumps(plan.to_json()).encode()).hexdigest()[:16]
