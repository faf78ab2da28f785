"""`python -m baton`, for where the `baton` command is not in the path."""

from baton.cli.main import main

if __name__ == "__main__":
    main()
