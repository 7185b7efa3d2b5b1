"""The command `sidelight-server`."""

import asyncio
import logging
import sys

from .config import misspelt_variables, read_settings
from .errors import ConfigurationError
from .server import load, serve_until_signal

INTERRUPTED = 128 + 2  # as a shell says it

log = logging.getLogger("sidelight")


def main() -> int:
    """Serve until a signal. Returns 0, or 2 where the server cannot start, with one line that says why."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="time=%(asctime)s level=%(levelname)s %(message)s"
    )
    sys.path.insert(0, "")  # `python -m` finds the operator's own factories in the working folder, and so does this
    try:
        settings = read_settings(sys.argv[1:])
        for warning in misspelt_variables():
            log.warning('event=setting_ignored message="%s"', warning)
        engine = load(settings)  # outside the loop, where Ctrl-C still ends a factory that takes its time
        asyncio.run(serve_until_signal(engine))
    except ConfigurationError as error:
        line = " ".join(str(error).split())  # what a factory or torch says may have many
        print(f"sidelight-server: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
