"""Audio is what it says it is: told by a decoder, and judged here by another one."""

import json
import random
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.audio import container_of, inspect
from prefect_nanogpt.errors import AudioError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.storage import Destination
from tests.conftest import files_in
from tests.sounds import CONTAINERS, FORMS, played, tone
from tests.test_batch import manifest_in
from tests.test_collect import report_of
from tests.test_paid_once import payloads_where

SECONDS = 3.0
ID3 = b"ID3\x04\x00\x00\x00\x00\x01\x00" + b"TIT2\x00\x00\x00\x05\x00\x00\x03Tag!" + bytes(113)
FAULTS = {"AUDIO_EMPTY", "AUDIO_INVALID", "AUDIO_TRUNCATED"}
NOT_TOLD_BY_ITS_END = "aac", "mp3 without a total", "mp3 of variable rate without a total"
"""Of these, nothing says how long they should be: cut between two frames, they are shorter audio."""


async def save(content: bytes, folder: Path) -> float | None:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    audio = await Destination(folder).save(chunks(), "speech")
    assert audio.is_decoded
    assert Path(audio.location).read_bytes() == content
    return audio.duration_seconds


@pytest.mark.parametrize(
    ("head", "container"),
    [
        (b"ID3\x03\x00\x00\x00\x00\x00\x00", "mp3"),
        (b"\xff\xfb\x90\x64\x00\x00", "mp3"),
        (b"\xff\xf3\x40\xc0\x00\x00", "mp3"),
        (b"\xff\xf2\x40\xc0\x00\x00", "mp3"),
        (b"\xff\xe3\x18\xc4\x00\x00", "mp3"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "wav"),
        (b"RF64\xff\xff\xff\xffWAVEds64", "wav"),
        (b"BW64\xff\xff\xff\xffWAVEds64", "wav"),
        (b"OggS\x00\x02\x00\x00", "ogg"),
        (b"fLaC\x00\x00\x00\x22", "flac"),
        (b"\x00\x00\x00\x20ftypM4A ", "mp4"),
        (b"\xff\xf1\x50\x80\x00\x00", "aac"),
        (b"\xff\xf9\x50\x80\x00\x00", "aac"),
        (b"RIFF\x24\x00\x00\x00AVI LIST", None),
        (b"RIFF", None),
        (b"\xff\xff\xff\xff", None),
        (b"\xff\xfe<\x00h\x00", None),
        (b"\xff\xfb", None),
        (b"\xff\xeb\x90\x64", None),
        (b"<!doctype html>", None),
        (b'{"error": "expired"}', None),
        (b"%PDF-1.7", None),
        (b"PK\x03\x04", None),
        (bytes(12), None),
        (b"", None),
    ],
)
def test_the_container_is_told_by_the_first_bytes(head: bytes, container: str | None) -> None:
    assert container_of(head[:12]) == container


def float_wav(*samples: float, channels: int = 1, rate: int = 8_000) -> bytes:
    """A WAV file of 32-bit floating-point samples."""
    data = struct.pack(f"<{len(samples)}f", *samples)
    head = struct.pack("<HHIIHHH", 3, channels, rate, 4 * channels * rate, 4 * channels, 32, 0)
    chunks = b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize(
    ("samples", "channels", "peak"),
    [
        ([0.5, -0.25] * 8_000, 1, 50),
        ([0.25, -0.5] * 8_000, 1, 50),
        ([0.0, 0.3] * 8_000, 2, 30),
        ([0.3, -0.3] * 8_000, 2, 30),
        ([2.0, -2.0] * 8_000, 1, 100),
        ([float("nan")] * 8_000, 1, 100),
        ([float("inf")] * 8_000, 1, 100),
    ],
    ids=["above", "below", "one channel", "channels that cancel out", "too loud", "no number", "infinite"],
)
def test_the_outline_is_of_the_loudest_channel(samples: list[float], channels: int, peak: int, tmp_path: Path) -> None:
    path = tmp_path / "tone"
    path.write_bytes(float_wav(*samples, channels=channels))
    assert set(inspect(path).peaks) <= {peak, peak - 1}  # 0.3 is a little less as a binary number


