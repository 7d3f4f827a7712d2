"""One Prefect task per step: submit a job, look at it, save its audio."""

from prefect_nanogpt.tasks.audio import save_audio
from prefect_nanogpt.tasks.status import get_tts_status, wait_for_job
from prefect_nanogpt.tasks.submit import submit_tts

__all__ = ["get_tts_status", "save_audio", "submit_tts", "wait_for_job"]
