"""Speech from a project that does not install this package: it calls the deployment on somebody else's worker.

Shows that the name of a deployment and plain JSON are all the two sides share. The run's result is JSON with what an
`AudioFile` has, read from Prefect's result storage, which both sides must reach. Why a run failed is the name of its
state.

    pip install prefect
    python call_the_deployment.py "Hello from another project." s3://bucket/greetings

On the other side: `prefect deploy --all` and `prefect worker start --pool nanogpt`, where this package is installed.
"""

import asyncio
import sys

from prefect import flow
from prefect.deployments import arun_deployment


@flow
async def greet(text: str, folder: str) -> str:
    """Have a text spoken by the deployment, and return where the audio is."""
    speech = await arun_deployment("text-to-speech/text-to-speech", parameters={"text": text, "save_to": folder})
    if not speech.state or not speech.state.is_completed():
        raise RuntimeError(f"{speech.name}: {speech.state and speech.state.message}")
    audio = await speech.state.aresult()
    print(f"{audio['duration_seconds']} s of speech, which cost {audio['cost']} {audio['currency']}.")
    return str(audio["location"])


if __name__ == "__main__":
    print(asyncio.run(greet(*sys.argv[1:])))