@pytest.mark.parametrize("sample_format", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_the_outline_is_the_same_however_samples_are_written(sample_format: str, tmp_path: Path) -> None:
    outlines = []
    for codec in ("pcm_s16le", sample_format):
        path = tmp_path / f"{codec}.wav"
        source = ["-f", "lavfi", "-i", "sine=frequency=300:sample_rate=24000:duration=1,volume=4"]
        subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *source, "-c:a", codec, str(path)], check=True)
        outlines.append(inspect(path).peaks)
    assert max(outlines[0]) > 20
    assert all(abs(one - other) <= 1 for one, other in zip(*outlines, strict=True))


@pytest.mark.parametrize("form", FORMS)
class TestEveryForm:
    async def test_whole_audio_is_saved_and_its_duration_is_what_plays(self, form: str, tmp_path: Path) -> None:
        duration = await save(tone(form, SECONDS), tmp_path)
        [path] = files_in(tmp_path)
        assert path.name == f"speech.{CONTAINERS[form]}"
        assert duration == pytest.approx(played(path), abs=0.1)
        assert duration == pytest.approx(SECONDS, abs=0.1)

    async def test_its_outline_is_drawn_over_its_length(self, form: str, tmp_path: Path) -> None:
        path = tmp_path / "tone"
        path.write_bytes(tone(form, SECONDS))
        peaks = inspect(path).peaks
        assert len(peaks) == 120
        assert min(peaks[2:-2]) > 3
        assert max(peaks) < 60

    @pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
    async def test_what_is_cut_is_never_saved(self, form: str, share: float, tmp_path: Path) -> None:
        content = tone(form, SECONDS)
        cut = content[: int(len(content) * share) // 2 * 2 + 1]
        with pytest.raises(AudioError, match="AUDIO_TRUNCATED: The audio was cut short: ") as caught:
            await save(cut, tmp_path)
        assert caught.value.retryable
        assert list(tmp_path.iterdir()) == []

    async def test_a_header_alone_is_no_audio(self, form: str, tmp_path: Path) -> None:
        content = tone(form, SECONDS)
        for size in (12, 20, 44, 100):
            with pytest.raises(AudioError) as caught:
                await save(content[:size], tmp_path)
            assert caught.value.code in FAULTS
            assert caught.value.retryable
        assert list(tmp_path.iterdir()) == []

    async def test_wherever_it_is_cut_it_is_refused_or_plays_what_is_said(self, form: str, tmp_path: Path) -> None:
        content = tone(form, SECONDS)
        random_size = random.Random(form)
        for _ in range(25):
            size = random_size.randrange(1, len(content) - 1)
            try:
                duration = await save(content[:size], tmp_path)
            except AudioError:
                continue
            [path] = files_in(tmp_path)
            assert duration == pytest.approx(played(path, complaints=True), abs=0.1)
            # What is missing is not to be heard, or nothing says that it was ever there.
            assert duration > SECONDS - 0.1 or form in NOT_TOLD_BY_ITS_END
            path.unlink()


async def test_a_tag_alone_is_no_audio(tmp_path: Path) -> None:
    for content in (ID3, ID3 + ID3, ID3[:10], ID3 + bytes(400)):
        with pytest.raises(AudioError) as caught:
            await save(content, tmp_path)
        assert caught.value.code in FAULTS
    assert list(tmp_path.iterdir()) == []


async def test_a_wav_header_of_44_bytes_is_no_audio(tmp_path: Path) -> None:
    for size in (0, 40_000, 0xFFFF_FFFF):
        header = struct.pack(
            "<4sI4s4sIHHIIHH4sI", b"RIFF", size, b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", size
        )
        assert len(header) == 44
        with pytest.raises(AudioError, match="AUDIO_EMPTY: There is no sound in the audio"):
            await save(header, tmp_path)


@pytest.mark.parametrize("form", ["mp3", "flac", "aac", "ogg opus", "ogg vorbis", "ogg flac"])
async def test_a_tag_before_the_audio_is_passed_over(form: str, tmp_path: Path) -> None:
    duration = await save(ID3 + tone(form, SECONDS), tmp_path)
    [path] = files_in(tmp_path)
    assert path.suffix == f".{CONTAINERS[form]}"
    assert duration == pytest.approx(SECONDS, abs=0.1)
    assert played(path) == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("form", ["wav", "m4a"])
async def test_a_tag_before_audio_whose_players_look_only_at_the_beginning_is_refused(
    form: str, tmp_path: Path
) -> None:
    with pytest.raises(AudioError, match=rf"AUDIO_INVALID: .*It is a {CONTAINERS[form]} behind a tag"):
        await save(ID3 + tone(form, SECONDS), tmp_path)
    (tmp_path / "tone").write_bytes(ID3 + tone(form, SECONDS))
    with pytest.raises(subprocess.CalledProcessError):
        played(tmp_path / "tone")


@pytest.mark.parametrize("stray", ["zeros", "the rest of a frame", "a line"])
@pytest.mark.parametrize(
    "form", ["mp3", "mp3 without a total", "mp3 of variable rate", "aac", "flac", "ogg opus", "ogg vorbis"]
)
async def test_stray_bytes_before_the_audio_are_passed_over(form: str, stray: str, tmp_path: Path) -> None:
    content = tone(form, SECONDS)
    before = {"zeros": bytes(300), "the rest of a frame": content[-150:], "a line": b"HTTP/1.1 200 OK\r\n\r\n"}
    duration = await save(before[stray] + content, tmp_path)
    [path] = files_in(tmp_path)
    assert path.suffix == f".{CONTAINERS[form]}"
    assert duration == pytest.approx(played(path, complaints=True), abs=0.1)
    assert duration == pytest.approx(SECONDS, abs=0.1)


async def test_frames_far_behind_something_else_are_no_audio(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="AUDIO_INVALID"):
        await save(b"%PDF-1.7\n" + bytes(70_000) + tone("mp3", SECONDS), tmp_path)


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), b"APETAGEX" + bytes(100), bytes(500), ID3], ids=str)
@pytest.mark.parametrize("form", ["mp3", "mp3 without a total", "mp3 of variable rate"])
async def test_what_follows_the_last_frame_of_an_mp3_does_not_make_it_cut(
    form: str, tail: bytes, tmp_path: Path
) -> None:
    assert await save(tone(form, SECONDS) + tail, tmp_path) == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("tail", [bytes(64), b"error: the upstream has closed the connection\n"], ids=str)
