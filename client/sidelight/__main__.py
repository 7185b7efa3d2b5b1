"""The command `sidelight`."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from ._cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit("sidelight: the command line needs rich and typer: pip install 'sidelight[cli]'")
    app()


if __name__ == "__main__":
    main()
