"""The Python in the pages of the documentation, for the tests that run it."""

from __future__ import annotations

from readme_support import ROOT, blocks_of


def python_blocks(page):
    """The code blocks of a page in docs, in their order."""
    source = (ROOT / "docs" / f"{page}.rst").read_text(encoding="utf-8")
    return [block.text for block in blocks_of(source) if block.kind == "python"]


def files_of(page):
    """Those that begin with the name of a file, by that name."""
    blocks = (block.partition("\n") for block in python_blocks(page))
    return {
        head[2:]: f"{head}\n{text}\n"
        for head, _, text in blocks
        if head.startswith("# ") and head.endswith(".py")
    }
