"""What audio is: which container it is in, whether it is whole, and how long it plays.

A file's own headers tell whether bytes are missing. Whether there is sound in it, and for how long, only a decoder can
tell: PyAV, with the extra `audio`.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, NamedTuple

from prefect_nanogpt.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame, AudioResampler
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet

__all__ = [
    "CONTENT_TYPES",
    "Conversion",
    "Headers",
    "Sound",
    "container_of",
    "decode",
    "inspect",
    "open_audio",
    "read_headers",
]

CONTENT_TYPES: Final = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "ogg": "audio/ogg",
    "flac": "audio/flac",
    "mp4": "audio/mp4",
    "aac": "audio/aac",
}
EXTENSIONS: Final = {**{container: container for container in CONTENT_TYPES}, "m4a": "mp4", "opus": "ogg", "oga": "ogg"}
"""The container by the extension of a file's name."""
DEMUXERS: Final = {"mp3": "mp3", "wav": "wav", "ogg": "ogg", "flac": "flac", "mp4": "mov", "aac": "aac"}
"""FFmpeg's demuxer for each container. Left to guess, it may take a text for a playlist and open what that names."""
DEMUXER_OPTIONS: Final = {"wav": {"max_size": "16384"}}
"""A packet costs as much as some thousand samples of PCM, and FFmpeg makes one of 4 kB."""
COLUMNS: Final = 120
DRAWN_RATE: Final = 8_000
LEVEL_SECONDS: Final = 0.02
SAMPLES: Final[dict[str, tuple[Literal["B", "h", "i", "q", "f", "d"], int, int]]] = {
    "u8": ("B", 128, 128),
    "s16": ("h", 0, 2**15),
    "s32": ("i", 0, 2**31),
    "s64": ("q", 0, 2**63),
    "flt": ("f", 0, 1),
    "dbl": ("d", 0, 1),
}
"""FFmpeg's sample formats: what `memoryview` calls them, the value of silence and how far from it the loudest is."""
LARGEST_DRAWN_BYTES: Final = 32 * 1024**2
"""Drawing takes about as long as decoding; a picture of more is not worth the wait."""
LONGEST_SECONDS: Final = 100 * 3600
"""A few bytes of silence can decode to hours, and nobody has a text of that length said in one file."""
LARGEST_WAV_BYTES: Final = 0x7FFF_0000
"""Programs that write a WAV as a stream do not know its size, and put this or more in its place, or 0."""
PCM: Final = frozenset({0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE})
"""WAV formats with a fixed number of bytes a sample: integers, floats, A-law, mu-law, and the extensible form."""
KILOBITS: Final = {
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (2, 0): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""ISO/IEC 11172-3 and 13818-3: bit rates by version and layer; from version 2 on, both layers have the same."""
MPEG_RATES: Final = (44_100, 48_000, 32_000)
XING_SLACK_FRAMES: Final = 4
"""Encoders count their own header frame or not, and decoders leave out the encoder's delay and padding."""
MP4_SLACK_SECONDS: Final = 0.1
"""Decoders leave out the priming samples, which some writers count."""
ROUNDING_SECONDS: Final = 0.001
LARGEST_STRAY_BYTES: Final = 65_536
"""How far to look for the audio behind something that is none: the rest of a frame, or what a relay has put there."""
_MAGIC: Final = re.compile(rb"OggS\0\x02|fLaC[\0\x80]\0\0\x22")
"""How the first page of Ogg begins, and FLAC with its first block."""
FRAME_HEADER_BYTES: Final = 7
"""Those of AAC; MP3 has 4."""
FRAMES_IN_A_ROW: Final = 3
"""How many frame headers must follow one another where each says, so that they are no accident."""


class Headers(NamedTuple):
    """What a file's headers say of it.

    Attributes:
        container: The container.
        seconds: How long the headers say that it plays, in seconds, where they say.
        slack: By how much that may be wrong, in seconds.
        measured: How long it plays, in seconds, where that follows from the number of bytes.
        links: Where the audio begins and ends, in bytes. More than one place, if Ogg streams follow one another: each
            has headers of its own, and may be of another codec, rate or number of channels.
    """

    container: str
    seconds: float | None = None
    slack: float = 0.0
    measured: float | None = None
    links: tuple[tuple[int, int], ...] = ()


class Sound(NamedTuple):
    """What there is to hear in a file.

    Attributes:
        container: The container.
        duration_seconds: How long it plays, in seconds; None where there is no decoder to tell.
        peaks: Its outline: up to 120 peaks from 0 to 100; none of files over 32 MiB.
        is_decoded: Whether a decoder has played it from beginning to end.
    """

    container: str
    duration_seconds: float | None
    peaks: tuple[int, ...]
    is_decoded: bool


def container_of(head: bytes) -> str | None:
    """Tell the container from the first bytes of a file (12 are enough); None where they are not audio.

    Example:
        >>> container_of(b"ID3\\x04\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00")
        'mp3'
    """
    if head.startswith(b"ID3"):
        return "mp3"
    if head.startswith((b"RIFF", b"RF64", b"BW64")) and head[8:12] == b"WAVE":
        return "wav"
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith(b"fLaC"):
        return "flac"
    if head[4:8] == b"ftyp":
        return "mp4"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    return "mp3" if _mpeg_frame(head[:4]) else None


def inspect(path: Path) -> Sound:
    """Play a file from beginning to end, without a sound, and tell what there is to hear.

    Without the extra `audio`, only what the bytes themselves tell is checked.

    Args:
        path: A local file.

    Raises:
        AudioError: It is no audio (code `AUDIO_INVALID`), there is no sound in it (`AUDIO_EMPTY`), or it ends before
            its own headers say (`AUDIO_TRUNCATED`). A download may go better.
    """
    headers = read_headers(path)
    try:
        import av  # noqa: F401
    except ImportError:
        return Sound(headers.container, headers.measured, (), False)
    seconds, peaks = _play(path, headers)
    return Sound(headers.container, seconds, peaks, True)


def read_headers(path: Path) -> Headers:
    """Read what the headers of a file say, and make sure that all the bytes they announce are there.

    Raises:
        AudioError: As `inspect` does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start, container = _beginning(file, size)
        match container:
            case "wav":
                headers = _wav(file, size)
            case "flac":
                headers = _flac(file, start, size)
            case "mp3":
                headers = _mp3(file, start, size)
            case "ogg":
                headers = _ogg(file, start, size)
            case "mp4":
                headers = _mp4(file, size)
            case _:
                headers = _aac(file, start, size)
    return headers if headers.links else headers._replace(links=((start, size),))


def _beginning(file: BinaryIO, size: int) -> tuple[int, str]:
    """Find where the audio begins, and in which container it is."""
    if size == 0:
        raise _empty("It has no bytes.")
    start = 0
    while (tag := _at(file, start, 10)).startswith(b"ID3") and len(tag) == 10:
        has_footer = tag[5] & 0x10
        start += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        start += 10 if has_footer else 0
        if start >= size:
            raise _empty("It is a tag without any sound.")
    head = _at(file, start, 12)
    if start and not head.strip(b"\0"):  # a tag whose padding is not counted in its size
        padded = _at(file, start, 65_536)
        start += len(padded) - len(padded.lstrip(b"\0"))
        head = _at(file, start, 12)
    container = container_of(head)
    if container in ("wav", "mp4") and start:
        raise _invalid(f"It is a {container} behind a tag, where players do not find it.")
    if container:
        return start, container
    if stray := _MAGIC.search(_at(file, start, LARGEST_STRAY_BYTES)):
        return start + stray.start(), "ogg" if stray[0].startswith(b"OggS") else "flac"
    for frame_length, framed in ((_mpeg_length, "mp3"), (_adts_length, "aac")):
        if (first := _next_frames(file, start, frame_length)) is not None:
            return first, framed
    looks_like = "a web page" if head.lstrip()[:1] == b"<" else "JSON" if head.lstrip()[:1] in b"{[" else "data"
    raise _invalid(f"It is {looks_like} that begins with {head!r}.")


def _at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _empty(why: str) -> AudioError:
    return AudioError(f"There is no sound in the audio. {why}", code="AUDIO_EMPTY", retryable=True)


def _invalid(why: str) -> AudioError:
    return AudioError(f"This is not audio. {why}", code="AUDIO_INVALID", retryable=True)


def _truncated(why: str) -> AudioError:
    return AudioError(f"The audio was cut short: {why}.", code="AUDIO_TRUNCATED", retryable=True)


def _next_frames(file: BinaryIO, start: int, frame_length: Callable[[bytes], int]) -> int | None:
    """Find where frames begin that follow one another, as far as one looks for them."""
    stray = _at(file, start, LARGEST_STRAY_BYTES)
    for found in re.finditer(b"\xff", stray):
        position = start + found.start()
        for _ in range(FRAMES_IN_A_ROW):
            length = frame_length(_at(file, position, FRAME_HEADER_BYTES))
            if not length:
                break
            position += length
        else:
            return start + found.start()
    return None


def _wav(file: BinaryIO, size: int) -> Headers:
    position, tag, bytes_per_second, large_size = 12, 0, 0, 0
    while len(chunk := _at(file, position, 8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        position += 8
        if name == b"fmt ":
            described = _at(file, position, 12)
            if len(described) == 12:
                tag, _, _, bytes_per_second = struct.unpack("<HHII", described)
        if name == b"ds64":  # of RF64, by EBU Tech 3306: sizes of more than 4 GiB
            large_size = int.from_bytes(_at(file, position + 8, 8), "little")
        if name == b"data":
            length = large_size or length
            there = size - position
            if there <= 0:
                raise _empty("It is a header without any samples.")
            is_known = 0 < length < LARGEST_WAV_BYTES or bool(large_size)
            if is_known and length > there:
                raise _truncated(f"its header says {length} bytes of sound, and {there} are there")
            seconds = (length if is_known else there) / bytes_per_second if bytes_per_second else None
            return Headers("wav", measured=seconds if tag in PCM else None)
        position += length + length % 2
    raise _empty("It is a header without any samples.")


def _flac(file: BinaryIO, start: int, size: int) -> Headers:
    position, rate, samples = start + 4, 0, 0
    is_last = False
    while not is_last and len(block := _at(file, position, 4)) == 4:
        is_last = bool(block[0] & 0x80)
        length = int.from_bytes(block[1:])
        if block[0] & 0x7F == 0:
            packed = int.from_bytes(_at(file, position + 14, 8))
            rate, samples = packed >> 44, packed & 0xF_FFFF_FFFF
        position += 4 + length
    if position >= size:
        raise _empty("It is a header without any frames.")
    return Headers("flac", samples / rate if rate and samples else None)


def _mpeg_frame(header: bytes) -> tuple[int, int, int] | None:
    """Read the header of an MPEG audio frame: samples in the frame, sample rate, and length in bytes, 0 if not told.

    None where it is no such header. Layer I is as good as extinct, and UTF-16 text begins like it.
    """
    if len(header) < 3 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version = {3: 1, 2: 2, 0: 4}.get(header[1] >> 3 & 3, 0)
    layer = 4 - (header[1] >> 1 & 3)
    bit_rate, sample_rate, is_padded = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if not version or layer not in (2, 3) or bit_rate == 15 or sample_rate == 3:
        return None
    samples = 576 if layer == 3 and version > 1 else 1152
    rate = MPEG_RATES[sample_rate] // version
    kilobits = KILOBITS[(1, layer) if version == 1 else (2, 0)][bit_rate]
    return samples, rate, samples // 8 * kilobits * 1000 // rate + is_padded if kilobits else 0


def _mpeg_length(header: bytes) -> int:
    frame = _mpeg_frame(header)
    return frame[2] if frame else 0


def _adts_length(header: bytes) -> int:
    """Read the length of an AAC frame in bytes from its header (ISO/IEC 13818-7); 0 where it is no such header."""
    if len(header) < FRAME_HEADER_BYTES or header[0] != 0xFF or header[1] & 0xF6 != 0xF0:
        return 0
    length = int.from_bytes(header[3:6]) >> 5 & 0x1FFF
    return length if length > FRAME_HEADER_BYTES else 0


def _aac(file: BinaryIO, start: int, size: int) -> Headers:
    """Follow the frames. Between those of pieces that were joined byte by byte may be tags."""
    position = end = start
    while header := _at(file, position, FRAME_HEADER_BYTES):
        if length := _adts_length(header):
            position = end = position + length
        elif len(header) < FRAME_HEADER_BYTES and header[0] == 0xFF and (len(header) < 2 or header[1] & 0xF6 == 0xF0):
            raise _truncated("it ends in the middle of a frame")
        elif (following := _next_frames(file, position, _adts_length)) is not None:
            position = following
        else:
            break
    if end == start:
        raise _invalid("It begins like AAC, and has no frame.")
    if end > size:
        raise _truncated("it ends in the middle of a frame")
    return Headers("aac", links=((start, end),))


def _mp3(file: BinaryIO, start: int, size: int) -> Headers:
    """Read the Xing or VBRI header in the first frame, with which encoders tell how many frames and bytes there are."""
    head = _at(file, start, 4)
    frame = _mpeg_frame(head)
    if frame is None:
        return Headers("mp3")
    samples, rate, _ = frame
    is_mono, is_version_1 = head[3:4] >= b"\xc0", head[1] & 0x18 == 0x18
    side_info = (17 if is_mono else 32) if is_version_1 else (9 if is_mono else 17)
    name, flags, frames, length = struct.unpack(">4sIII", _at(file, start + 4 + side_info, 16).ljust(16, b"\0"))
    if name not in (b"Xing", b"Info"):
        name, _, length, frames = struct.unpack(">4s6sII", _at(file, start + 36, 18).ljust(18, b"\0"))
        if name != b"VBRI":
            return Headers("mp3")
        flags = 3
    if not flags & 1:
        return Headers("mp3")
    slack = XING_SLACK_FRAMES * samples / rate
    seconds = frames * samples / rate
    there = size - start
    if flags & 2 and seconds > slack and length * (1 - slack / seconds) > there:
        raise _truncated(f"its header says {length} bytes, and {there} are there")
    return Headers("mp3", seconds or None, slack)


class _Page(NamedTuple):
    start: int
    end: int
    is_first: bool
    is_last: bool
    granule: int
    stream: bytes


def _ogg_pages(file: BinaryIO, start: int, size: int) -> Iterator[_Page]:
    position = start
    while position < size:
        page = _at(file, position, 27)
        if page[:4] != b"OggS"[: len(page)]:
            following = _at(file, position, LARGEST_STRAY_BYTES).find(b"OggS")
            if following < 0:
                return
            position += following
            continue
        segments = _at(file, position + 27, page[26]) if len(page) == 27 else b""
        end = position + 27 + len(segments) + sum(segments)
        if len(page) < 27 or len(segments) < page[26] or end > size:
            raise _truncated("it ends in the middle of a page")
        granule = int.from_bytes(page[6:14], "little", signed=True)
        yield _Page(position, end, bool(page[5] & 2), bool(page[5] & 4), granule, page[14:18])
        position = end


def _ogg(file: BinaryIO, start: int, size: int) -> Headers:
    """Follow the pages. By RFC 7845 a stream whose end is not marked was cut short."""
    links, end, last_granule, has_begun = [start], start, 0, False
    open_streams: set[bytes] = set()
    for page in _ogg_pages(file, start, size):
        # The streams of a link all begin before any of them goes on.
        if page.is_first and has_begun:
            if open_streams:
                break
            links.append(page.start)
        has_begun = not page.is_first
        if page.is_first:
            open_streams.add(page.stream)
        if page.is_last:
            open_streams.discard(page.stream)
        end, last_granule = page.end, max(last_granule, page.granule)
    if last_granule == 0:
        raise _empty("It is a header without any samples.")
    if open_streams:
        raise _truncated("the end of the stream is not there")
    return Headers("ogg", links=tuple(pairwise([*links, end])))


def _mp4(file: BinaryIO, size: int) -> Headers:
    """Follow the boxes; a box of size 0 goes to the end of the file, one of size 1 has its size behind its name."""
    position, seen, name = 0, set[bytes](), b""
    while position < size and len(box := _at(file, position, 16)) >= 8:
        length, name = struct.unpack(">I4s", box[:8])
        seen.add(name)
        if length == 1 and len(box) == 16:
            length = int.from_bytes(box[8:])
        if length < 8:
            break
        position += length
    # Else it is a box without sound, or not even that but something behind the last one.
    if position > size and name in (b"ftyp", b"moov", b"mdat", b"moof"):
        raise _truncated(f"its header says {position} bytes, and {size} are there")
    if b"moov" not in seen:
        raise _truncated("its index is not there") if b"mdat" in seen else _empty("It is a header without any samples.")
    return Headers("mp4")


def _play(path: Path, headers: Headers) -> tuple[float, tuple[int, ...]]:
    """Decode a file to its duration in seconds and, unless it is very large, its outline."""
    import av

    outline = _Outline() if path.stat().st_size <= LARGEST_DRAWN_BYTES else None
    samples: Counter[int] = Counter()
    announced, slack = headers.seconds, headers.slack
    cut: str | None = None
    try:
        for source in _opened(path, headers):
            stream = source.streams.audio[0]
            if headers.container == "mp4" and stream.duration and stream.time_base:
                announced, slack = float(stream.duration * stream.time_base), MP4_SLACK_SECONDS
            for packet, frames in decode(source):
                if packet.size:
                    cut = _how_cut(packet, frames, headers.container)
                for frame in frames or ():
                    samples[frame.sample_rate] += frame.samples
                    if outline:
                        outline.add(frame)
                if samples.total() > LONGEST_SECONDS * max(samples, default=1):
                    raise _invalid(f"It plays for more than {LONGEST_SECONDS // 3600} hours.")
    except av.FFmpegError as error:
        cut = f"what follows cannot be decoded ({error.strerror})"
    seconds = float(sum(Fraction(count, rate) for rate, count in samples.items()))
    if not seconds:
        raise _empty("Nothing in it can be decoded.")
    if announced is not None and seconds < announced - slack - ROUNDING_SECONDS:
        raise _truncated(f"its header says {announced:.2f} s, and {seconds:.2f} s play")
    if cut is not None and (announced is None or abs(seconds - announced) > ROUNDING_SECONDS):
        raise _truncated(f"{seconds:.2f} s play, and {cut}")
    return seconds, outline.columns() if outline else ()


def _opened(path: Path, headers: Headers) -> Iterator[InputContainer]:
    for link in headers.links:
        with open_audio(path, headers.container, link) as source:
            yield source


def open_audio(path: Path, container: str, link: tuple[int, int]) -> InputContainer:
    """Open the audio that begins and ends at two places of a file, to decode it.

    Raises:
        AudioError: It cannot be opened, or has no sound track (code `AUDIO_INVALID`).
    """
    import av

    try:
        source = av.open(
            f"subfile,,start,{link[0]},end,{link[1]},,:{path.absolute()}",
            format=DEMUXERS[container],
            options={"protocol_whitelist": "file,subfile", **DEMUXER_OPTIONS.get(container, {})},
        )
    except (av.FFmpegError, ValueError) as error:
        raise _invalid(f"The {container} cannot be opened: {getattr(error, 'strerror', None) or error}.") from None
    # A stream of an unknown codec has no context, and some versions of PyAV (seen on 16.1) crash when they decode it.
    if not source.streams.audio or source.streams.audio[0].codec_context is None:
        source.close()
        raise _invalid(f"The {container} has no sound track that can be decoded.")
    return source


def decode(source: InputContainer) -> Iterator[tuple[Packet[AudioStream], list[AudioFrame] | None]]:
    """Decode the first sound track packet by packet; None in the place of a packet that is damaged."""
    import av

    for packet in source.demux(source.streams.audio[0]):
        try:
            yield packet, packet.decode()
        except av.FFmpegError:
            yield packet, None


def _how_cut(packet: Packet[AudioStream], frames: list[AudioFrame] | None, container: str) -> str | None:
    """Say in which way a packet is not whole, which, if it is the last one, means that the file is not."""
    if container == "mp3":
        data = bytes(packet)
        if data[:1] != b"\xff":
            return None  # a tag, or padding
        frame = _mpeg_frame(data[:4])
        return "the last frame is not whole" if len(data) < 4 or (frame and frame[2] > len(data)) else None
    if container == "aac" and bytes(packet)[:1] != b"\xff":
        return None
    return "the last frame is damaged" if frames is None and container in ("aac", "flac") else None


class _Outline:
    """The peaks of audio, taken while it is decoded, when its length is not known yet.

    Of some thousand samples a second the loudest of all channels are kept, each for `LEVEL_SECONDS`. To resample the
    audio for that would take longer than to decode it, and no picture of a waveform shows the difference.
    """

    def __init__(self) -> None:
        self._levels = array("B")
        self._rest: list[list[float]] = []
        """By channel: the samples that are less than a level."""

    def add(self, frame: AudioFrame) -> None:
        step = max(1, frame.sample_rate // DRAWN_RATE)
        samples = round(LEVEL_SECONDS * frame.sample_rate / step)
        code, silence, loudest = SAMPLES[frame.format.packed.name]
        channels = frame.layout.nb_channels
        if len(self._rest) != channels:
            self._rest = [[] for _ in range(channels)]
        for channel, rest in enumerate(self._rest):
            if frame.format.is_planar:
                plane, first, every = frame.planes[channel], 0, 1
            else:
                plane, first, every = frame.planes[0], channel, channels
            rest += memoryview(plane).cast(code)[first : frame.samples * every : step * every].tolist()
        whole = len(self._rest[0]) - len(self._rest[0]) % samples
        for start in range(0, whole, samples):
            here = [rest[start : start + samples] for rest in self._rest]
            peak = max(max(*map(max, here), silence) - silence, silence - min(*map(min, here), silence))
            self._levels.append(int(100 * peak / loudest) if peak < loudest else 100)  # also what is not a number
        for rest in self._rest:
            del rest[:whole]

    def columns(self) -> tuple[int, ...]:
        columns = min(COLUMNS, len(self._levels))
        if not columns:  # shorter than one level
            return ()
        bounds = [len(self._levels) * column // columns for column in range(columns + 1)]
        return tuple(max(self._levels[start:end]) for start, end in pairwise(bounds))


class Conversion:
    """Converts frames to one sample format, layout and rate, also where theirs change on the way.

    Args:
        sample_format: FFmpeg's name of the sample format, such as `s16`.
        layout: `mono` or `stereo`, or another of FFmpeg's names.
        rate: Samples a second.
    """

    def __init__(self, sample_format: str, layout: str, rate: int) -> None:
        self._target = (sample_format, layout, rate)
        self._source: tuple[str, str, int] | None = None
        self._resampler: AudioResampler | None = None

    def convert(self, frame: AudioFrame) -> list[AudioFrame]:
        """Convert a frame; some of it may come with the next one."""
        import av

        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        converted: list[AudioFrame] = []
        if source != self._source:
            converted = self.flush()
            self._source, self._resampler = source, av.AudioResampler(*self._target)
        assert self._resampler is not None
        frame.pts = None
        return converted + self._resampler.resample(frame)

    def flush(self) -> list[AudioFrame]:
        """Give what is left."""
        resampler, self._resampler, self._source = self._resampler, None, None
        return resampler.resample(None) if resampler else []
