"""A flow without `async` that needs speech.

Shows how to call a flow of this package from ordinary synchronous code, with `prefect_nanogpt.sync`. The
speech is a child run of this flow, and a refused text an exception that can be caught by its type. (An `async` flow
awaits `prefect_nanogpt.flows.text_to_speech` instead.)

    # prefect-nanogpt, installed as the README says
    prefect-nanogpt sandbox &
    export NANOGPT_BASE_URL=http://127.0.0.1:8765/api NANOGPT_API_KEY=anything
    python sync_pipeline.py
"""

from prefect import flow, task

from prefect_nanogpt.errors import ContentPolicyViolation
from prefect_nanogpt.sync import text_to_speech

HARMLESS = "Today's headline cannot be read aloud."


@task
def pick_headline(headlines: list[str]) -> str:
    """Choose what is read aloud: the longest one."""
    return max(headlines, key=len)


@flow
def morning_news(headlines: list[str]) -> str:
    """Have a headline read aloud, or say that it could not be."""
    headline = pick_headline(headlines)
    try:
        audio = text_to_speech(headline)
    except ContentPolicyViolation:
        audio = text_to_speech(HARMLESS)
    return audio.location


if __name__ == "__main__":
    print(morning_news(["Rain.", "The tram to the harbour runs again."]))
