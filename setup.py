"""The package's description. Everything else is in setup.cfg.

PyPI shows the README as the description. Relative links work in the repository and on the documentation's site, but not
on PyPI, so they become links to the repository.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def absolute_links(markdown: str, repository: str) -> str:
    def absolute(link: re.Match) -> str:
        prefix, target = link.groups()
        if target.startswith("#"):
            target = f"README.md{target}"
        view = "raw" if target.endswith((".png", ".jpg")) else "blob"
        return f"{prefix}{repository}/{view}/main/{target}"

    return re.sub(r'(\]\(|src=")(?!https?:)([^)"\s]+)', absolute, markdown)


config = ConfigParser()
config.read(ROOT / "setup.cfg", encoding="utf-8")
readme = (ROOT / "README.md").read_text(encoding="utf-8")

setup(
    long_description=absolute_links(readme, config["metadata"]["url"]),
    long_description_content_type="text/markdown",
)
