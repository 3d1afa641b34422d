"""Sphinx configuration: `make docs` builds the documentation.

The source folder is the root of the repository, so that links between Markdown files and to images are the same on the
site and in the repository. The README is the front page.
"""

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import focal_hf

try:
    import focal_hf.torchvision_focal
except ImportError:
    # Without torchvision, stubs replace the classes that the module imports, so that it can be documented.
    pyramid = ModuleType("torchvision.ops.feature_pyramid_network")
    for name in ("ExtraFPNBlock", "FeaturePyramidNetwork", "LastLevelMaxPool"):
        setattr(pyramid, name, type(name, (), {}))
    sys.modules[pyramid.__name__] = pyramid
    import focal_hf.torchvision_focal

    del sys.modules[pyramid.__name__]

project = "focal_hf"
author = "the authors of focal_hf"
version = release = focal_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "*/README.md"]
exclude_patterns = [".*", "build", "dist", "docs/_build", "quickstart", "src", "tests"]  # not searched for pages

html_theme = "furo"
html_title = f"focal_hf {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
highlight_language = "none"  # for code blocks without a language
myst_heading_anchors = 4  # anchors for headings, as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings contain the types
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
# References in docstrings to names that transformers documents.
nitpick_ignore = [("py:obj", "PreTrainedModel"), ("py:obj", "FocalBackbone.from_pretrained")]

# All pages, in the order of the site's menu.
CONTENTS = """
```{toctree}
:hidden:
:caption: Guide

Start <self>
docs/model
docs/weights
docs/swin
docs/tools
docs/deploying
examples/README
docs/visualization
```

```{toctree}
:hidden:
:caption: Detection and segmentation

docs/heads
docs/segmentation
docs/detection
docs/torchvision
```

```{toctree}
:hidden:
:caption: Reference

benchmarks/README
docs/versions
docs/layout
docs/api
CONTRIBUTING
CHANGELOG
```
"""


def add_contents(app, docname, source):
    """Appends the contents to the README. In the README itself, GitHub would show them as code."""
    if docname == root_doc:
        source[0] += CONTENTS


def to_restructured_text(app, what, name, obj, options, lines):
    """Converts the Markdown in docstrings, which follow transformers' style, to reStructuredText.

    Sections ("Args:") and their arguments need no conversion: Sphinx reads them as nested definition lists.
    """
    text = "\n".join(lines)
    # Fenced code blocks.
    text = re.sub(
        r"^( *)```python\n(.*?)^ *```",
        lambda block: f"{block[1]}.. code-block:: python\n\n" + re.sub(r"^(?=.)", "    ", block[2], flags=re.M),
        text,
        flags=re.M | re.S,
    )
    # Names of arguments, alone or several with one type, with or without the type.
    text = re.sub(r"(^ +|(?<=\), ))((?:\w+, )*\w+)(?=:$| \(\[?`)", r"\1**\2**", text, flags=re.M)
    text = re.sub(r"^( +)(\w+Error): (.*)$", r"\1**\2**:\n\1    \3", text, flags=re.M)
    # Indented code blocks after a colon.
    text = re.sub(r"^( *)(\S.*[^:]):\n\n(?=\1 {4})", r"\1\2::\n\n", text, flags=re.M)

    def inline(match):
        if match["reference"]:
            return f":py:obj:`~.{match['reference']}`"
        return f"`{match['text']} <{match['url']}>`__" if match["url"] else f"``{match['code']}``"

    text = re.sub(
        r"\[`(?P<reference>[\w.]+)`\]|\[(?P<text>[^]`]+)\]\((?P<url>https:[^)]+)\)|`(?P<code>[^`\n]+)`", inline, text
    )
    lines[:] = text.split("\n")


def make_index(app, error):
    if not error:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", to_restructured_text)
    app.connect("build-finished", make_index)
