"""The Python in the pages of the documentation, for the tests that run it."""

from __future__ import annotations

from readme_support import blocks_of, source_of


def python_blocks(page):
    """The code blocks of a page in docs, in their order."""
    path = f"docs/{page}.rst"
    blocks = blocks_of(source_of(path), path)
    return [block.text for block in blocks if block.kind == "python"]


def files_of(page):
    """The code blocks that begin with the name of a file, by that name."""
    blocks = (block.partition("\n") for block in python_blocks(page))
    return {
        head[2:]: f"{head}\n{text}\n"
        for head, _, text in blocks
        if head.startswith("# ") and head.endswith(".py")
    }
