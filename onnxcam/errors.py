"""The one error a person sees: what is wrong with what they gave, and what to do about it."""

import difflib
from collections.abc import Iterable


class OnnxcamError(ValueError):
    """Bad input. The message is one line for a person; the command line prints it and exits with 2."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'a' or 'b'?)`` with the names nearest to `name`, or an empty string."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    lowered = name.lower()
    near += [k for k in known if lowered and lowered in k.lower() and k not in near][: 3 - len(near)]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
