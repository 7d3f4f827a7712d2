"""Real audio to test with, and a decoder that is not the product's to judge by."""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from imageio_ffmpeg import get_ffmpeg_exe

DECODED_RATE = 16_000
FORMS = {
    "mp3": ("mp3", "-ar", "24000", "-ac", "1", "-b:a", "64k"),
    "mp3 of variable rate": ("mp3", "-ar", "44100", "-ac", "2", "-q:a", "4"),
    "mp3 without a total": ("mp3", "-ar", "24000", "-ac", "1", "-b:a", "64k", "-write_xing", "0"),
    "mp3 of variable rate without a total": ("mp3", "-ar", "44100", "-ac", "1", "-q:a", "4", "-write_xing", "0"),
    "wav": ("wav", "-ar", "24000", "-ac", "1"),
    "wav with sizes of 64 bits": ("wav", "-ar", "24000", "-ac", "1", "-rf64", "always"),
    "wav of floats": ("wav", "-ar", "48000", "-ac", "2", "-c:a", "pcm_f32le"),
    "flac": ("flac", "-ar", "24000", "-ac", "1"),
    "ogg opus": ("ogg", "-ar", "48000", "-ac", "1", "-c:a", "libopus"),
    "ogg vorbis": ("ogg", "-ar", "44100", "-ac", "2", "-c:a", "libvorbis"),
    "ogg flac": ("ogg", "-ar", "24000", "-ac", "1", "-c:a", "flac"),
    "m4a": ("mp4", "-ar", "44100", "-ac", "1", "-c:a", "aac"),
    "m4a with its index first": ("mp4", "-ar", "44100", "-ac", "1", "-c:a", "aac", "-movflags", "+faststart"),
    "aac": ("adts", "-ar", "44100", "-ac", "1", "-c:a", "aac"),
}
"""The muxer and the options with which ffmpeg makes each form."""
CONTAINERS = {form: {"adts": "aac"}.get(muxer, muxer) for form, (muxer, *_) in FORMS.items()}


@cache
def tone(form: str = "mp3", seconds: float = 0.2, *, is_streamed: bool = False) -> bytes:
    """Make a tone with a little noise in it; as a stream, whose writer cannot go back to write a size or an index."""
    muxer, *own = FORMS[form]
    source = f"sine=duration={seconds} [a]; anoisesrc=duration={seconds}:amplitude=0.05:seed=1 [b]; [a][b] amix"
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", source, *own]
    command += ["-metadata", "title=A part", "-f", muxer]
    if is_streamed:
        return subprocess.run([*command, "pipe:1"], capture_output=True, check=True).stdout
    with TemporaryDirectory() as folder:
        path = Path(folder, "tone")
        subprocess.run([*command, str(path)], check=True)
        return path.read_bytes()


def decoded(content: bytes) -> bytes:
    """Decode audio with ffmpeg to samples of 16 bits, mono."""
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", "pipe:0", "-f", "s16le", "-ac", "1"]
    command += ["-ar", f"{DECODED_RATE}", "pipe:1"]
    return subprocess.run(command, input=content, capture_output=True, check=True).stdout


def played(path: str | Path, *, complaints: bool = False, by_its_clock: bool = False) -> float:
    """Decode a file with ffmpeg and give its length in seconds; it must have nothing to complain about.

    By its clock, each packet is played at the time that the file says, over what was there before.
    """
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
    command += ["-af", "aresample=async=1000"] if by_its_clock else []
    command += ["-f", "s16le", "-ac", "1", "-ar", "8000", "-"]
    done = subprocess.run(command, capture_output=True, check=not complaints)
    assert complaints or done.stderr == b""
    return len(done.stdout) / 2 / 8000
