"""Speech from a project that does not install this package: it calls the deployment on somebody else's worker.

Shows that the name of a deployment and plain JSON are all the two sides share. Why a run failed is the name of its
state. The run's result is an object of this package, so a caller without the package takes a folder of its own for
the audio instead: what is in it afterwards is the audio.

    pip install prefect fsspec     # and the driver of the bucket, such as s3fs
    python call_the_deployment.py "Hello from another project." s3://bucket/greetings

On the other side: `prefect deploy --all` and `prefect worker start --pool nanogpt`, where this package is installed.
"""

import sys

import fsspec
from prefect import flow
from prefect.deployments import run_deployment
from prefect.runtime import flow_run


@flow
def greet(text: str, folder: str) -> str:
    """Have a text spoken by the deployment, and return where the audio is."""
    folder = f"{folder.rstrip('/')}/{flow_run.id}"
    speech = run_deployment("text-to-speech/text-to-speech", parameters={"text": text, "save_to": folder})
    if not speech.state or not speech.state.is_completed():
        raise RuntimeError(f"{speech.name}: {speech.state and speech.state.message}")
    fs, root = fsspec.core.url_to_fs(folder)
    [audio] = fs.ls(root, detail=False)
    return str(fs.unstrip_protocol(audio))


if __name__ == "__main__":
    print(greet(*sys.argv[1:]))
