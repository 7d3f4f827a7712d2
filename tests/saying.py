"""Says a text from plain code, in a process of its own that is to be interrupted.

python -m tests.saying TEXT SAVE_TO
"""

import signal
import sys

from prefect_nanogpt.sync import text_to_speech

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    text_to_speech(sys.argv[1], save_to=sys.argv[2])
