"""A Postgres server with a database for Prefect, where the programs of Postgres are on the machine."""

import os
import pwd
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

# Debian keeps the programs of a server out of the way of the clients'.
PROGRAMS: Final = next(
    (
        path
        for path in [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *map(Path, os.get_exec_path())]
        if (path / "initdb").exists() and (path / "postgres").exists()
    ),
    None,
)
START_SECONDS: Final = 60.0


@contextmanager
def postgres(port: int) -> Iterator[str]:
    """Run a server at a port of the loopback address; give the URL of its database, as Prefect takes it."""
    assert PROGRAMS, "there is no Postgres on this machine"
    # It refuses to run as root, who can become the user that its package made. That user may not look into folders of
    # root's, so its data is in one of its own.
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
    options: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid} if user else {}
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as data:
        if user:
            os.chown(data, user.pw_uid, user.pw_gid)
        options |= {"cwd": data, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([PROGRAMS / "initdb", "-D", data, "--username=prefect", "--auth=trust"], check=True, **options)
        address = ["-h", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen([PROGRAMS / "postgres", "-D", data, "-k", data, *address], **options)
        try:
            create = [PROGRAMS / "createdb", *address, "-U", "prefect", "prefect"]
            deadline = time.monotonic() + START_SECONDS
            while subprocess.run(create, **options).returncode:
                assert time.monotonic() < deadline, "Postgres does not start"
                time.sleep(0.3)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            server.send_signal(signal.SIGINT)  # SIGTERM would wait for its clients to go
            server.wait()
