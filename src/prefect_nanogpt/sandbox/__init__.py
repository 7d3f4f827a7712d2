"""A local stand-in of NanoGPT's text-to-speech API: for trying things out, demonstrations and tests.

It is not NanoGPT. It is written from the description of the HTTP API and shares no code with the client.
"""

from .api import RecordedRequest
from .jobs import Entry, InsufficientBalance, Ledger
from .script import Accept, Answer, Cut, Hang, Redirect, Slow, Stall
from .server import Sandbox, serve
from .speech import HUMS, TO_SPEAK

__all__ = [
    "HUMS",
    "TO_SPEAK",
    "Accept",
    "Answer",
    "Cut",
    "Entry",
    "Hang",
    "InsufficientBalance",
    "Ledger",
    "RecordedRequest",
    "Redirect",
    "Sandbox",
    "Slow",
    "Stall",
    "serve",
]
