"""Builds the documentation: `make docs`. The README is its front page.

The pages are the project's Markdown files where they lie, so that links between them, and from them to images, are the
same here as in a browser of the repository. The source folder is therefore the project's.
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
    # Without torchvision that module is documented on stand-ins for what it imports.
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
include_patterns = ["README.md", "docs/*.md", "examples/README.md", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "dist", "docs/_build", "quickstart", "src", "tests"]  # not looked through at all

html_theme = "furo"
html_title = f"focal_hf {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
highlight_language = "none"  # of blocks that name none
myst_heading_anchors = 4  # as repositories' browsers have them

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have them
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
# What docstrings refer to that is transformers' own.
nitpick_ignore = [("py:obj", "PreTrainedModel"), ("py:obj", "FocalBackbone.from_pretrained")]

# Which pages there are, in the order of the site's menu.
CONTENTS = """
```{toctree}
:hidden:
:caption: Guide

Start <self>
docs/model
docs/weights
docs/tools
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
docs/layout
docs/api
```
"""


def add_contents(app, docname, source):
    """Not in the README itself, where a browser of the repository would show it as code."""
    if docname == root_doc:
        source[0] += CONTENTS


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are written as in transformers: what is Markdown in them becomes what Sphinx understands.

    Sections ("Args:") and the arguments in them already are: definition lists, one in the other.
    """
    text = "\n".join(lines)
    # Code blocks: fenced, and indented behind a colon.
    text = re.sub(
        r"^( *)```python\n(.*?)^ *```",
        lambda block: f"{block[1]}.. code-block:: python\n\n" + re.sub(r"^(?=.)", "    ", block[2], flags=re.M),
        text,
        flags=re.M | re.S,
    )
    # The names of arguments, of one or several together, before their types or without any.
    text = re.sub(r"(^ +|(?<=\), ))((?:\w+, )*\w+)(?=:$| \(\[?`)", r"\1**\2**", text, flags=re.M)
    text = re.sub(r"^( +)(\w+Error): (.*)$", r"\1**\2**:\n\1    \3", text, flags=re.M)
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
