"""``python -m lowp``: the command line."""

from lowp.cli import main

if __name__ == "__main__":
    main()
