"""Folders of the hub library's cache: `snapshots/REVISION/...`, whose files are links into the `blobs` beside `snapshots`."""

from __future__ import annotations

from pathlib import Path

from stillroom.storage.errors import InputError
from stillroom.storage.manifest import MANIFEST_NAME


def refuse_snapshot(root: Path) -> None:
    """Say what to do with a cache in such a folder.

    A stranger's link could lead anywhere, so readers follow none out of a cache. A URL's objects are copied into a directory
    of our own, whole, and their hashes checked, so it does not matter what they were before.

    Raises:
        InputError: the manifest is such a link.
    """
    link, here = root / MANIFEST_NAME, root.resolve()
    if link.is_symlink() and any(
        folder.parent.name == "snapshots" and link.resolve().parent == folder.parent.parent / "blobs"
        for folder in (here, *here.parents)
    ):
        raise InputError(
            f"{root} is a snapshot of the hub library, whose files are links out of it, and a cache's links are not followed: "
            "open the hf:// URL of the repository, or file:// and this path, which copies what it reads and checks its hashes"
        )