@pytest.mark.parametrize("form", FORMS)
async def test_what_is_behind_whole_audio_does_not_make_it_cut(form: str, tail: bytes, tmp_path: Path) -> None:
    assert await save(tone(form, SECONDS) + tail, tmp_path) == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize(
    "forms",
    [
        ("mp3", "mp3", "mp3"),
        ("mp3", "mp3 of variable rate"),
        ("mp3 without a total",) * 2,
        ("ogg opus",) * 2,
        ("ogg vorbis",) * 2,
        ("flac",) * 2,
        ("aac",) * 2,
        ("wav",) * 2,
    ],
    ids=" + ".join,
)
async def test_files_that_were_joined_byte_by_byte_last_as_long_as_they_play(
    forms: tuple[str, ...], tmp_path: Path
) -> None:
    duration = await save(b"".join(tone(form, SECONDS) for form in forms), tmp_path)
    [path] = files_in(tmp_path)
    assert duration == pytest.approx(played(path, complaints=True), abs=0.1)
    # Of two WAVs in a row every player plays the first.
    assert duration == pytest.approx(SECONDS * (1 if forms[0] == "wav" else len(forms)), abs=0.2)


@pytest.mark.parametrize(
    "forms",
    [("ogg opus", "ogg vorbis"), ("ogg vorbis", "ogg flac"), ("ogg flac", "ogg opus", "ogg opus")],
    ids=" + ".join,
)
async def test_chained_streams_of_any_form_last_as_long_as_each_of_them_plays(
    forms: tuple[str, ...], tmp_path: Path
) -> None:
    # The judge is asked about each by itself: of streams of several codecs it plays the first only.
    seconds = 0.0
    for number, form in enumerate(forms):
        link = tmp_path / f"{number}"
        link.write_bytes(tone(form, SECONDS + number))
        seconds += played(link)
        link.unlink()
    content = b"".join(tone(form, SECONDS + number) for number, form in enumerate(forms))
    assert await save(content, tmp_path) == pytest.approx(seconds, abs=0.1)
    with pytest.raises(AudioError, match="AUDIO_TRUNCATED"):
        await save(content[:-2000], tmp_path)


