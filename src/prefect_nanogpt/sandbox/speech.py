"""What the sandbox says: speech from espeak-ng, or a tone where the optional packages are not installed.

The extra `sandbox` brings `espeakng_loader` (the speech engine) and `lameenc` (MP3). Opus, AAC and FLAC are made with
PyAV, which the extra `audio` brings, or with the program ffmpeg.
"""

import array
import ctypes
import functools
import importlib.util
import io
import math
import re
import shutil
import subprocess
import threading
import wave
import zlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal, cast

if TYPE_CHECKING:
    from av.audio.stream import AudioStream

Format = Literal["mp3", "opus", "aac", "flac", "wav"]
Voice = Literal["espeak-ng", "tone"]

CONTENT_TYPES: Final[dict[Format, str]] = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
}
# FFmpeg's names of the container and of the encoder.
_ENCODERS: Final[dict[Format, tuple[str, str]]] = {
    "opus": ("ogg", "libopus"),
    "aac": ("adts", "aac"),
    "flac": ("flac", "flac"),
}
_ENCODED_RATE: Final = 24_000  # hertz; Opus takes few rates

# Characters per second of the tone: roughly the pace of English speech.
_PACE: Final = 15.0
# The most that is spoken of one text, in seconds: emoji are read out by their names, which takes hours of a long text.
_LONGEST_SPEECH: Final = 3600
# How much text's audio is kept, in characters: some 20 MB as MP3, or 150 MB as WAV.
_CACHED_CHARACTERS: Final = 50_000

# tone.mp3 is eight frames from the middle of a 444.4 Hz sine (16 periods to a frame) made once with lameenc
# (mono, 16 kHz, 96 kbit/s, quality 2). At that bit rate none of them uses the bit reservoir (main_data_begin
# is 0), so every frame stands alone; whole periods fit, so they repeat to any length without a click.
_TONE_RATE: Final = 16_000
_TONE_PERIOD: Final = 36  # samples
_TONE_MP3_SECONDS: Final = 8 * 576 / _TONE_RATE

