"""Where a widget's work runs: a page's message may come in a thread of its own, beside a running cell."""

import threading
from typing import Any


def main_loop() -> Any:
    """The loop of the kernel's own thread; None where this already is that thread, or there is no kernel."""
    from IPython import get_ipython

    if threading.current_thread() is threading.main_thread():
        return None
    return getattr(getattr(get_ipython(), "kernel", None), "io_loop", None)
