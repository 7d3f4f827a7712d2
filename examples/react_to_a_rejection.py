"""Texts that were refused end up on the editor's list, by an automation.

Shows how to react to this package's events: `nanogpt.tts.submitted`, `completed`, `rejected` and `timed-out`. Serving
the flow with a trigger makes the automation; it takes the flow's parameters out of the event. The runs that are
reacted to may be anywhere, and know nothing of it.

    # prefect-nanogpt, installed as the README says
    python react_to_a_rejection.py

and, in a second shell with the same PREFECT_API_URL:

    prefect-nanogpt say "[sandbox:reject] What nobody will read aloud."
"""

from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.events import DeploymentEventTrigger
from prefect.utilities.urls import url_for

REFUSED = DeploymentEventTrigger(
    name="Tell the editor of refused texts",
    expect={"nanogpt.tts.rejected"},
    match={"prefect.resource.id": "nanogpt.tts.*"},
    parameters={
        "run": "{{ flow_run.name }}",
        "run_id": "{{ flow_run.id | string }}",
        "code": "{{ event.payload.code }}",
        "model": "{{ event.payload.model }}",
    },
)


@flow(flow_run_name="refused-{run}")
def tell_the_editor(run: str, run_id: UUID, code: str, model: str) -> None:
    """Put a refused text on the editor's list."""
    create_table_artifact(
        key="refused-texts",
        table=[{"run": f"[{run}]({url_for('flow-run', run_id)})", "code": code, "model": model}],
        description=f"{run}: {code}",
    )


if __name__ == "__main__":
    tell_the_editor.serve(name="tell-the-editor", triggers=[REFUSED])
