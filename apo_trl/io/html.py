"""HTML pages from Jinja templates."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

__all__ = ["render"]


def render(template: Path, **values: Any) -> str:
    """Return the page of a template, with `values` escaped, and the version of this package as `version`."""
    loader = FileSystemLoader(template.parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template(template.name).render(values, version=version("apo-trl"))
    # HTML allows neither most control characters nor half of a surrogate pair.
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", html)
