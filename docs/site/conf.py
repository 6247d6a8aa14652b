"""The documentation pages: `make docs` writes them to build/docs, from docstrings and the Markdown files beside this."""

import thriftattn

project = "thriftattn"
release = thriftattn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
nitpicky = False
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links into the repository
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "description": "Attention over a 4-bit cache that gives back what 4 bits lose"}