@pytest.mark.parametrize("tail", [*range(1, 12), 100, 1000])
async def test_what_is_behind_the_last_frame_of_an_aac_is_no_missed_sound(tail: int, tmp_path: Path) -> None:
    assert await save(tone("aac", SECONDS) + bytes(tail), tmp_path) == pytest.approx(SECONDS, abs=0.1)
    if tail > 1:
        filled = tone("aac", SECONDS) + b"\xff" * tail
        assert await save(filled, tmp_path / "filled") == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith(("m4a", "wav with sizes"))])
async def test_audio_that_was_written_as_a_stream_is_whole(form: str, tmp_path: Path) -> None:
    content = tone(form, SECONDS, is_streamed=True)
    duration = await save(content, tmp_path)
    [path] = files_in(tmp_path)
    assert duration == pytest.approx(played(path), abs=0.1)
    assert duration == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("size", [0, 0x7FFF_0000, 0x7FFF_FFFF, 0xFFFF_FFFF])
async def test_a_wav_whose_size_is_not_known_plays_to_its_end(size: int, tmp_path: Path) -> None:
    content = bytearray(tone("wav", SECONDS))
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = struct.pack("<I", size)
    assert await save(bytes(content), tmp_path) == pytest.approx(SECONDS, abs=0.01)


async def test_a_flac_without_a_total_plays_to_its_end(tmp_path: Path) -> None:
    content = bytearray(tone("flac", SECONDS))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert await save(bytes(content), tmp_path) == pytest.approx(SECONDS, abs=0.01)


