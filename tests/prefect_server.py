"""A Prefect server that cannot stand still while it collects garbage.

Python collects garbage in whichever thread allocates, which in a server is mostly the thread of its event loop. Cursors
that SQLite has refused something are garbage, and to free one takes the lock of its connection. A connection that waits
in its own thread until it may write holds that lock for up to 60 s, and whoever it waits for cannot commit without the
loop. Seen with Prefect 3.9.1 where ten threads start runs at once: requests failed with HTTP 503, "database is locked".

python prefect_server.py uvicorn ARGUMENTS, or prefect server start
"""

import gc
import runpy
import sys
import threading
import time
from itertools import count

COLLECT_SECONDS = 1.0
ALL_OF_IT = 60
"""Every so many times what is old is looked at too, which takes a while."""


def collect() -> None:
    """Collect garbage in a thread for which nobody waits."""
    for times in count(1):
        time.sleep(COLLECT_SECONDS)
        gc.collect(2 if times % ALL_OF_IT == 0 else 1)


if __name__ == "__main__":
    gc.disable()
    threading.Thread(target=collect, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
