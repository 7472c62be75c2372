"""Build preference pairs: CLAIR revisions and judged pairs. Knows neither torch nor TRL.

A recipe (`settings`) and its prompts (`records`) go through one of five methods (`methods`), which are functions of the
models they may ask. What a model answered is stored as it came (`store`) and read anew in every run (`parsing`,
`gates`), so that a changed limit costs nothing and a changed template only what it changed.
"""

from importlib.util import find_spec

from apo_trl.errors import InputError

__all__ = ["check_installed"]


def check_installed() -> None:
    """Raise InputError where the packages of the extra `pairs` are not there."""
    missing = [name for name in ("openai", "aiohttp", "rapidfuzz", "py3langid") if find_spec(name) is None]
    if missing:
        raise InputError(f"Building pairs needs {', '.join(missing)}: run `pip install 'apo-trl[pairs]'`.")
