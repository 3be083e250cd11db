"""Asking again: exponential backoff with full jitter, for what may pass; what will not pass is raised at once."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from stillroom.storage.errors import StillroomError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Answers that stay the same however often one asks. The names are of libraries that need not be installed.
_LASTING: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_LASTING_NAMES: Final = frozenset(
    {
        "NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "NotSupportedError", "InvalidPathError",
        "UnknownConfigurationKeyError", "NoCredentialsError", "RepositoryNotFoundError", "RevisionNotFoundError",
        "GatedRepoError", "EntryNotFoundError",
    }
)  # fmt: skip
_OUR_MISTAKE: Final = (TypeError, AttributeError, AssertionError, ImportError)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is made, and how long to wait in between.

    Attributes:
        attempts: requests in all.
        base_s: longest wait before the second request; it doubles with every further one.
        top_s: no wait is longer.
    """

    attempts: int = 7
    base_s: float = 0.5
    top_s: float = 20.0

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after failure number `attempt` (from 0): uniform, so that clients do not come back together."""
        return random.uniform(0.0, min(self.top_s, self.base_s * 2.0**attempt))


DEFAULT_RETRY: Final = RetryPolicy()


def lasting(error: Exception) -> bool:
    """Whether the same request would fail the same way."""
    if isinstance(error, _OUR_MISTAKE + _LASTING + (StillroomError,)):  # ours are conclusions
        return True
    return any(kind.__name__ in _LASTING_NAMES for kind in type(error).__mro__)


def with_retries(call: Callable[[], T], *, policy: RetryPolicy, what: str) -> T:
    """`call()`, again after an error that may pass; the last error is raised as it is.

    Args:
        call: the request.
        policy: how often.
        what: names it in the log (no credentials).
    """
    for attempt in range(policy.attempts):
        try:
            return call()
        except Exception as error:
            if lasting(error) or attempt == policy.attempts - 1:
                raise
            wait_s = policy.wait_s(attempt)
            logger.info("%s failed (%s), again in %.1f s", what, type(error).__name__, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")
