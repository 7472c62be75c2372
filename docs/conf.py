"""The site that `make docs` builds from Markdown pages that also read well in a repository. Needs no network."""

import re
from importlib.metadata import version as version_of

from apo_trl.training.console import quiet_libraries

quiet_libraries()  # autodoc imports TRL

project = "apo-trl"
version = release = version_of("apo-trl")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "text"  # of indented blocks, which are commands and formulas
myst_heading_anchors = 3  # `losses.md#beta`, as in a repository

html_theme = "furo"
html_title = f"apo-trl {release}"
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Docstrings are written in one style for readers of the code: single backticks are code.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"

# Every reference to this package must resolve; torch, TRL and the rest have their own sites.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!apo_trl\.).*")]


def _link_files(app, name, source):
    """Make downloads of links to files outside the pages, those ending in `.md` too."""
    source[0] = re.sub(r"\]\((?=\.\./)", "](path:", source[0])


def setup(app):
    app.connect("source-read", _link_files)
