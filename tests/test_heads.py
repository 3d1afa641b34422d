"""Heads of transformers on a Focal backbone, as docs/heads.md has them."""

import re

import pytest
import transformers

from heads import HEADS, committed_table, failure, installed_heads, table


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_works_with_swin_works_with_focal(name):
    if name not in installed_heads():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert failure(name, "Focal") is None or failure(name, "Swin") is not None, failure(name, "Focal")


def test_the_documented_table():
    version = re.search(r"transformers (\S+)", committed_table())[1]
    if transformers.__version__ != version:
        pytest.skip(f"the table was made with transformers {version}, this is {transformers.__version__}")
    assert table() == committed_table(), "make it again with `python tests/heads.py --write`"
