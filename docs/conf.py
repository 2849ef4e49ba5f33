# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Sphinx, as ``make docs`` runs it: guides in Markdown, the API from docstrings."""

import torchrl_vecnorm

project = "torchrl_vecnorm"
author = "the torchrl_vecnorm authors"
copyright = "the torchrl_vecnorm authors"
release = version = torchrl_vecnorm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"torchrl_vecnorm {release}"
html_copy_source = False
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
# The docstring of a named tuple has its fields.
napoleon_use_ivar = True


def setup(app) -> None:
    """Leaves out what autodoc says of the fields of named tuples."""

    def skip(app, what, name, value, is_skipped, options) -> bool | None:
        return True if type(value).__name__ == "_tuplegetter" else None

    app.connect("autodoc-skip-member", skip)
