"""The command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `epdistill`: errors of the user become one line, never a traceback."""
    from epdistill.cli.app import app
    from epdistill.cli.output import fail
    from epdistill.errors import EpdistillError

    try:
        app(prog_name="epdistill", standalone_mode=True)
    except EpdistillError as error:
        sys.exit(fail(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted; what was finished is kept, --resume continues a training", 130))
