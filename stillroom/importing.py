"""`stillroom import`: an export of ours, or what other tools wrote, to a cache."""

from __future__ import annotations

import datetime
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from stillroom.console import Reporter, say, show_pairs
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from stillroom.storage.interchange.foreign.importing import ForeignResult, Origin, Reader
    from stillroom.storage.interchange.reading import ImportResult
    from stillroom.storage.writer import CacheWriter

WHOLE: Final = 0.9999  # a mean mass above this means that the tool scaled its rows to sum to 1
DOUBT: Final = 0.1  # by how much more often another alignment has to find the labels to be worth a word
COMPRESSION: Final = "compression_config.yaml"
_COMPRESSION_BYTES: Final = 1 << 16
_ALWAYS: Final = ("folder", "out", "from_")
_OF_ALL: Final = ("teacher", "tokenizer", "vocab_size", "seq_len", "sequences_per_shard", "mass_tolerance")
_OF: Final[dict[str, tuple[str, ...]]] = {
    "stillroom": (),
    "topk": (
        *_OF_ALL, "alignment", "tokens_column", "ids_column", "logprobs_column", "values", "normaliser_column",
        "sequence_column",
    ),
    "distillkit": (*_OF_ALL, "compression_config"),
    "axolotl": (*_OF_ALL, "alignment", "tokens_column", "logprobs_column"),
}  # fmt: skip
_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "stillroom": (),
    "topk": ("teacher", "tokenizer", "alignment", "tokens_column", "ids_column", "logprobs_column"),
    "distillkit": ("teacher", "tokenizer"),
    "axolotl": ("teacher", "tokenizer", "alignment"),
}


