"""`python -m zimage` and the script `zimage`: the command, imported where an interrupt is caught already."""

import os
import signal
import sys
from contextlib import suppress

_CANCELLED = 130
"""As the commands have it, which are not imported yet."""


def main() -> None:
    """Run the command line and exit; one that is interrupted, however early, ends with one line and 130."""
    try:
        from .cli import main as command

        return command()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("zimage: cancelled", file=sys.stderr, flush=True)
    except SystemExit as ended:
        if ended.code != _CANCELLED:
            raise
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or nobody reads it any more
            stream.flush()
    # Not by sys.exit: an interrupt within `exec`, as of a dataclass, has Python end by the signal though it was caught.
    os._exit(_CANCELLED)


if __name__ == "__main__":
    main()
