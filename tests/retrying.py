"""A deployment of somebody who wants retries, for a worker to load."""

from prefect_nanogpt.flows import wait_for_tts
from prefect_nanogpt.tasks import get_tts_status

get_tts_status.retry_delay_seconds = [0.01]

retrying_wait = wait_for_tts.with_options(name="retrying-wait", retries=2)
