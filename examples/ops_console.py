"""An operator's console for the breakers of a running process, with a demo behind it.

    python examples/ops_console.py

shows the demo on http://127.0.0.1:8300/ . The console itself is a module,
`pybreaker_extras.console`; its documentation says how a program shows its breakers.
"""

import sys
from pathlib import Path

try:
    from pybreaker_extras.console import Console, main, serve
except ImportError:  # not installed: use the package in the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from pybreaker_extras.console import Console, main, serve

__all__ = ("Console", "main", "serve")

if __name__ == "__main__":
    main()
