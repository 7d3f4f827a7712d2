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
DEEP_ENCODERS: Final = {"pcm_s16le": "pcm_s24le"}
"""Encoders for sources of more than 16 bits, where the usual one has only 16."""
STANDALONE: Final = {"mp3": "libmp3lame", "mp3float": "libmp3lame", "opus": "libopus"}
"""Codecs whose packets need no others, by their decoders, with their encoders: a piece can be put among other pieces
that were encoded elsewhere. The same holds for PCM, where a packet is samples and nothing else."""
OPTIONS: Final = {"libmp3lame": {"reservoir": "0"}}
"""An MP3 frame may keep some of its bytes in the frames before it, which in another file are others."""
LOSSY: Final = frozenset({"libmp3lame", "libopus", "aac"})
BITS_PER_CHANNEL: Final = 64_000
"""The least bit rate of what is encoded anew, per second: transparent for speech."""
MOST_BITS_PER_CHANNEL: Final = 256_000
"""Opus takes no more."""
SILENCE_SAMPLES: Final = 1024


class Source(NamedTuple):
    """A file, or one of the streams that are chained in it, which begins and ends at two places."""

    path: Path
    container: str
    link: tuple[int, int]


Piece: TypeAlias = Source | float
"""Audio, or so many seconds of silence."""
Way: TypeAlias = "Callable[[OutputContainer, AudioStream, Form, Sequence[Piece], Mapping[Source, Form]], None]"


class Form(NamedTuple):
    """What pieces must have in common to be put in a row as they are.

    `setup` is what the packets are decoded by that stands in the file's header; None where they cannot be copied, since
    FLAC numbers its frames.
    """

    container: str
    codec: str
    rate: int
    channels: int
    setup: bytes | None


def join(files: Sequence[Path], target: Path, container: str | None = None, gap_seconds: float = 0.0) -> str:
    """Put audio files one behind the other, encoding anew only what must be.

    Pieces of the first one's form are copied, so that nothing is lost and hours take seconds. MP3, Opus and PCM pieces
    of another form, and the silence between, are encoded once into that form and put among them; the silence is as much
    shorter as encoders have filled up the pieces before it, so that this does not add up. Where the codec has no
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

    sources = {file: _sources_in(file) for file in dict.fromkeys(files)}
    forms = {source: _form_of(source) for found in sources.values() for source in found}
    pieces: list[Piece] = [*sources[files[0]]]
    for file in files[1:]:
        pieces += [float(gap_seconds), *sources[file]] if gap_seconds > 0 else sources[file]
    beginning = sources[files[0]][0]
    first = forms[beginning]
    container = container or first.container
    can_all_be_copied = gap_seconds <= 0 and all(_can_be_copied(form, first) for form in forms.values())
    # Packets of an encoder know nothing of a gain that the header of the first piece has.
    is_standalone = first.channels <= 2 and _is_standalone(first.codec) and not any(first.setup or b"")
    ways: list[Way] = [partial(_encode, container=container)]
    if container == first.container and (is_standalone or can_all_be_copied):
        ways.insert(0, _copy)
    failure: Exception | None = None
    for way in ways:
        try:
            with (
                open_audio(*beginning) as model,
                av.open(str(target), "w", format=MUXERS[container], options=MUXER_OPTIONS.get(container)) as joined,
            ):
                way(joined, model.streams.audio[0], first, pieces, forms)
            return container
        except (av.FFmpegError, ValueError) as error:
            failure = failure or error
    raise AudioError(f"The pieces cannot be joined: {failure}", code="AUDIO_NOT_JOINABLE") from None


def _sources_in(file: Path) -> list[Source]:
    headers = read_headers(file)
    return [Source(file, headers.container, link) for link in headers.links]


def _form_of(source: Source) -> Form:
    with open_audio(*source) as opened:
        codec = opened.streams.audio[0].codec_context
        extradata = codec.extradata or b""
        setup: bytes | None = extradata
        if codec.name == "flac":
            setup = None
        elif codec.name == "opus":
            setup = extradata[16:]  # by RFC 7845 the gain, and which channel is which
        elif _is_standalone(codec.name):
            setup = b""
        return Form(source.container, codec.name, codec.sample_rate, codec.layout.nb_channels, setup)


def _is_standalone(codec: str) -> bool:
    return codec in STANDALONE or codec.startswith("pcm_")


def _can_be_copied(form: Form, first: Form) -> bool:
    return form == first and form.setup is not None


def _copy(
    joined: OutputContainer, model: AudioStream, first: Form, pieces: Sequence[Piece], forms: Mapping[Source, Form]
) -> None:
    """Copy the packets of the pieces of the first one's form, and encode the others to packets of that form."""
    import av

    stream = joined.add_stream_from_template(model)
    encoder = STANDALONE.get(first.codec, first.codec)
    tick = Fraction(1, first.rate)
    plays = _length_of_packets(first, model)
    has_silence = any(isinstance(piece, float) for piece in pieces)
    end = should_end = Fraction(0)
    for piece in pieces:
        is_silence = isinstance(piece, float)
        if has_silence:
            should_end += Fraction(piece) if isinstance(piece, float) else _length(piece)
        if isinstance(piece, Source) and _can_be_copied(forms[piece], first):
            packets = _packets(piece)
        else:
            context = cast("AudioCodecContext", av.CodecContext.create(encoder, "w"))
            _set_up(context, encoder, first, model)
            packets = _encoded([piece], context)
        for packet in packets:
            # Encoders put a little before the first frame and fill the last one up. Silence makes up for both.
            if is_silence and end >= should_end:
                break
            length = plays(packet)
            packet.time_base = tick
            packet.pts = packet.dts = round(end / tick)
            packet.duration = round(length / tick)
            packet.stream = stream
            end += length
            joined.mux(packet)