class ImportConfig(BaseModel):
    """Settings of `stillroom import`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path = Field(description="what `stillroom export` wrote; with --from, a file or folder of that tool")
    out: Path = Field(description="directory of the cache: new, or of the same import to go on with it")
    from_: Literal["stillroom", "topk", "distillkit", "axolotl"] = Field(
        "stillroom",
        description="who wrote it: an export of ours, plain top-k columns, DistillKit's capture, axolotl's data",
    )
    teacher: str | None = Field(None, description="name of the teacher, as far as you know it; it can not be verified")
    tokenizer: str | None = Field(None, description="folder or hub id of the tokenizer whose ids these are")
    alignment: Literal["next-token", "this-token"] | None = Field(
        None,
        description="what list t tells: of what follows token t, or of token t itself (prompt_logprobs: the first is empty)",
    )
    tokens_column: str | None = Field(None, description="column of the token ids of a sequence")
    ids_column: str | None = Field(None, description="column of the lists of kept ids")
    logprobs_column: str | None = Field(None, description="column of the lists of their values")
    values: Literal["ln", "log2", "log10", "probability", "logit"] | None = Field(
        None, description="what the values are (default: ln, log-probabilities in nats)"
    )
    normaliser_column: str | None = Field(
        None, description="column of log-sum-exps over the vocabulary, for --values logit"
    )
    sequence_column: str | None = Field(None, description="a row is one token, and this column names its sequence")
    compression_config: Path | None = Field(
        None, description=f"configuration of DistillKit's compression (default: {COMPRESSION} in the folder)"
    )
    vocab_size: int | None = Field(
        None, ge=2, description="of the teacher, where it has more ids than the tokenizer (default: as many)"
    )
    seq_len: int | None = Field(None, ge=1, description="rows kept of a sequence (default: those of the longest)")
    sequences_per_shard: int | None = Field(None, ge=1, description="sequences in a shard (default: about 65,536 rows)")
    mass_tolerance: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="how far rounding may take a row's mass above 1 (default: 0.001, distillkit: 0.25)",
    )


def import_(config: ImportConfig, as_json: bool) -> ImportResult | ForeignResult:
    """`stillroom import`."""
    _check(config)
    return _own(config, as_json) if config.from_ == "stillroom" else _foreign(config, as_json)


def _check(config: ImportConfig) -> None:
    for name in ImportConfig.model_fields:
        given = name not in _ALWAYS and getattr(config, name) is not None
        flag = "--" + name.replace("_", "-")
        if given and name not in _OF[config.from_]:
            users = " or ".join(f"--from {kind}" for kind, names in _OF.items() if name in names)
            raise InputError(f"{flag} is for {users}, and this is --from {config.from_}: drop it")
        if not given and name in _NEEDED[config.from_]:
            description = ImportConfig.model_fields[name].description
            raise InputError(f"{flag} is missing ({description}): --from {config.from_} can not do without it")


def _own(config: ImportConfig, as_json: bool) -> ImportResult:
    from stillroom.storage.interchange.reading import import_cache

    with Reporter() as report:
        result = import_cache(config.folder, config.out, on_progress=lambda done, total: report("import", done, total))
    made = result.shards - result.shards_before
    if result.already_done:
        say(f"cache {result.out} is complete ({result.shards} shards): nothing to do")
    elif result.identical < made:
        say(f"{made - result.identical} shards hold the same codes in other bytes: another version of the compressor")
    if not as_json:
        pairs = [
            ("shards", f"{result.shards} ({result.shards_before} were there)"),
            ("byte for byte the same", f"{result.identical} of {made}"),
            ("sequences", f"{result.sequences:,}"),
            ("rows", f"{result.rows:,}"),
            ("seconds", f"{result.seconds:.1f}"),
        ]
        show_pairs(f"cache {result.out}", pairs)
    return result


def _foreign(config: ImportConfig, as_json: bool) -> ForeignResult:
    from stillroom.pipeline.teacher_load import load_tokenizer
    from stillroom.storage.interchange.foreign.came import Rules
    from stillroom.storage.interchange.foreign.importing import import_foreign

    reader, tolerance = _reader(config)
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    origin = _origin(config, tokenizer)
    rules = Rules(
        alignment=config.alignment or "next-token",  # DistillKit's capture knows no other
        vocab_size=origin.vocab_size,
        token_ids=max(origin.vocab_size, len(tokenizer)),
        mass_tolerance=tolerance if config.mass_tolerance is None else config.mass_tolerance,
    )

    def add_tokenizer(writer: CacheWriter) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            writer.add_folder("tokenizer", Path(folder))

    with Reporter() as report:
        result = import_foreign(
            config.folder, config.out, reader, rules, origin, _rounding, add_tokenizer=add_tokenizer, on_progress=report
        )
    if result.already_done:
        say(f"cache {result.out} is complete ({result.shards} shards): nothing to do")
    for note in notes(result):
        say(note)
    if not as_json:
        _show(result)
    return result


def _reader(config: ImportConfig) -> tuple[Reader, float]:
    """The reader of a format, and how far above 1 the mass of its rows may be where nothing is said."""
    if config.from_ == "topk":
        from stillroom.storage.interchange.foreign.topk import TopK

        assert config.tokens_column is not None
        assert config.ids_column is not None
        assert config.logprobs_column is not None
        columns: dict[str, Any] = {"normaliser": config.normaliser_column, "sequence": config.sequence_column}
        names = {"tokens": config.tokens_column, "ids": config.ids_column, "values_column": config.logprobs_column}
        return TopK(**names, values=config.values or "ln", **columns), 1e-3
    if config.from_ == "axolotl":
        from stillroom.storage.interchange.foreign.axolotl import Axolotl

        return Axolotl(
            tokens=config.tokens_column or "input_ids", values_column=config.logprobs_column or "logprobs"
        ), 1e-3
    from stillroom.storage.interchange.foreign.distillkit import MASS_TOLERANCE, Compression, DistillKit

    folder = config.folder if config.folder.is_dir() else config.folder.parent
    path = config.compression_config or folder / COMPRESSION
    return DistillKit(Compression.of(_read_yaml(path), str(path))), MASS_TOLERANCE


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(_COMPRESSION_BYTES + 1)
        values = yaml.safe_load(text) if len(text) <= _COMPRESSION_BYTES else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} can not be read ({str(error).splitlines()[0]}), and the files alone do not say how they are packed: name "
            "the capture's own with --compression-config"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no `key: value` lines: name the capture's own with --compression-config")
    return values


def _origin(config: ImportConfig, tokenizer: Any) -> Origin:
    from stillroom.pipeline.packing import tokenizer_fingerprint
    from stillroom.pipeline.prepare import LIBRARIES
    from stillroom.storage.interchange.foreign.importing import Origin
    from stillroom.storage.manifest import TokenizerInfo

    assert config.teacher is not None
    vocab_size = config.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise InputError(
            f"vocab_size came as {vocab_size}, the tokenizer has {len(tokenizer)} ids: give the teacher's, as many or more"
        )
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Origin(
        format=config.from_,
        teacher=config.teacher,
        tokenizer=TokenizerInfo(fingerprint=tokenizer_fingerprint(tokenizer), vocab_size=len(tokenizer)),
        vocab_size=vocab_size,
        pad_id=next(number for number in ids if number is not None),
        seq_len=config.seq_len,
        sequences_per_shard=config.sequences_per_shard,
        libraries={name: version(name) for name in LIBRARIES},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _rounding(sequences_S: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.float64]:
    """As stage one draws them, with seed 0: nothing else of an import is random."""
    import torch

    from stillroom.kernels.sample import STREAM_ROUNDING, uniforms

    sequence_R, row_R = torch.from_numpy(np.repeat(sequences_S, rows)), torch.arange(rows).repeat(len(sequences_S))
    found: npt.NDArray[np.float64] = uniforms(0, sequence_R, row_R, stream=STREAM_ROUNDING, count=3).numpy()
    return found


def notes(result: ForeignResult) -> list[str]:
    """What the user should read before a student does."""
    mass = f"these targets hold a mean mass of {result.kept_mass:.4f} of the teacher's"
    if result.kept_mass >= WHOLE:
        mass += ", so the tool that wrote them scaled them to sum to 1: what they lack can not be known any more"
    found = [
        f"{mass}; train needs --missing truncate, renormalise_teacher, renormalise_both or tail_bucket (docs/losses.md)"
    ]
    if result.scaled:
        found.append(
            f"{result.scaled:,} of {result.targets:,} targets held more than 1 (up to {result.most_mass:.4f}) and were scaled "
            "to it"
        )
    earlier, later = result.labels_known_shifted
    for rate, where in ((earlier, "one token earlier"), (later, "one token later")):
        if rate > result.labels_known + DOUBT:
            found.append(
                f"targets hold their label in {result.labels_known:.1%} of the rows, but in {rate:.1%} the token {where}: the "
                "alignment looks wrong"
            )
    return found


def _show(result: ForeignResult) -> None:
    show_pairs(
        f"cache {result.out}",
        [
            ("teacher", f"{result.fingerprint[:21]} (of the files: no model can be held against it)"),
            ("shards", f"{result.shards} ({result.shards_before} were there)"),
            ("sequences", f"{result.sequences:,}"),
            ("rows", f"{result.rows:,}, {result.targets:,} with targets"),
            ("entries per target", f"{result.entries_per_target:.2f}, at most {result.draws}"),
            ("mean mass", f"{result.kept_mass:.4f}"),
            ("labels among the entries", f"{result.labels_known:.2%}"),
            ("left out", f"{result.zeros:,} entries of probability 0, {result.rows_cut:,} rows beyond --seq-len, "
                         f"{result.lists_last:,} lists about what follows the last token"),
            ("seconds", f"{result.seconds:.1f}"),
        ],
    )  # fmt: skip
