"""`python -m stepengine` is the `stepengine` command."""

from stepengine.cli import main

if __name__ == "__main__":
    main()