def _length_of_packets(first: Form, model: AudioStream) -> Callable[[Packet[AudioStream]], Fraction]:
    """Give a function that tells how long a packet plays, in seconds, when it is followed by others.

    FFmpeg leaves out of the duration of a stream's last packet what is not to be heard at its end, and of the first one
    of Vorbis what has nothing before it. In the middle of a whole, all of it is heard.
    """
    tick = Fraction(1, first.rate)
    longest = Fraction(0)

    def said(packet: Packet[AudioStream]) -> Fraction:
        return (packet.duration or 0) * (packet.time_base or tick)

    def of_aac(packet: Packet[AudioStream]) -> Fraction:
        nonlocal longest
        longest = max(longest, said(packet))  # all of a stream have the same number of samples
        return longest

    def of_vorbis(packet: Packet[AudioStream]) -> Fraction:
        return sum(frame.samples for frame in model.codec_context.decode(packet)) * tick

    def of_opus(packet: Packet[AudioStream]) -> Fraction:
        return _opus_seconds(bytes(packet))

    return {"aac": of_aac, "vorbis": of_vorbis, "opus": of_opus}.get(first.codec, said)


def _length(source: Source) -> Fraction:
    return sum((Fraction(frame.samples, frame.sample_rate) for frame in _frames(source)), Fraction(0))


def _opus_seconds(packet: bytes) -> Fraction:
    """Tell how long a packet of Opus plays, from its first two bytes (RFC 6716, section 3)."""
    config, frames = packet[0] >> 3, packet[0] & 3
    if config < 12:
        milliseconds = (10.0, 20.0, 40.0, 60.0)[config & 3]
    elif config < 16:
        milliseconds = (10.0, 20.0)[config & 1]
    else:
        milliseconds = (2.5, 5.0, 10.0, 20.0)[config & 3]
    count = (1, 2, 2, packet[1] & 0x3F if len(packet) > 1 else 0)[frames]
    return count * Fraction(milliseconds) / 1000


