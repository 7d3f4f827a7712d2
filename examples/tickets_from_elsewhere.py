"""Speech that another system has ordered: its tickets are waited for here.

Shows that a ticket is all it takes. `tickets.jsonl` has the provider's answers, one a line, just as whoever submitted
the texts got them; here it is a shell script:

    curl -s $NANOGPT_BASE_URL/tts -H "Authorization: Bearer $NANOGPT_API_KEY" -H "Content-Type: application/json" \
         -d '{"text": "Ordered by a shell script.", "model": "Elevenlabs-Turbo-V2.5"}' >> tickets.jsonl
    echo >> tickets.jsonl

Nothing is submitted here, so nothing is paid for here, however often it runs: what is saved already is only looked up.

    # prefect-nanogpt, installed as the README says
    prefect-nanogpt sandbox &
    export NANOGPT_BASE_URL=http://127.0.0.1:8765/api NANOGPT_API_KEY=anything
    python tickets_from_elsewhere.py tickets.jsonl
"""

import asyncio
import sys
from pathlib import Path

from prefect import flow

from prefect_nanogpt.flows import wait_for_tts
from prefect_nanogpt.models import AudioFile, Ticket


@flow
async def fetch_orders(tickets: list[Ticket], save_to: str = "audio") -> list[AudioFile]:
    """Wait for every ticket; one that fails fails this flow, but only once the others are done."""
    waits = [wait_for_tts(ticket, save_to=save_to, return_state=True) for ticket in tickets]
    return [await state.aresult() for state in await asyncio.gather(*waits)]


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    for audio in asyncio.run(fetch_orders([Ticket.model_validate_json(line) for line in lines])):
        print(audio.location)
