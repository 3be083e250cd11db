"""Everything Stillroom raises on purpose. One sentence each: what came, what was wanted, what to do.

StillroomError
├── InputError (ValueError)               a source, option or model that cannot be used
└── CacheError
    ├── NotACacheError (FileNotFoundError)    the directory holds no manifest
    ├── FormatError (ValueError)              a manifest or shard this version cannot read
    ├── PlanMismatchError (ValueError)        the directory belongs to another run
    └── DamagedError (OSError)                bytes that are missing, cut or changed

The command line prints the sentence and leaves with status 2; anything else that escapes is a bug.
"""


class StillroomError(Exception):
    """Root of the tree: catch this to catch every error Stillroom raises on purpose."""


class InputError(StillroomError, ValueError):
    """A source, option, teacher or student that cannot be used as asked."""


class CacheError(StillroomError):
    """Something about a cache directory."""


class NotACacheError(CacheError, FileNotFoundError):
    """The directory holds no cache manifest."""


class FormatError(CacheError, ValueError):
    """A manifest or shard that this version cannot read: newer, foreign or malformed."""


class PlanMismatchError(CacheError, ValueError):
    """The directory already belongs to a run with another teacher, tokenizer, corpus, packing or sampler."""


class DamagedError(CacheError, OSError):
    """Bytes of a cache are missing, cut short or changed.

    Attributes:
        what: the damage alone, where the message also names the shard and the remedy.
    """

    what: str = ""
