"""Bodies of the commands that look after a cache on the shelf: `verify`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stillroom.console import Reporter, say, show_pairs
from stillroom.storage.depot import path_or_url

if TYPE_CHECKING:
    from stillroom.storage.interchange.writing import ExportResult
    from stillroom.storage.manifest import Profile
    from stillroom.storage.reencode import ReencodeResult
    from stillroom.storage.verify import VerifyReport

SHOWN: Final = 40  # findings in the table; --json has them all


class VerifyConfig(BaseModel):
    """Settings of `stillroom verify`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cache: Annotated[Path | str, BeforeValidator(path_or_url)] = Field(description="directory of the cache")
    hashes: bool = Field(False, description="also compare every file with the SHA-256 it was written with")
    sample: int | None = Field(None, ge=1, description="decode only so many sequences, evenly spread (default: all)")
    repair: bool = Field(
        False, description="drop the shards that must be computed again, so that the next `cache` redoes just those"
    )


class ExportConfig(BaseModel):
    """Settings of `stillroom export`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cache: Path = Field(description="directory of the cache")
    out: Path = Field(description="folder of the export: new, or of the same export to go on with it")
    to: Literal["parquet", "arrow", "datasets"] = Field("parquet", description="kind of file")
    profile: Literal["standard", "fast", "small"] | None = Field(
        None,
        description="instead of files for other tools, write a cache of this profile: the same targets in other bytes",
    )
    shards_per_file: int | None = Field(
        None, ge=1, description="shards of the cache in one data file (default: about 256 MB)"
    )


def verify(config: VerifyConfig, as_json: bool) -> VerifyReport:
    """`stillroom verify`."""
    from stillroom.storage.verify import verify as check

    with Reporter() as report:
        result = check(
            config.cache,
            hashes=config.hashes,
            sample=config.sample,
            repair=config.repair,
            on_progress=lambda done, total: report("verify", done, total),
        )
    if not as_json:
        _show(config, result)
    return result


def _show(config: VerifyConfig, result: VerifyReport) -> None:
    many = len(result.findings)
    verdict = "sound" if result.sound else f"{many} finding{'s' if many > 1 else ''}"
    pairs = [
        ("verdict", verdict),
        ("shards", f"{result.committed:,} of {result.shards:,} committed"),
        ("rows checked", f"{result.rows:,} ({result.sequences:,} sequences)"),
        ("bytes hashed", f"{result.hashed_bytes:,}" if config.hashes else "none (--hashes)"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    if result.missing:
        runs = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in result.missing[:8]]
        shown = ", ".join(runs) + (" ..." if len(result.missing) > 8 else "")
        many_missing = f"{result.shards - result.committed:,} (shards {shown}): `stillroom cache` makes them"
        pairs.insert(2, ("missing", many_missing))
    if config.repair:
        pairs.append(("dropped", ", ".join(map(str, result.dropped)) or "nothing"))
    show_pairs(f"cache {config.cache}", pairs)
    for finding in result.findings[:SHOWN]:
        place = "cache" if finding.shard is None else f"shard {finding.shard}"
        say(f"{place}: {finding.kind}: {finding.what}; {finding.remedy}")
    if len(result.findings) > SHOWN:
        say(f"and {len(result.findings) - SHOWN} more findings: --json lists them all")
    if result.dropped:
        say(f"dropped {len(result.dropped)} shards: run `stillroom cache` again to make them")


def export(config: ExportConfig, as_json: bool) -> ExportResult | ReencodeResult:
    """`stillroom export`."""
    if config.profile is not None:
        return _reencode(config, config.profile, as_json)
    from stillroom.storage.interchange.writing import export_cache

    with Reporter() as report:
        result = export_cache(
            config.cache,
            config.out,
            to=config.to,
            shards_per_file=config.shards_per_file,
            on_progress=lambda done, total: report("export", done, total),
        )
    if result.already_done:
        say(f"export {result.out} is complete ({result.files} files): nothing to do")
    if not as_json:
        pairs = [
            ("files", f"{result.files} ({result.files_before} were there)"),
            ("sequences", f"{result.sequences:,}"),
            ("rows", f"{result.rows:,}"),
            ("bytes", f"{result.size_bytes:,} ({result.size_bytes / max(result.rows, 1):.2f} per row)"),
            ("seconds", f"{result.seconds:.1f}"),
        ]
        show_pairs(f"export {result.out} ({result.to})", pairs)
    return result


def _reencode(config: ExportConfig, profile: Profile, as_json: bool) -> ReencodeResult:
    from stillroom.storage.reencode import reencode

    with Reporter() as report:
        result = reencode(
            config.cache, config.out, profile, on_progress=lambda done, total: report("export", done, total)
        )
    if result.already_done:
        say(f"cache {result.out} is complete ({result.shards} shards): nothing to do")
    if not as_json:
        pairs = [
            ("shards", f"{result.shards} ({result.shards_before} were there)"),
            ("bytes per row", f"{result.bytes_per_row:.2f} (was {result.source_bytes_per_row:.2f})"),
        ]
        show_pairs(f"cache {result.out} ({result.profile})", pairs)
    return result
