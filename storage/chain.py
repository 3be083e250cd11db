"""Where the text of a cache breaks off between two shards, and which of them is at fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stillroom.storage.commits import load_record, record_name
from stillroom.storage.inspect_files import Finding, file_hash, redo
from stillroom.storage.layout import arrays_of
from stillroom.storage.manifest import Manifest

Edges = dict[int, tuple[int, int]]


def breaks(root: Path, manifest: Manifest, edges: Edges) -> Iterator[Finding]:
    """A finding for every seam that does not fit, about the shard at fault if that can be told.

    A shard that fits its other neighbour is right; where neither or both do, the hashes of their tokens decide.

    Args:
        root: directory of the cache.
        manifest: of the cache.
        edges: first and last token of every shard that is sound otherwise.
    """
    fits = {index: edges[index][1] == edges[index + 1][0] for index in edges if index + 1 in edges}
    for index in (index for index, fit in fits.items() if not fit):
        pair = (index, index + 1)
        blamed = [shard for shard, other in ((pair[0], index - 1), (pair[1], index + 1)) if not fits.get(other, False)]
        if len(blamed) != 1:
            blamed = [shard for shard in pair if not _tokens_are_as_written(root, manifest, shard)]
        what = f"shard {pair[1]} does not start with the last token of shard {pair[0]}"
        for shard in blamed:
            yield Finding(shard=shard, kind="chain", what=what, remedy=redo(shard))
        if not blamed:
            remedy = (
                f"both are as they were written, from different texts: delete {record_name(pair[0])} and "
                f"{record_name(pair[1])} and run `stillroom cache` again"
            )
            yield Finding(shard=pair[1], kind="chain", what=what, remedy=remedy, recompute=False)


def _tokens_are_as_written(root: Path, manifest: Manifest, index: int) -> bool:
    record = load_record(root, manifest, index)
    name = next(array.object_name for array in arrays_of(manifest) if array.name == "tokens")
    written = next(item.sha256 for item in record.objects if item.name == name)
    return file_hash(root / record.path / name) == written
