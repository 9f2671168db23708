"""`python -m epdistill` is `epdistill`."""

from epdistill.cli import main

if __name__ == "__main__":
    main()
