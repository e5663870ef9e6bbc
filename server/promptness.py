"""Keep garbage collection out of the event loop's way.

Python looks for cycles of garbage among all objects that are old, and nothing is read or answered
meanwhile. Those that a start made are most of them, and stay.
"""

import gc


def forget_the_start() -> None:
    """Let no later collection look at the objects that there are now."""
    gc.collect()
    gc.freeze()