def _encode(
    joined: OutputContainer,
    model: AudioStream,
    first: Form,
    pieces: Sequence[Piece],
    forms: Mapping[Source, Form],
    *,
    container: str,
) -> None:
    """Encode all pieces with one encoder."""
    encoder = "flac" if (container, first.codec) == ("ogg", "flac") else ENCODERS[container]
    if _is_deep(first, model):
        encoder = DEEP_ENCODERS.get(encoder, encoder)
    stream = cast("AudioStream", joined.add_stream(encoder, rate=_rate(encoder, first.rate)))
    _set_up(stream.codec_context, encoder, first, model)
    for packet in _encoded(pieces, stream.codec_context):
        packet.stream = stream
        joined.mux(packet)


def _set_up(context: AudioCodecContext, encoder: str, form: Form, model: AudioStream) -> None:
    """Set an encoder up for audio of a form, with at least its bit rate where that is lossy itself."""
    import av

    codec = av.Codec(encoder, "w")
    formats = [sample_format.name for sample_format in codec.audio_formats or ()]
    decoded = model.codec_context.format.name
    channels = min(form.channels, 2)
    context.sample_rate = _rate(encoder, form.rate)
    context.layout = "mono" if channels == 1 else "stereo"
    if _is_deep(form, model) and "s32" in formats:
        context.format = "s32"
    else:
        context.format = decoded if decoded in formats else formats[0]
    context.time_base = Fraction(1, context.sample_rate)
    if encoder in LOSSY:
        is_lossy = form.codec != "flac" and not form.codec.startswith("pcm_")
        # Where no header has it, FFmpeg guesses the bit rate by the first frames, which may be silent.
        bit_rate = max((is_lossy and model.codec_context.bit_rate) or 0, BITS_PER_CHANNEL * channels)
        context.bit_rate = min(bit_rate, MOST_BITS_PER_CHANNEL * channels)
    context.options = OPTIONS.get(encoder, {})


def _is_deep(form: Form, model: AudioStream) -> bool:
    """Whether the samples of a form have more than 16 bits; those of lossy codecs have no bits to lose."""
    return model.codec_context.format.name in ("s32", "s32p") or form.codec.startswith("pcm_f")


def _rate(encoder: str, rate: int) -> int:
    """Give the sample rate, or where an encoder does not take it the next higher one that it takes."""
    import av

    rates = sorted(av.Codec(encoder, "w").audio_rates or [rate])
    return next((taken for taken in rates if taken >= rate), rates[-1])


def _packets(source: Source) -> Iterator[Packet[AudioStream]]:
    import av

    with open_audio(*source) as opened:
        for packet in opened.demux(opened.streams.audio[0]):
            data = bytes(packet)
            # Between MP3s that were joined byte by byte there are tags.
            if data and (source.container != "mp3" or data[:1] == b"\xff"):
                # Without what the demuxer has added, by which a muxer would begin a new stream.
                bare = cast("Packet[AudioStream]", av.Packet(data))
                bare.duration, bare.time_base = packet.duration, packet.time_base
                yield bare


def _encoded(pieces: Sequence[Piece], context: AudioCodecContext) -> Iterator[Packet[AudioStream]]:
    # By way of integers, since damaged audio can decode to NaN or infinity, which LAME ends the process for.
    conversion = Conversion("s32", context.layout.name, context.sample_rate)

    def converted() -> Iterator[AudioFrame]:
        for piece in pieces:
            frames = _frames(piece) if isinstance(piece, Source) else _silence(piece, context.sample_rate)
            for frame in frames:
                yield from conversion.convert(frame)
        yield from conversion.flush()

    samples = 0
    for frame in converted():
        frame.pts, frame.time_base = samples, Fraction(1, context.sample_rate)
        samples += frame.samples
        yield from context.encode(frame)
    yield from context.encode(None)


def _frames(source: Source) -> Iterator[AudioFrame]:
    with open_audio(*source) as opened:
        for _, frames in decode(opened):
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
