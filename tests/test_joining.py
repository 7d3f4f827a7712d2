"""Several files made one: as long as all of them, and encoded anew only where it must be."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import av
import fsspec
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from prefect import flow

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import AudioError, NanoGPTError, StorageError
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.joining import join
from prefect_nanogpt.models import AudioFile, PollSchedule
from prefect_nanogpt.tasks import join_audio
from tests.conftest import files_in
from tests.sounds import CONTAINERS, FORMS, decoded, played, tone

COPIED = (
    "mp3",
    "mp3 of variable rate",
    "wav",
    "wav with sizes of 64 bits",
    "wav of floats",
    "ogg opus",
    "ogg vorbis",
    "m4a",
    "aac",
)


def written(folder: Path, *pieces: tuple[str, float]) -> list[Path]:
    """Write pieces of some form and length."""
    paths = [folder / f"{number}.{CONTAINERS[form]}" for number, (form, _) in enumerate(pieces)]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(tone(*piece))
    return paths


def is_loud_at(path: Path, *seconds: float) -> bool:
    """Whether there is sound at each of the times, heard for 0.1 s."""
    samples = memoryview(decoded(path.read_bytes())).cast("h")
    return all(
        max(map(abs, samples[int(second * 16_000) : int(second * 16_000) + 1600]), default=0) > 300
        for second in seconds
    )


def length(paths: Sequence[Path], gap_seconds: float = 0.0) -> float:
    return sum(map(played, paths)) + gap_seconds * (len(paths) - 1)


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    folder = tmp_path / "pieces"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("form", FORMS)
class TestPiecesOfOneForm:
    def test_the_whole_is_as_long_as_its_pieces(self, form: str, pieces: Path, tmp_path: Path) -> None:
        files = written(pieces, (form, 9.0), (form, 11.0), (form, 10.0))
        assert join(files, tmp_path / "whole") == CONTAINERS[form]
        assert played(tmp_path / "whole") == pytest.approx(length(files), rel=0.01)
        assert b"A part" not in (tmp_path / "whole").read_bytes()[20_000:]

    def test_silence_goes_between(self, form: str, pieces: Path, tmp_path: Path) -> None:
        files = written(pieces, (form, 4.0), (form, 4.0), (form, 4.0))
        join(files, tmp_path / "whole", gap_seconds=1.5)
        assert played(tmp_path / "whole") == pytest.approx(length(files, 1.5), abs=0.3)
        samples = memoryview(decoded((tmp_path / "whole").read_bytes())).cast("h")
        for second, is_silent in ((3, False), (4.8, True), (7, False), (10.3, True), (13, False)):
            loudest = max(map(abs, samples[int(second * 16_000) : int(second * 16_000) + 3000]))
            assert (loudest < 300) == is_silent


@pytest.mark.parametrize("form", COPIED)
def test_what_has_one_form_is_not_encoded_anew(form: str, pieces: Path, tmp_path: Path) -> None:
    files = written(pieces, (form, 3.0), (form, 5.0))
    join(files, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for file in files:
        content = file.read_bytes()
        # Somewhere in the middle of each piece, where no header is.
        assert content[len(content) // 2 : len(content) // 2 + 100] in whole


@pytest.mark.parametrize("first", ["mp3", "wav", "ogg opus"])
def test_only_what_differs_is_encoded(first: str, pieces: Path, tmp_path: Path) -> None:
    files = written(pieces, (first, 6.0), ("mp3 of variable rate", 6.0), ("m4a", 6.0), (first, 8.0))
    assert join(files, tmp_path / "whole", gap_seconds=0.5) == CONTAINERS[first]
    assert played(tmp_path / "whole") == pytest.approx(length(files, 0.5), rel=0.01)
    for file in (files[0], files[3]):
        content = file.read_bytes()
        assert content[len(content) // 2 : len(content) // 2 + 100] in (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_whatever_follows_is_converted_to_what_is_first(first: str, second: str, pieces: Path, tmp_path: Path) -> None:
    files = written(pieces, (first, 4.0), (second, 4.0))
    assert join(files, tmp_path / "whole") == CONTAINERS[first]
    assert played(tmp_path / "whole") == pytest.approx(length(files), abs=0.15)


@pytest.mark.parametrize("container", ["mp3", "wav", "ogg", "flac", "mp4", "aac"])
def test_another_container_is_made_where_it_is_asked_for(container: str, pieces: Path, tmp_path: Path) -> None:
    files = written(pieces, ("mp3", 4.0), ("ogg vorbis", 4.0), ("wav of floats", 4.0))
    assert join(files, tmp_path / "whole", container, 0.5) == container
    assert played(tmp_path / "whole") == pytest.approx(length(files, 0.5), abs=0.3)


def test_chained_pieces_are_joined_whole(pieces: Path, tmp_path: Path) -> None:
    chained = pieces / "chained.ogg"
    chained.write_bytes(tone("ogg opus", 4.0) + tone("ogg opus", 5.0))
    join([chained, chained, *written(pieces, ("ogg opus", 3.0))], tmp_path / "whole")
    assert played(tmp_path / "whole") == pytest.approx(21.0, rel=0.01)


@pytest.mark.parametrize("forms", [("ogg vorbis", "ogg vorbis"), ("ogg vorbis", "ogg opus"), ("ogg opus", "ogg flac")])
def test_what_was_chained_is_one_stream_afterwards(forms: tuple[str, str], pieces: Path, tmp_path: Path) -> None:
    chained = pieces / "chained.ogg"
    chained.write_bytes(tone(forms[0], 4.0) + tone(forms[1], 5.0))
    join([chained, chained], tmp_path / "whole", gap_seconds=1)
    assert played(tmp_path / "whole") == pytest.approx(19.0, rel=0.01)
    assert is_loud_at(tmp_path / "whole", 2.0, 7.0, 12.0, 17.0)


@pytest.mark.parametrize("form", ["mp3", "mp3 of variable rate", "ogg opus", "wav"])
def test_many_gaps_do_not_add_up_to_another_length(form: str, pieces: Path, tmp_path: Path) -> None:
    files = [*written(pieces, (form, 2.0)) * 60, *written(pieces, ("m4a", 2.0)) * 3]
    join(files, tmp_path / "whole", gap_seconds=1)
    assert played(tmp_path / "whole") == pytest.approx(60 * played(files[0]) + 3 * played(files[-1]) + 62, abs=0.3)


@pytest.mark.parametrize("form", ["ogg opus", "ogg vorbis", "mp3", "m4a", "aac", "wav"])
def test_the_last_of_many_short_pieces_is_heard_to_its_end(form: str, pieces: Path, tmp_path: Path) -> None:
    files = written(pieces, (form, 0.31)) * 80
    join(files, tmp_path / "whole")
    # Also by its time stamps, which must not go back.
    assert played(tmp_path / "whole", by_its_clock=True) == pytest.approx(played(tmp_path / "whole"), abs=0.1)
    samples = memoryview(decoded((tmp_path / "whole").read_bytes())).cast("h")
    seconds = len(samples) / 16_000
    assert seconds >= 80 * played(files[0]) - 0.05
    assert is_loud_at(tmp_path / "whole", seconds - 0.15)


@pytest.mark.parametrize(("sample_format", "first", "to"), [("s32", "flac", "wav"), ("flt", "wav", "flac")])
def test_samples_of_more_than_16_bits_keep_them(
    sample_format: str, first: str, to: str, pieces: Path, tmp_path: Path
) -> None:
    quiet = ["-f", "lavfi", "-i", "sine=duration=1:frequency=440,volume=0.0004"]
    codec = ["-c:a", "pcm_f32le"] if first == "wav" else ["-sample_fmt", "s32"]
    piece = pieces / f"quiet.{first}"
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", *quiet, *codec, str(piece)], check=True)
    join([piece], tmp_path / "whole", to)
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", str(tmp_path / "whole"), "-f", "s32le", "-"]
    samples = memoryview(subprocess.run(command, capture_output=True, check=True).stdout).cast("i")
    # With 16 bits, samples this quiet would have next to no values between zero and their loudest.
    assert len(set(samples)) > 300


@pytest.mark.parametrize(("container", "first"), [("mp4", "aac"), ("ogg", "aac"), ("mp3", "mp3 without a total")])
def test_a_quiet_beginning_does_not_make_the_whole_poor(
    container: str, first: str, pieces: Path, tmp_path: Path
) -> None:
    muxer, *options = FORMS[first]
    quiet = "aevalsrc='if(lt(t,1),0,0.4*sin(2*PI*440*t)+0.2*sin(2*PI*3000*t)+0.1*random(0))':d=6:s=44100"
    piece = pieces / f"quiet.{CONTAINERS[first]}"
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", quiet, *options, "-f", muxer, str(piece)]
    subprocess.run(command, check=True)
    join([piece, *written(pieces, ("wav", 1.0))], tmp_path / "whole", container)
    assert (tmp_path / "whole").stat().st_size * 8 / 6 > 50_000


def test_a_gain_that_a_header_has_is_kept(pieces: Path, tmp_path: Path) -> None:
    loud, soft = written(pieces, ("ogg opus", 2.0), ("ogg opus", 2.0))
    with av.open(str(loud)) as source, av.open(str(soft), "w", format="ogg") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        head = bytearray(stream.codec_context.extradata or b"")
        head[16:18] = (-20 * 256).to_bytes(2, "little", signed=True)
        stream.codec_context.extradata = bytes(head)
        for packet in source.demux(source.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    loudest = {path: loudness(path) for path in (loud, soft)}
    assert loudest[soft] < loudest[loud] / 8
    for files in ([loud, soft], [soft, loud]):
        join(files, tmp_path / "whole", gap_seconds=0.5)
        samples = memoryview(decoded((tmp_path / "whole").read_bytes())).cast("h")
        for path, start in zip(files, (0.5, 3.0), strict=True):
            here = samples[int(start * 16_000) : int((start + 1) * 16_000)]
            assert max(map(abs, here)) == pytest.approx(loudest[path], rel=0.3)


def loudness(path: Path) -> int:
    return max(map(abs, memoryview(decoded(path.read_bytes())).cast("h")[8_000:24_000]))


def test_mp3_of_a_higher_rate_than_opus_takes_is_converted(pieces: Path, tmp_path: Path) -> None:
    source = ["-f", "lavfi", "-i", "sine=duration=3", "-ac", "1", "-b:a", "320k"]
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", *source, str(pieces / "a.mp3")], check=True)
    assert join([pieces / "a.mp3"], tmp_path / "whole", "ogg") == "ogg"
    assert played(tmp_path / "whole") == pytest.approx(3.0, abs=0.1)


def test_what_is_no_audio_is_not_joined(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"nothing to hear")
    with pytest.raises(AudioError, match="AUDIO_INVALID"):
        join([tmp_path / "a"], tmp_path / "whole")


class TestTheTask:
    async def test_an_episode_is_made_of_the_rows_of_a_batch(
        self, credentials: NanoGPTCredentials, quick: PollSchedule, tmp_path: Path
    ) -> None:
        @flow
        async def episode() -> AudioFile:
            lines = [{"id": "one", "text": "The first line."}, {"id": "two", "text": "The second line."}]
            rows = await text_to_speech_batch(lines, save_to=tmp_path / "lines", credentials=credentials, poll=quick)
            return await join_audio(rows, tmp_path / "Episode 1.mp3", gap_seconds=0.5)

        audio = await episode()

        assert audio.location == str(tmp_path / "Episode 1.mp3")
        items = [path for path in files_in(tmp_path / "lines") if path.suffix == ".mp3"]
        assert len(items) == 2
        assert audio.duration_seconds == pytest.approx(played(audio.location), abs=0.1)
        assert audio.duration_seconds == pytest.approx(length(items, 0.5), abs=0.2)
        assert audio.is_decoded

    @pytest.mark.parametrize(
        ("to", "name", "container"),
        [
            ("whole", "whole.mp3", "mp3"),
            ("chapter 1.2", "chapter 1.2.mp3", "mp3"),
            ("whole.wav", "whole.wav", "wav"),
            ("whole.OPUS", "whole.OPUS", "ogg"),
            ("whole.m4a", "whole.m4a", "mp4"),
            ("whole.flac", "whole.flac", "flac"),
        ],
    )
    async def test_the_extension_says_what_to_make(
        self, to: str, name: str, container: str, pieces: Path, tmp_path: Path
    ) -> None:
        audio = await join_audio(written(pieces, ("mp3", 2.0), ("wav", 2.0)), tmp_path / to)
        assert (audio.container, audio.location) == (container, str(tmp_path / name))
        assert played(audio.location) == pytest.approx(4.0, abs=0.2)

    async def test_a_container_can_be_asked_for(self, pieces: Path, tmp_path: Path) -> None:
        for container in ("ogg", "Opus"):
            audio = await join_audio(written(pieces, ("mp3", 1.0)), tmp_path / "whole", container=container)
            assert audio.location == str(tmp_path / "whole.ogg")

    async def test_other_audio_of_that_name_is_kept(self, pieces: Path, tmp_path: Path) -> None:
        one, two = written(pieces, ("mp3", 1.0), ("mp3", 2.0))
        first = await join_audio([one], tmp_path / "whole.mp3")
        second = await join_audio([two], tmp_path / "whole.mp3")
        assert first.location == second.location
        assert sorted(path.name for path in files_in(tmp_path)) == [f"whole.{first.sha256[:8]}.mp3", "whole.mp3"]

    async def test_files_come_from_and_go_to_any_file_system(self, pieces: Path) -> None:
        fs = fsspec.filesystem("memory")
        for path in written(pieces, ("mp3", 1.0), ("mp3", 2.0)):
            fs.put_file(str(path), f"/items/{path.name}")
        audio = await join_audio(["memory://items/0.mp3", "memory://items/1.mp3"], "memory://shows/whole.mp3")
        assert fs.cat_file("/shows/whole.mp3")
        assert audio.location == "memory:///shows/whole.mp3"
        assert audio.duration_seconds == pytest.approx(3.0, abs=0.1)

    @pytest.mark.parametrize("form", FORMS)
    async def test_half_a_file_is_not_joined_and_is_named(self, form: str, pieces: Path, tmp_path: Path) -> None:
        [piece] = written(pieces, ("mp3", 1.0))
        half = pieces / f"half.{CONTAINERS[form]}"
        half.write_bytes(tone(form, 2.0)[: len(tone(form, 2.0)) // 2])
        with pytest.raises(AudioError, match=f"(AUDIO_TRUNCATED|AUDIO_EMPTY): {half}: ") as caught:
            await join_audio([piece, half], tmp_path / "whole.mp3")
        assert not caught.value.retryable
        assert files_in(tmp_path) == []

    async def test_what_cannot_be_joined_is_explained(self, pieces: Path, tmp_path: Path) -> None:
        [piece] = written(pieces, ("mp3", 1.0))
        row = {"id": "a", "text": "One.", "outcome": "TTS_FAILED", "job": "0"}
        from prefect_nanogpt.lines import ManifestRow

        for files, to, container, says in (
            ([], "whole.mp3", None, "INVALID_REQUEST: There are no files to join"),
            (
                [piece, ManifestRow.model_validate(row)],
                "whole.mp3",
                None,
                "INVALID_REQUEST: There is no audio at place 2",
            ),
            ([piece], "whole", "midi", "INVALID_REQUEST: 'midi' is no container"),
            ([piece], "whole.mp3", "wav", "INVALID_REQUEST: `to` ends with .mp3, and `container` is 'wav'"),
            (piece, "whole.mp3", None, "INVALID_REQUEST: `files` is one path"),
        ):
            with pytest.raises(NanoGPTError, match=says):
                await join_audio(files, tmp_path / to, container=container)
        with pytest.raises(NanoGPTError, match="INVALID_REQUEST: gap_seconds=-1"):
            await join_audio([piece], tmp_path / "whole", gap_seconds=-1)
        with pytest.raises(StorageError, match=r"gone\.mp3 cannot be read.* No such file"):
            await join_audio([piece, pieces / "gone.mp3"], tmp_path / "whole.mp3")
        assert files_in(tmp_path) == []