async def test_a_video_without_sound_is_no_audio(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    source = ["-f", "lavfi", "-i", "testsrc=duration=1:size=64x64"]
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", *source, str(path)], check=True)
    with pytest.raises(AudioError, match=r"AUDIO_INVALID: This is not audio\. The mp4 has no sound track that can"):
        inspect(path)


@pytest.mark.parametrize("length", [2**32, 2**63 - 1, 2**64 - 1])
async def test_an_mp4_that_says_it_is_larger_than_any_file_is_cut(length: int, tmp_path: Path) -> None:
    box = struct.pack(">I4sQ", 1, b"mdat", length)
    with pytest.raises(AudioError, match="AUDIO_TRUNCATED"):
        await save(b"\0\0\0\x10ftypM4A \0\0\0\0" + box + bytes(100), tmp_path)


WITHOUT_DECODER = """
import json, sys
sys.modules["av"] = None
from pathlib import Path
from prefect_nanogpt.audio import inspect
from prefect_nanogpt.errors import AudioError
for path in map(Path, sys.argv[1:]):
    try:
        print(json.dumps(inspect(path)))
    except AudioError as error:
        print(json.dumps(error.code))
"""


def test_without_a_decoder_the_bytes_still_tell_what_they_can(tmp_path: Path) -> None:
    contents = {
        "whole.wav": tone("wav", SECONDS),
        "half.wav": tone("wav", SECONDS)[:50_000],
        "header.wav": tone("wav", SECONDS)[:44],
        "whole.mp3": tone("mp3", SECONDS),
        "joined.mp3": tone("mp3", SECONDS) * 2,
        "half.mp3": tone("mp3", SECONDS)[:10_000],
        "tag.mp3": ID3,
        "whole.flac": tone("flac", SECONDS),
        "half.ogg": tone("ogg opus", SECONDS)[:10_000],
        "half.m4a": tone("m4a", SECONDS)[:10_000],
        "page.mp3": b"<!doctype html>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", WITHOUT_DECODER, *(str(tmp_path / name) for name in contents)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert dict(zip(contents, map(json.loads, told), strict=True)) == {
        "whole.wav": ["wav", pytest.approx(SECONDS), [], False],
        "half.wav": "AUDIO_TRUNCATED",
        "header.wav": "AUDIO_EMPTY",
        "whole.mp3": ["mp3", None, [], False],
        "joined.mp3": ["mp3", None, [], False],
        "half.mp3": "AUDIO_TRUNCATED",
        "tag.mp3": "AUDIO_EMPTY",
        "whole.flac": ["flac", None, [], False],
        "half.ogg": "AUDIO_TRUNCATED",
        "half.m4a": "AUDIO_TRUNCATED",
        "page.mp3": "AUDIO_INVALID",
    }


@pytest.fixture
def terms(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


class TestWhatIsSaidOfIt:
    async def test_row_manifest_event_and_report_have_the_duration_that_plays(
        self, terms: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        joined = Answer(body=tone("mp3", SECONDS) * 4)
        sandbox.on_audio(None, [joined, joined])

        [row] = await text_to_speech_batch([{"id": "a", "text": "Four in a row."}], **terms)
        state = await text_to_speech("Four more in a row.", **terms, return_state=True)

        audio = await state.aresult()
        plays = played(str(row.location), complaints=True)
        assert plays == pytest.approx(4 * SECONDS, abs=0.2)
        for duration in (row.duration_seconds, manifest_in(save_to)["a"].duration_seconds, audio.duration_seconds):
            assert duration == pytest.approx(plays, abs=0.1)
        for about in (row, audio):
            assert about.ticket is not None
            [event] = [
                sent for said, sent in await payloads_where("run_id", about.ticket.run_id) if said == "completed"
            ]
            assert event["duration_seconds"] == pytest.approx(plays, abs=0.1)
        report = await report_of(state.state_details.flow_run_id)
        assert f"{audio.duration_seconds:.2f} s" in report
        assert "saved and verified" in report

    async def test_the_duration_that_the_provider_says_is_not_taken_for_what_plays(
        self, terms: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        sandbox.on_audio(None, [Answer(body=tone("mp3", SECONDS) * 4)] * 2)
        said = {"audioUrl": f"{sandbox.audio_url}/a.mp3", "duration": 3.0}
        sandbox.on_submit([Answer(json=said)])

        state = await text_to_speech("At once.", **terms, return_state=True)

        audio = await state.aresult()
        assert (audio.duration_seconds, audio.peaks, audio.is_decoded) == (None, (), False)
        report = await report_of(state.state_details.flow_run_id)
        assert "Its sound was not checked" in report
        assert "verified" not in report

    async def test_half_a_file_of_a_line_is_fetched_again_and_harms_no_other(
        self, terms: dict[str, Any], sandbox: Sandbox
    ) -> None:
        half = tone("wav", SECONDS)[:30_001]
        sandbox.on_audio(None, [Answer(body=half), None, Answer(body=half)])
        rows = await text_to_speech_batch([{"id": f"{n}", "text": f"Line {n}."} for n in range(3)], **terms)
        assert all(row.is_completed and row.duration_seconds for row in rows)
        assert len(sandbox.requests("audio")) == 5
        assert len(sandbox.ledger.charges) == 3


FUZZ = """
import random, sys
from pathlib import Path
from prefect_nanogpt.audio import inspect
from prefect_nanogpt.errors import AudioError

content, path, tries = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])
dice = random.Random(sys.argv[3] + Path(sys.argv[1]).name)
refused = 0
for number in range(tries):
    broken = bytearray(content)
    for _ in range(dice.choice([1, 3, 30, 300])):
        at = dice.randrange(dice.choice([64, len(broken)]))
        broken[at] = dice.choice([0, 0xFF, 0x7F, dice.randrange(256)])
    if number % 3 == 0:
        at = dice.randrange(len(broken))
        del broken[at : at + dice.randrange(2000)]
    path.write_bytes(broken)
    try:
        inspect(path)
    except AudioError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("form", FORMS)
def test_broken_audio_neither_crashes_nor_hangs_the_decoder(form: str, tmp_path: Path) -> None:
    (tmp_path / "tone").write_bytes(tone(form, 0.5))
    command = [sys.executable, "-c", FUZZ, str(tmp_path / "tone"), str(tmp_path / "broken"), "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 5
