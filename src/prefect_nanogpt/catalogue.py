"""What the provider's catalogue, or what is known of its models, says against a request, before it is paid for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prefect_nanogpt.models import AudioModel, TTSRequest, perhaps

__all__ = ["Doubts", "doubts_about", "too_long"]

CLONED_VOICE: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{7,}")
"""The ids that NanoGPT documents for voices that were cloned with MiniMax. The catalogue does not have them."""
IGNORES_FORMAT: Final = {"elevenlabs": "mp3", "kokoro": "wav"}
"""How the ids of models begin that are known to ignore `response_format`, and the container that they answer with.

By NanoGPT's documentation it is for OpenAI's models only, and of ElevenLabs' it was seen to be ignored.
"""


class Doubts(NamedTuple):
    """What is doubtful about requests, each a sentence, once.

    Attributes:
        names: Models and voices that the catalogue does not have: the provider may refuse them.
        formats: Containers that a model will not answer with.
    """

    names: list[str]
    formats: list[str]


def doubts_about(requests: Iterable[TTSRequest], catalogue: Iterable[AudioModel] | None) -> Doubts:
    """Find models and voices that the catalogue does not have, and containers that a model will not answer with.

    Args:
        requests: What is about to be submitted.
        catalogue: The catalogue; None where it could not be read, and then says nothing against names.
    """
    known = None if catalogue is None else {model.id: model for model in catalogue}
    names: dict[str, None] = {}
    formats: dict[str, None] = {}
    for model, voice, container in dict.fromkeys((one.model, one.voice, one.response_format) for one in requests):
        found = known.get(model) if known is not None else None
        if known is not None:
            names.update(dict.fromkeys(_against_names(model, voice, known)))
        if container is not None:
            formats.update(dict.fromkeys(_against_format(model, container.lower(), found)))
    return Doubts(list(names), list(formats))


def too_long(requests: Iterable[TTSRequest], catalogue: Iterable[AudioModel] | None) -> list[str]:
    """Find texts that are longer than their model takes by the catalogue, and give a sentence for each model."""
    longest = {model.id: model.max_chars for model in catalogue or () if model.max_chars}
    counts = Counter(one.model for one in requests if len(one.text) > longest.get(one.model, len(one.text)))
    return [
        f"{count} {'text is' if count == 1 else 'texts are'} longer than {model} takes by the catalogue "
        f"({longest[model]:,} characters), and may be refused."
        for model, count in counts.items()
    ]


def _against_names(model: str, voice: str | None, known: Mapping[str, AudioModel]) -> Iterator[str]:
    if model not in known:
        speech = [one.id for one in known.values() if one.kind == "speech"]
        yield f"The catalogue has no model {model!r}.{perhaps(model, speech)}"
        return
    found = known[model]
    if found.kind != "speech":
        yield f"By the catalogue the model {model!r} is not for speech ({found.kind})."
    if voice is None or not found.voices or voice in found.voices:
        return
    meant = perhaps(voice, found.voices)
    if meant or not (model.lower().startswith("minimax") and CLONED_VOICE.fullmatch(voice)):
        yield f"The catalogue has no voice {voice!r} of {model}.{meant}"


def _against_format(model: str, container: str, found: AudioModel | None) -> Iterator[str]:
    if found is not None and found.response_formats:
        if container not in map(str.lower, found.response_formats):
            offered = ", ".join(found.response_formats)
            yield f"By the catalogue {model} does not offer the format {container!r}, but {offered}."
        return
    answers = next((answer for start, answer in IGNORES_FORMAT.items() if model.lower().startswith(start)), container)
    if answers != container:
        yield f"{model} is known to ignore response_format: it will answer with {answers}, not {container}."
