"""Tables and lines in reStructuredText, for both parts of results.rst."""

import os
import platform
import textwrap


def table(head, rows):
    """A simple table in reStructuredText: text to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = "  ".join("=" * width for width in widths)

    def line(cells):
        text = cells[0].ljust(widths[0])
        figures = map(str.rjust, cells[1:], widths[1:])
        return "  ".join([text, *figures]).rstrip()

    return "\n".join([rule, line(head), rule, *map(line, rows), rule])


def machine():
    """The machine and its Python in one line, without names and paths."""
    import pyperf  # here, as the simulation needs no pyperf

    found = pyperf.Run([1.0], collect_metadata=True).get_metadata()
    return (
        f"{platform.python_implementation()} {found['python_version']}, "
        f"{platform.system()}, {found.get('cpu_model_name', platform.machine())}, "
        f"{found.get('cpu_count', os.cpu_count())} cores"
    )


def load():
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def filled(text):
    return textwrap.fill(text, 79)
