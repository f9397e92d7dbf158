"""How Python's garbage collector is set in a router process.

With a thousand streams there are some hundred thousand objects that live as long as their requests. At the usual
thresholds the collector walks the young ones with every 700 that are made, which is a third of the process's time,
and finds nothing: requests end without cycles but for the frames of their errors. So it looks seldom; what it finds
then, at most some tens of MB, has waited for seconds.
"""

from __future__ import annotations

import gc

THRESHOLDS = (50_000, 20, 20)
"""Of objects, of young collections, of middle ones."""


def settle() -> None:
    """Once, when the process has all that lives as long as itself: modules, tokenizer, services."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
