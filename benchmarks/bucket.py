"""The S3 server of the tests in a process of its own: says what a client needs in its environment to use it.

python -m benchmarks.bucket
"""

import json
import os
import sys

from tests.s3_server import NOBODY, S3Server

if __name__ == "__main__":
    os.environ.update(NOBODY)
    with S3Server() as server:
        print(json.dumps(NOBODY | server.env), flush=True)
        sys.stdin.read()
