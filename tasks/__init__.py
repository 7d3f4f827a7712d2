"""One Prefect task per step: submit, poll, save, join, write subtitles; and what can be looked up before and after."""

import logging

from prefect_nanogpt.tasks.audio import save_audio
from prefect_nanogpt.tasks.catalogue import get_balance, list_models, list_voices
from prefect_nanogpt.tasks.estimates import estimate
from prefect_nanogpt.tasks.join import join_audio
from prefect_nanogpt.tasks.log import is_news
from prefect_nanogpt.tasks.statement import read_ledger
from prefect_nanogpt.tasks.status import get_tts_status
from prefect_nanogpt.tasks.submit import submit_tts
from prefect_nanogpt.tasks.subtitles import write_subtitles

__all__ = [
    "estimate",
    "get_balance",
    "get_tts_status",
    "join_audio",
    "list_models",
    "list_voices",
    "read_ledger",
    "save_audio",
    "submit_tts",
    "write_subtitles",
]

logging.getLogger("prefect.task_runs").addFilter(is_news)
