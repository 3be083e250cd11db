"""`stillroom inspect CACHE --watch`: how a run goes, on all its machines, until the cache is complete."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from stillroom.console import err, say

if TYPE_CHECKING:
    from stillroom.storage.progress import Seen


def watch(cache: str, every_s: float, as_json: bool) -> Seen:
    """Show a line every `every_s` seconds (on a terminal the same one), or a JSON object a line; return the last.

    Args:
        cache: directory or URL.
        every_s: seconds between looks.
        as_json: print each but the last look as JSON on standard output; the last is the command's result.

    Raises:
        NotACacheError: there is no manifest.
        CacheError: a store that keeps failing.
    """
    from dataclasses import asdict

    from stillroom.storage.depot import depot_at, path_or_url
    from stillroom.storage.progress import Watch

    watching = Watch(depot_at(path_or_url(cache)))
    while not (seen := watching.look()).complete:
        if as_json:
            print(json.dumps(asdict(seen)), flush=True)
        elif err.is_terminal:
            err.print(f"\r\x1b[K{seen}", end="", soft_wrap=True, markup=False)
        else:
            say(str(seen))
        time.sleep(every_s)
    if err.is_terminal and not as_json:
        err.print("\r\x1b[K", end="")
    say(f"cache {cache} is complete: {seen}")
    return seen
