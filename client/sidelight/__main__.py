"""The command `sidelight`."""

import sys


def main() -> None:
    """Run the command line. Exits with 2 where rich or typer is not installed."""
    try:
        from ._cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        print(f"sidelight needs {error.name}: pip install 'sidelight[cli]'", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