_LANGUAGE_NAMES: Final = (
    "english:en-us chinese:cmn mandarin:cmn zh:cmn japanese:ja korean:ko german:de french:fr spanish:es "
    "italian:it portuguese:pt-br russian:ru hindi:hi arabic:ar"
)
_KOKORO_LETTERS: Final = "a:en-us b:en e:es f:fr h:hi i:it j:ja p:pt-br z:cmn"
_LANGUAGES: Final = dict(pair.split(":") for pair in _LANGUAGE_NAMES.split())
_KOKORO_LANGUAGES: Final = dict(pair.split(":") for pair in _KOKORO_LETTERS.split())
# The engine reads the file of that name: a path must not lead it to another one.
_LANGUAGE_NAME: Final = re.compile(r"[a-z0-9 ()-]{2,40}")
# First and last letter of a script, and a language written in it. Kana before Han: Japanese has both.
_SCRIPTS: Final = (
    ("\u3040", "\u30ff", "ja"),
    ("\uac00", "\ud7a3", "ko"),
    ("\u4e00", "\u9fff", "cmn"),
    ("\u0370", "\u03ff", "el"),
    ("\u0400", "\u04ff", "ru"),
    ("\u0590", "\u05ff", "he"),
    ("\u0600", "\u06ff", "ar"),
    ("\u0900", "\u097f", "hi"),
)
_WOMEN: Final = (
    "alice aria bella charlotte domi dorothy elli emily freya gigi grace jessica laura lily matilda nicole "
    "rachel sarah alloy coral nova sage shimmer vivian serena ono_anna sohee eve ara zephyr kore wise_woman"
)
_FEMALE: Final = ("f1", "f2", "f3", "f4", "f5", "linda", "steph", "belinda")
_MALE: Final = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8")


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is to be said and how.

    Args:
        text: What is spoken.
        format: What the file is to be, one that there is an encoder for.
        voice: The provider's name of a voice. Each name sounds different, and always the same.
        speed: Factor on the rate of speech; effective from 0.46 to 2.57.
        language: The provider's name (`English`) or ISO code of the language; else told from the script.
    """

    text: str
    format: Format = "mp3"
    voice: str = ""
    speed: float = 1.0
    language: str = ""

    @property
    def words_per_minute(self) -> int:
        """The rate, within what the engine can do; 175 is its normal one."""
        return round(min(450, max(80, 175 * self.speed)))


@dataclass(frozen=True, slots=True)
class Audio:
    """A finished piece of audio: the bytes of the file, and whether they are speech or a tone."""

    data: bytes
    format: Format
    voice: Voice

    @property
    def content_type(self) -> str:
        """The MIME type."""
        return CONTENT_TYPES[self.format]


HUMS: Final = "The sandbox cannot speak here: it hums a tone about as long as the text would take."
TO_SPEAK: Final = "Install the extra `sandbox` of prefect-nanogpt to hear the words."


def can_speak() -> bool:
    """Whether what speaks is installed, and what makes MP3s of it."""
    return _espeak() is not None and importlib.util.find_spec("lameenc") is not None


def can_encode(format: Format) -> bool:
    """Whether there is an encoder for the format. WAV needs none, and a tone is there as MP3."""
    return format not in _ENCODERS or importlib.util.find_spec("av") is not None or shutil.which("ffmpeg") is not None


class Studio:
    """Renders audio off the event loop, once for each distinct utterance, and keeps the newest.

    Args:
        speak: False for tones only, which cost next to nothing.

    Attributes:
        hums: Whether it is to speak and cannot.
    """

    def __init__(self, speak: bool = True) -> None:
        self._speak = speak
        self.hums = speak and not can_speak()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="nanogpt-sandbox-speech")
        self._cache: OrderedDict[Utterance, Future[Audio]] = OrderedDict()
        self._cached_characters = 0
        self._lock = threading.Lock()

    def record(self, utterance: Utterance) -> Future[Audio]:
        """Return the audio, now or soon."""
        with self._lock:
            if utterance in self._cache:
                self._cache.move_to_end(utterance)
                return self._cache[utterance]
            audio = self._threads.submit(render, utterance, self._speak)
            self._cache[utterance] = audio
            self._cached_characters += len(utterance.text)
            while self._cached_characters > _CACHED_CHARACTERS and len(self._cache) > 1:
                oldest, _ = self._cache.popitem(last=False)
                self._cached_characters -= len(oldest.text)
            return audio

    def close(self) -> None:
        """Let go of the threads; what has not begun is not rendered."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def render(utterance: Utterance, speak: bool = True) -> Audio:
    """Render one utterance: speech where the engine is there, else a tone of about that length."""
    engine = _espeak() if speak else None
    pcm = engine.speak(utterance) if engine else b""
    if engine and pcm:
        data = _mp3(pcm, engine.rate) if utterance.format == "mp3" else _encoded(pcm, engine.rate, utterance.format)
        if data:
            return Audio(data, utterance.format, "espeak-ng")
    return Audio(_tone(utterance), utterance.format, "tone")


