"""What a person starts: flows made of the tasks of this package."""

from prefect_nanogpt.flows.batch import text_to_speech_batch
from prefect_nanogpt.flows.collect import collect_open_tickets
from prefect_nanogpt.flows.generate import text_to_speech
from prefect_nanogpt.flows.wait import wait_for_tts

__all__ = ["collect_open_tickets", "text_to_speech", "text_to_speech_batch", "wait_for_tts"]
