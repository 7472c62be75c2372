"""Build preference pairs: CLAIR revisions and judged pairs, without torch or TRL."""

from importlib.util import find_spec

from apo_trl.errors import InputError

__all__ = ["check_installed"]


def check_installed() -> None:
    """Raise InputError if packages of the extra `pairs` are missing."""
    names = ("openai", "aiohttp", "httpx2", "pydantic", "regex", "rapidfuzz", "py3langid", "rich")
    if missing := [name for name in names if find_spec(name) is None]:
        raise InputError(f"Building pairs needs {', '.join(missing)}: run `pip install 'apo-trl[pairs]'`.")
