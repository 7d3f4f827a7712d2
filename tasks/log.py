"""The log of a run, without what Prefect says of each of our steps: the flows say what came of them."""

import logging
from typing import Final

__all__ = ["is_news"]

STEPS: Final = frozenset({"get-tts-status", "join-audio", "save-audio", "say", "submit-tts"})


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is more than that one of our tasks has ended well, or the first of two about a failure.

    The level of Prefect's logger of task runs would say the same of the tasks of others.
    """
    if getattr(record, "task_name", None) not in STEPS:
        return True
    said = record.getMessage()
    return said != "Finished in state Completed()" and not said.startswith("Task run failed with state: ")
