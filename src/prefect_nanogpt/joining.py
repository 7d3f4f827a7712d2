"""Several pieces of audio put one behind the other in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast

from prefect_nanogpt.audio import Conversion, decode, open_audio, read_headers
from prefect_nanogpt.errors import AudioError

if TYPE_CHECKING:
    from av import AudioCodecContext, AudioFrame
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet

__all__ = ["join"]

MUXERS: Final = {"mp3": "mp3", "wav": "wav", "ogg": "ogg", "flac": "flac", "mp4": "mp4", "aac": "adts"}
MUXER_OPTIONS: Final = {"wav": {"rf64": "auto"}, "mp4": {"movflags": "faststart"}}
ENCODERS: Final = {
    "mp3": "libmp3lame",
    "wav": "pcm_s16le",
    "ogg": "libopus",
    "flac": "flac",
    "mp4": "aac",
    "aac": "aac",
}
STANDALONE: Final = {"mp3": "libmp3lame", "mp3float": "libmp3lame", "opus": "libopus"}
"""Codecs whose packets need no others, by their decoders, with their encoders: a piece can be put among other pieces
that were encoded elsewhere. The same holds for PCM, where a packet is samples and nothing else."""
OPTIONS: Final = {"libmp3lame": {"reservoir": "0"}}
"""An MP3 frame may keep some of its bytes in the frames before it, which in another file are others."""
LOSSY: Final = frozenset({"libmp3lame", "libopus", "aac"})
BITS_PER_CHANNEL: Final = 64_000
"""The bit rate of what is encoded anew from a lossless source, per second: transparent for speech."""
SILENCE_SAMPLES: Final = 1024

Piece: TypeAlias = Path | float
"""A file, or so many seconds of silence."""
Way: TypeAlias = "Callable[[OutputContainer, AudioStream, Sequence[Piece], Mapping[Path, Form]], None]"


class Form(NamedTuple):
    """What pieces must have in common to be put in a row as they are.

    `setup` is what the packets are decoded by that stands in the file's header; None where they cannot be copied: FLAC
    numbers its frames, and each stream of a chained file has a header of its own.
    """

    container: str
    codec: str
    rate: int
    channels: int
    setup: bytes | None


def join(files: Sequence[Path], target: Path, container: str | None = None, gap_seconds: float = 0.0) -> str:
    """Put audio files one behind the other, encoding anew only what must be.

    Pieces of the first one's form are copied, so that nothing is lost and hours take seconds. MP3, Opus and PCM pieces
    of another form, and the silence between, are encoded once into that form and put among them. Where the codec has no
    place for packets of another encoder (FLAC, AAC, Vorbis), or another container is asked for, all of it is encoded
    once. Tags and index headers of the pieces are left out; the result has a header of its own.

    Args:
        files: Local files, in order.
        target: The file to write.
        container: What to make: `mp3`, `wav`, `ogg`, `flac`, `mp4` or `aac`; None for what the first file is.
        gap_seconds: The silence between two files, in seconds.

    Returns:
        The container of the result.

    Raises:
        AudioError: A file is no audio (code `AUDIO_INVALID`), or there is no encoder for what is asked for (code
            `AUDIO_NOT_JOINABLE`).
    """
    import av

    forms = {file: _form_of(file) for file in dict.fromkeys(files)}
    first = forms[files[0]]
    container = container or first.container
    pieces: list[Piece] = [files[0]]
    for file in files[1:]:
        pieces += [gap_seconds, file] if gap_seconds > 0 else [file]
    can_all_be_copied = gap_seconds <= 0 and all(_can_be_copied(form, first) for form in forms.values())
    is_standalone = first.channels <= 2 and (first.codec in STANDALONE or first.codec.startswith("pcm_"))
    ways: list[Way] = [partial(_encode, container=container)]
    if container == first.container and (is_standalone or can_all_be_copied):
        ways.insert(0, _copy)
    failure: Exception | None = None
    for way in ways:
        try:
            with (
                open_audio(files[0], first.container) as model,
                av.open(str(target), "w", format=MUXERS[container], options=MUXER_OPTIONS.get(container)) as joined,
            ):
                way(joined, model.streams.audio[0], pieces, forms)
            return container
        except (av.FFmpegError, ValueError) as error:
            failure = failure or error
    raise AudioError(f"The pieces cannot be joined: {failure}", code="AUDIO_NOT_JOINABLE") from None


def _form_of(file: Path) -> Form:
    with file.open("rb") as opened:
        headers = read_headers(opened, file.stat().st_size)
    with open_audio(file, headers.container) as source:
        codec = source.streams.audio[0].codec_context
        setup: bytes | None = b""
        if codec.name == "flac" or (headers.is_chained and codec.name != "opus"):
            setup = None
        elif codec.name in ("vorbis", "aac"):
            setup = codec.extradata or b""
        return Form(headers.container, codec.name, codec.sample_rate, codec.layout.nb_channels, setup)


def _can_be_copied(form: Form, first: Form) -> bool:
    return form == first and form.setup is not None


def _copy(joined: OutputContainer, model: AudioStream, pieces: Sequence[Piece], forms: Mapping[Path, Form]) -> None:
    """Copy the packets of the pieces of the first one's form, and encode the others to packets of that form."""
    import av

    first = next(iter(forms.values()))
    stream = joined.add_stream_from_template(model)
    encoder = STANDALONE.get(first.codec, first.codec)
    tick = Fraction(1, first.rate)
    end = Fraction(0)
    for piece in pieces:
        if isinstance(piece, Path) and _can_be_copied(forms[piece], first):
            packets = _packets(piece, first.container)
        else:
            context = cast("AudioCodecContext", av.CodecContext.create(encoder, "w"))
            _set_up(context, encoder, first, model)
            packets = _encoded([piece], context, forms)
        # An encoder fills its last frame up and puts a little before the first, which is too much for a short silence.
        until = end + Fraction(piece) if isinstance(piece, float) else None
        for packet in packets:
            if until is not None and end >= until:
                break
            length = (packet.duration or 0) * (packet.time_base or tick)
            packet.time_base = tick
            packet.pts = packet.dts = round(end / tick)
            packet.duration = round(length / tick)
            packet.stream = stream
            end += length
            joined.mux(packet)