class _Espeak:
    """The espeak-ng library. It has one global state, so one sentence is spoken at a time in a process."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self._lock = threading.Lock()
        self._pcm = bytearray()
        synchronous, do_not_exit = 2, 0x8000
        data_path = espeakng_loader.get_data_path().encode()
        self.rate: int = self._library.espeak_Initialize(synchronous, 0, data_path, do_not_exit)
        if self.rate <= 0:
            raise OSError("espeak-ng could not be initialised")
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        # The library keeps only the address: without this reference Python would free the callback.
        self._callback = signature(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._pcm += ctypes.string_at(samples, 2 * count)
        return int(len(self._pcm) > 2 * self.rate * _LONGEST_SPEECH)  # 1 ends the synthesis

    def speak(self, utterance: Utterance) -> bytes:
        """Return 16-bit mono samples at `self.rate` hertz; empty when there is nothing to say in the text."""
        language, variant, pitch = _cast(utterance)
        text = utterance.text.replace("\0", " ").encode("utf-8", "replace")
        utf8, rate_parameter, pitch_parameter = 1, 1, 3
        with self._lock:
            self._pcm = bytearray()
            if self._library.espeak_SetVoiceByName(f"{language}+{variant}".encode()):
                self._library.espeak_SetVoiceByName(f"en-us+{variant}".encode())
            self._library.espeak_SetParameter(rate_parameter, utterance.words_per_minute, 0)
            self._library.espeak_SetParameter(pitch_parameter, pitch, 0)
            self._library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, utf8, None, None)
            return bytes(self._pcm)


@functools.cache
def _espeak() -> _Espeak | None:
    """The engine, loaded once, or None where it is not installed or does not start."""
    try:
        return _Espeak()
    except (ImportError, OSError):
        return None


def _cast(utterance: Utterance) -> tuple[str, str, int]:
    """Choose espeak's language, voice variant and pitch (0 to 99) for the provider's voice."""
    voice = utterance.voice.lower()
    number = zlib.crc32(voice.encode())
    kokoro = len(voice) > 3 and voice[2] == "_" and voice[0] in _KOKORO_LANGUAGES and voice[1] in "fm"
    female = voice[1] == "f" if kokoro else voice in _WOMEN.split()
    variants = _FEMALE if female else _MALE
    language = utterance.language.lower()
    if language in ("", "auto"):
        language = _language_of(utterance.text) or (_KOKORO_LANGUAGES[voice[0]] if kokoro else "en-us")
    if not _LANGUAGE_NAME.fullmatch(language):
        language = "en-us"
    return _LANGUAGES.get(language, language), variants[number % len(variants)], 40 + number // 16 % 25


def _language_of(text: str) -> str | None:
    """Tell the language from the script of the text; None for the Latin script."""
    for first, last, language in _SCRIPTS:
        if any(first <= letter <= last for letter in text):
            return language
    return None


def _wav(pcm: bytes, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(pcm)
    return file.getvalue()


def _encoded(pcm: bytes, rate: int, format: Format) -> bytes:
    """Put samples into a file of any format but MP3."""
    wav = _wav(pcm, rate)
    if format == "wav":
        return wav
    try:
        import av
    except ImportError:
        return _by_ffmpeg(wav, format)
    container, encoder = _ENCODERS[format]
    file = io.BytesIO()
    with av.open(io.BytesIO(wav), "r") as source, av.open(file, "w", format=container) as target:
        stream = cast("AudioStream", target.add_stream(encoder, rate=_ENCODED_RATE, layout="mono"))
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return file.getvalue()


def _by_ffmpeg(wav: bytes, format: Format) -> bytes:
    container, encoder = _ENCODERS[format]
    command = ["ffmpeg", "-loglevel", "error", "-i", "pipe:0", "-ar", str(_ENCODED_RATE)]
    command += ["-c:a", encoder, "-f", container, "pipe:1"]
    return subprocess.run(command, input=wav, capture_output=True, check=True).stdout


def _mp3(pcm: bytes, rate: int) -> bytes | None:
    """Encode as MP3; None where the encoder is not installed."""
    try:
        import lameenc
    except ImportError:
        return None
    encoder = lameenc.Encoder()
    encoder.silence()
    encoder.set_channels(1)
    encoder.set_in_sample_rate(rate)
    encoder.set_bit_rate(48)
    encoder.set_quality(7)
    return bytes(encoder.encode(pcm) + encoder.flush())


def _tone(utterance: Utterance) -> bytes:
    seconds = max(0.5, len(utterance.text) / _PACE * 175 / utterance.words_per_minute)
    if utterance.format == "mp3":
        frames = resources.files(__package__).joinpath("tone.mp3").read_bytes()
        return frames * math.ceil(seconds / _TONE_MP3_SECONDS)
    angle = 2 * math.pi / _TONE_PERIOD
    period = array.array("h", (round(6000 * math.sin(angle * n)) for n in range(_TONE_PERIOD)))
    pcm = period.tobytes() * math.ceil(seconds * _TONE_RATE / _TONE_PERIOD)
    return _encoded(pcm, _TONE_RATE, utterance.format)
