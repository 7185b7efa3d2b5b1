"""The command `sidelight-server`."""

import asyncio
import gc
import logging
import os
import sys

from . import missing_package
from .app.health.health_check import check_health, is_health_check
from .app.openmp import limit_spinning
from .errors import ConfigurationError
from .telemetry.logs import Event, configure

INTERRUPTED = 128 + 2  # the exit code of shells for SIGINT

log = logging.getLogger("sidelight")


def main() -> int:
    """Serve until a signal. Return 0, or 2 after printing the error if the server cannot start.

    With `--check` it runs a health check instead: see `check_health`.
    """
    if missing := missing_package():
        print(f"sidelight-server needs {missing}: pip install 'sidelight[server]'", file=sys.stderr)
        return 2
    if is_health_check(sys.argv[1:]):
        return check_health(sys.argv[1:])
    from .config.reading import misspelt_variables, read_settings

    configure()
    settings = None
    sys.path.insert(0, "")  # as `python -m` does, find the operator's factories in the working directory
    try:
        settings = read_settings(sys.argv[1:])
        configure(settings.log_format)
        if not settings.dedicated_cpus:
            limit_spinning()
        gc.disable()  # importing torch makes so many objects that collections take an eighth of the time
        from .app.process import load, serve_until_signal

        # torch's objects are permanent; collecting them would pause all threads for 0.3 to 0.6 s each time.
        gc.freeze()
        gc.enable()
        for warning in misspelt_variables():
            log.warning(Event("setting_ignored", message=warning))
        if not asyncio.run(serve_until_signal(load(settings))):
            logging.shutdown()
            sys.stderr.flush()
            os._exit(0)  # a normal exit could crash while a thread runs native code
    except ConfigurationError as error:
        line = " ".join(str(error).split())  # messages of factories and torch may have several lines
        if settings and settings.log_format == "json":
            log.critical(Event("cannot_start", message=line))
        else:
            print(f"sidelight-server: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
