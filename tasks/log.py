"""The log of a run, without what Prefect says of each of our steps: the flows say what came of them."""

import logging
from typing import Final

__all__ = ["is_news"]

STEPS: Final = frozenset({"get-tts-status", "join-audio", "save-audio", "say", "submit-tts"})


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is more than that one of our tasks has ended well, as each poll of a wait does.

    The level of Prefect's logger of task runs would say the same of the tasks of others.
    """
    is_of_ours = getattr(record, "task_name", None) in STEPS and record.levelno == logging.INFO
    return not (is_of_ours and record.getMessage() == "Finished in state Completed()")
