"""`python -m pitstop`: the commands, for launchers that start a module."""

from pitstop.cli import main

if __name__ == "__main__":
    main()
