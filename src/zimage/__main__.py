"""`python -m zimage` is the `zimage` command."""

from .cli import main

if __name__ == "__main__":
    main()
