"""`python -m prefect_nanogpt.sandbox`: run the sandbox until Ctrl-C."""

import sys

import cyclopts

from .server import serve

app = cyclopts.App(name="python -m prefect_nanogpt.sandbox", exit_on_error=False, print_error=False)
app.default(serve)


def main() -> None:
    """Run, and exit: 0, 1 where the sandbox cannot start, 2 for bad usage."""
    try:
        app()
    except (cyclopts.CycloptsError, ValueError) as error:
        print(f"{error} (python -m prefect_nanogpt.sandbox --help)", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"The sandbox cannot start: {error}")


if __name__ == "__main__":
    main()
