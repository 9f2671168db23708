"""The command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `epdistill`: errors of the user become one line, never a traceback."""
    from epdistill.cli.output import fail
    from epdistill.disk import trouble
    from epdistill.errors import EpdistillError, InterruptedByUserError

    try:
        try:
            from epdistill.cli.app import app

            app(prog_name="epdistill")
        except KeyboardInterrupt as error:  # before a command took over
            raise InterruptedByUserError from error
        except OSError as error:
            found = trouble(error)
            if found is None:
                raise
            raise found from error
    except EpdistillError as error:
        sys.exit(fail(str(error), error.exit_code))