def _encode(
    joined: OutputContainer, model: AudioStream, pieces: Sequence[Piece], forms: Mapping[Path, Form], *, container: str
) -> None:
    """Encode all pieces with one encoder."""
    first = next(iter(forms.values()))
    encoder = "flac" if (container, first.codec) == ("ogg", "flac") else ENCODERS[container]
    stream = cast("AudioStream", joined.add_stream(encoder, rate=_rate(encoder, first.rate)))
    _set_up(stream.codec_context, encoder, first, model)
    for packet in _encoded(pieces, stream.codec_context, forms):
        packet.stream = stream
        joined.mux(packet)


def _set_up(context: AudioCodecContext, encoder: str, form: Form, model: AudioStream) -> None:
    """Set an encoder up for audio of a form, with the bit rate of the audio where that is lossy itself."""
    import av

    codec = av.Codec(encoder, "w")
    formats = [sample_format.name for sample_format in codec.audio_formats or ()]
    decoded = model.codec_context.format.name
    channels = min(form.channels, 2)
    context.sample_rate = _rate(encoder, form.rate)
    context.layout = "mono" if channels == 1 else "stereo"
    context.format = decoded if decoded in formats else formats[0]
    context.time_base = Fraction(1, context.sample_rate)
    if encoder in LOSSY:
        is_lossy = form.codec != "flac" and not form.codec.startswith("pcm_")
        context.bit_rate = (is_lossy and model.codec_context.bit_rate) or BITS_PER_CHANNEL * channels
    context.options = OPTIONS.get(encoder, {})


def _rate(encoder: str, rate: int) -> int:
    """Give the sample rate, or where an encoder does not take it the next higher one that it takes."""
    import av

    rates = sorted(av.Codec(encoder, "w").audio_rates or [rate])
    return next((taken for taken in rates if taken >= rate), rates[-1])


def _packets(file: Path, container: str) -> Iterator[Packet[AudioStream]]:
    import av

    with open_audio(file, container) as source:
        for packet in source.demux(source.streams.audio[0]):
            data = bytes(packet)
            # Between MP3s that were joined byte by byte there are tags.
            if data and (container != "mp3" or data[:1] == b"\xff"):
                # Without what the demuxer has added, by which a muxer would begin a new stream.
                bare = cast("Packet[AudioStream]", av.Packet(data))
                bare.duration, bare.time_base = packet.duration, packet.time_base
                yield bare


def _encoded(
    pieces: Sequence[Piece], context: AudioCodecContext, forms: Mapping[Path, Form]
) -> Iterator[Packet[AudioStream]]:
    # By way of integers, since damaged audio can decode to NaN or infinity, which LAME ends the process for.
    conversion = Conversion("s32", context.layout.name, context.sample_rate)

    def converted() -> Iterator[AudioFrame]:
        for piece in pieces:
            if isinstance(piece, Path):
                frames = _frames(piece, forms[piece].container)
            else:
                frames = _silence(piece, context.sample_rate)
            for frame in frames:
                yield from conversion.convert(frame)
        yield from conversion.flush()

    samples = 0
    for frame in converted():
        frame.pts, frame.time_base = samples, Fraction(1, context.sample_rate)
        samples += frame.samples
        yield from context.encode(frame)
    yield from context.encode(None)


def _frames(file: Path, container: str) -> Iterator[AudioFrame]:
    with open_audio(file, container) as source:
        for _, frames in decode(source):
            yield from frames or ()


def _silence(seconds: float, rate: int) -> Iterator[AudioFrame]:
    import av

    left = round(seconds * rate)
    while left > 0:
        samples = min(left, SILENCE_SAMPLES)
        frame = av.AudioFrame("s16", "mono", samples)
        frame.sample_rate = rate
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        left -= samples
        yield frame
