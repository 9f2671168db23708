"""The command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> None:
    """Entry point of `epdistill`: errors of the user become one line, never a traceback."""
    from epdistill.cli.output import fail
    from epdistill.disk import trouble
    from epdistill.errors import EpdistillError, InterruptedByUserError

    together = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if together:
        # torch's own remarks, with stack traces, on a process that has gone; ours is one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        try:
            from epdistill.cli.app import app

            app(prog_name="epdistill")
        except SystemExit as end:
            if together:
                from epdistill.launch import leave

                if not end.code:
                    leave()
                _end(end.code)
            raise
        except KeyboardInterrupt as error:  # before a command took over
            raise InterruptedByUserError from error
        except OSError as error:
            found = trouble(error)
            if found is None:
                raise
            raise found from error
    except EpdistillError as error:
        if together:
            from epdistill.launch import speaks

            if speaks():
                fail(str(error), error.exit_code)
            _end(error.exit_code)
        sys.exit(fail(str(error), error.exit_code))


def _end(code: str | int | None) -> NoReturn:
    """End one process of several without the ceremonies of an orderly end.

    They would wait for processes that have failed, and threads that still listen to the
    others have been seen to abort them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))
