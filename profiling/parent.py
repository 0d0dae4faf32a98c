"""Worker processes that do not outlive who started them."""

from __future__ import annotations

import os
import threading
import time

__all__ = ["end_with_parent"]

_WATCH_INTERVAL_S = 1.0


def end_with_parent() -> None:
    """End this process when its parent is gone, even if that was killed outright."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
