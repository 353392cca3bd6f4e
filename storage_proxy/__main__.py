"""`python -m storage_proxy` is the `mooring` command."""

from .cli import main

if __name__ == "__main__":
    main()
