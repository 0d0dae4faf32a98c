"""``python -m meshwright.cli``: the same as ``meshwright``."""

from __future__ import annotations

import sys

from meshwright.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
