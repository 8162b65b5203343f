"""Patterns: the names that a user's settings pick out of a model."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatch

from optpipe.errors import StageError


def matching(names: Iterable[str], patterns: Iterable[str], setting: str, what: str = "module") -> list[str]:
    """Those of `names` that `patterns` match, in order.

    Raises StageError, with the nearest names, for a pattern of `setting` that matches none.
    """
    known = list(dict.fromkeys(name for name in names if name))
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            near = get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.4) or known[:3]
            raise StageError(
                f"{setting} names '{pattern}', which matches no {what} of this model; the nearest names are {near}"
            )
    return [name for name in known if any(fnmatch(name, pattern) for pattern in patterns)]
