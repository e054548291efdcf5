"""Where lines are not to be counted, nothing looks at them: of a whole run that would be a quarter of the time.

Tells under `make test`, which counts and has workers; without that it always holds.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.mark.no_cover
def test_neither_the_test_nor_its_threads_are_traced() -> None:
    assert (sys.gettrace(), threading.gettrace()) == (None, None)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(sys.gettrace).result() is None
