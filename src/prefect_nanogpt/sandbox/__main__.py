"""`python -m prefect_nanogpt.sandbox`: run the sandbox until Ctrl-C."""

import cyclopts

from .server import serve

app = cyclopts.App(name="python -m prefect_nanogpt.sandbox")
app.default(serve)

if __name__ == "__main__":
    app()
