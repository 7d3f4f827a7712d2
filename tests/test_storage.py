"""Where audio goes: on a real disk, in a bucket of memory, and with processes that are really killed."""

import hashlib
import os
import pickle
import re
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prefect_nanogpt.errors import AudioError, StorageError
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.models import AudioFile
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.storage import Destination, file_stem
from tests.conftest import files_in
from tests.sounds import tone

MP3 = tone("mp3")

HOSTILE = [
    "../../etc/passwd",
    "..",
    ".",
    "/etc/passwd",
    "..\\..\\windows",
    "C:\\x",
    "a/b",
    "a-b",
    "a b",
    " a b",
    ".hidden",
    "-rf",
    "~root",
    "$(id)",
    "x.mp3",
    "x" * 100,
    "x" * 101,
    "x" * 512,
    "läuft",
    "läuft ",
    "日本語",
    "***",
    "???",
    "nul\x00",
    "two\nlines",
    "s3://bucket/key",
    "a*b?[c]",
]


async def chunks_of(content: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def breaking_off() -> AsyncIterator[bytes]:
    yield MP3
    raise httpx.ReadError("gone")


async def is_intact(destination: Destination, audio: AudioFile) -> bool:
    return await destination.run(destination.has, audio.location.rpartition("/")[2], audio.size_bytes, audio.sha256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audio"


@pytest.fixture
def bucket() -> Iterator[str]:
    yield "memory://speech/audio"
    MemoryFileSystem.store.clear()


# What audio is


@pytest.mark.parametrize(("model", "container"), [("Elevenlabs-V3", "mp3"), ("Kokoro-82m", "wav")])
async def test_what_the_provider_serves_is_what_is_saved(
    model: str, container: str, sandbox: Sandbox, folder: Path
) -> None:
    run_id = sandbox.add_job(model=model)["runId"]
    content = sandbox.audio_bytes(run_id)

    audio = await Destination(str(folder)).save(chunks_of(content), run_id, expected_bytes=len(content))

    assert audio.location == str(folder / f"{run_id}.{container}")
    assert Path(audio.location).read_bytes() == content
    assert (audio.container, audio.size_bytes) == (container, len(content))
    assert audio.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [1, 7, 11, 12, 13, 5000])
async def test_the_size_of_the_chunks_does_not_matter(size: int, folder: Path) -> None:
    audio = await Destination(str(folder)).save(chunks_of(MP3, size), "speech")

    assert (audio.container, audio.size_bytes) == ("mp3", len(MP3))
    assert audio.sha256 == hashlib.sha256(MP3).hexdigest()


# What is not saved


@pytest.mark.parametrize(
    ("content", "expected_bytes", "code", "says"),
    [
        (b"", None, "AUDIO_EMPTY", "no bytes"),
        (b"", 0, "AUDIO_EMPTY", "no bytes"),
        (MP3[:-1], len(MP3), "AUDIO_TRUNCATED", f"{len(MP3) - 1} of {len(MP3)} bytes"),
        (MP3, len(MP3) - 1, "AUDIO_TRUNCATED", f"{len(MP3)} of {len(MP3) - 1} bytes"),
        (b"\n <!doctype html>", None, "AUDIO_INVALID", "a web page"),
        (b'{"error": "expired"}', None, "AUDIO_INVALID", "JSON"),
        (bytes(100), None, "AUDIO_INVALID", "data that begins with"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "bucket"])
async def test_what_is_no_whole_audio_is_not_saved(
    where: str, content: bytes, expected_bytes: int | None, code: str, says: str, request: pytest.FixtureRequest
) -> None:
    save_to = str(request.getfixturevalue(where))

    with pytest.raises(AudioError, match=says) as caught:
        await Destination(save_to).save(chunks_of(content), "speech", expected_bytes=expected_bytes)

    assert (caught.value.code, caught.value.retryable) == (code, True)
    assert everything_in(save_to) == []


async def test_what_is_too_large_is_not_saved(folder: Path) -> None:
    largest = len(MP3) - 1

    with pytest.raises(AudioError, match=f"larger than {largest} bytes") as caught:
        await Destination(str(folder)).save(chunks_of(MP3), "speech", largest_bytes=largest)

    assert not caught.value.retryable
    assert everything_in(str(folder)) == []


async def test_the_largest_audio_is_saved(folder: Path) -> None:
    audio = await Destination(str(folder)).save(chunks_of(MP3), "speech", largest_bytes=len(MP3))

    assert audio.size_bytes == len(MP3)


@pytest.mark.parametrize("where", ["folder", "bucket"])
async def test_a_download_that_breaks_off_leaves_nothing(where: str, request: pytest.FixtureRequest) -> None:
    save_to = str(request.getfixturevalue(where))

    with pytest.raises(httpx.ReadError):
        await Destination(save_to).save(breaking_off(), "speech")

    assert everything_in(save_to) == []


def everything_in(save_to: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(save_to)
    return list(fs.find(root)) if fs.exists(root) else []


# On a disk


async def test_a_file_has_its_name_only_once_it_is_whole(folder: Path) -> None:
    visible: list[list[Path]] = []

    async def watched() -> AsyncIterator[bytes]:
        async for chunk in chunks_of(MP3):
            visible.append(list(folder.glob("[!.]*")))
            yield chunk

    audio = await Destination(str(folder)).save(watched(), "speech")

    assert len(visible) == -(-len(MP3) // 100)
    assert not any(visible)
    assert [path.name for path in folder.iterdir()] == ["speech.mp3"]
    assert Path(audio.location) == folder / "speech.mp3"


async def test_a_download_that_fails_leaves_the_file_that_was_there(folder: Path) -> None:
    destination = Destination(str(folder))
    before = await destination.save(chunks_of(MP3), "speech")

    with pytest.raises(httpx.ReadError):
        await destination.save(breaking_off(), "speech")

    assert await is_intact(destination, before)
    assert [path.name for path in folder.iterdir()] == ["speech.mp3"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
async def test_the_mode_of_the_file_follows_the_umask(umask: int, mode: int, folder: Path) -> None:
    before = os.umask(umask)
    try:
        audio = await Destination(str(folder)).save(chunks_of(MP3), "speech")
    finally:
        os.umask(before)

    assert stat.S_IMODE(Path(audio.location).stat().st_mode) == mode


@pytest.mark.parametrize("save_to", ["relative/folder", "file://{}/of a url"])
async def test_a_relative_folder_and_a_file_url_are_local_folders(
    save_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    destination = Destination(save_to.format(tmp_path))

    audio = await destination.save(chunks_of(MP3), "speech")

    assert destination.is_local
    assert Path(audio.location).is_absolute()
    assert Path(audio.location).read_bytes() == MP3
    assert tmp_path in Path(audio.location).parents


async def test_a_folder_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    in_the_way = Destination(str(tmp_path / "file"))

    for action in (
        in_the_way.run(in_the_way.check),
        Destination(str(tmp_path / "file" / "below")).save(chunks_of(MP3), "speech"),
    ):
        with pytest.raises(StorageError, match="cannot be used") as caught:
            await action
        assert not caught.value.retryable
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "save_to",
    [
        "",
        " ",
        "nosuchprotocol://bucket/speech",
        "s3//bucket://x",
        Path("s3://bucket/speech"),
        Path("ftp://speaker:mistyped@host/speech"),
        "file:/speech",
        "spee\0ch",
        "~nobody-of-that-name/speech",
        pytest.param("C:\\speech", marks=pytest.mark.skipif(os.name == "nt", reason="is a folder there")),
        pytest.param("\\\\server\\speech", marks=pytest.mark.skipif(os.name == "nt", reason="is a folder there")),
    ],
    ids=ascii,
)
async def test_what_is_neither_folder_nor_url_is_refused_and_nothing_is_made_of_it(
    save_to: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="save_to") as caught:
        Destination(save_to)
    assert "mistyped" not in str(caught.value)
    state = await text_to_speech("Nowhere.", save_to=save_to, return_state=True)
    assert state.name == "STORAGE_FAILED"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["folder", "bucket"])
async def test_a_place_that_was_used_travels_to_other_processes(where: str, request: pytest.FixtureRequest) -> None:
    place = Destination(str(request.getfixturevalue(where)))
    saved = await place.save(chunks_of(MP3), "speech")
    for there in (pickle.loads(pickle.dumps(place)), pickle.loads(pickle.dumps(place.folder("below")))):
        assert await there.run(there.check) is None
    assert await is_intact(pickle.loads(pickle.dumps(place)), saved)


@pytest.mark.skipif(os.name == "nt", reason="is another machine there")
async def test_a_path_that_begins_with_two_slashes_is_a_folder(tmp_path: Path) -> None:
    audio = await Destination(f"/{tmp_path}/audio").save(chunks_of(MP3), "speech")
    assert Path(audio.location).read_bytes() == MP3


# Killed processes

SAVING = """
import asyncio, sys
from prefect_nanogpt.storage import Destination

async def chunks():
    yield b"ID3" + bytes(100)
    print("saving", flush=True)
    await asyncio.Event().wait()

asyncio.run(Destination(sys.argv[1]).save(chunks(), sys.argv[2]))
"""


@contextmanager
def saving_processes(folder: Path, *stems: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes in the middle of a download, each to its own stem."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SAVING, str(folder), stem], stdout=subprocess.PIPE, text=True)
        for stem in stems
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "saving\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses by itself to delete a file that is open")
async def test_the_leftovers_of_a_killed_process_are_removed_and_those_of_a_live_one_stay(folder: Path) -> None:
    folder.mkdir()
    with saving_processes(folder, "speech", "speech", "other") as (killed, _, other):
        before = set(folder.iterdir())
        killed.kill()
        killed.wait()
        other.kill()
        other.wait()

        await Destination(str(folder)).save(chunks_of(MP3), "new")

        left = {path.name for path in folder.iterdir()}
    assert len(before) == 3
    assert all(path.name.startswith(".") for path in before)
    assert "new.mp3" in left
    assert len([name for name in left if name.startswith(".speech.")]) == 1
    assert not [name for name in left if name.startswith(".other.")]


# In a bucket


async def test_a_bucket_gets_the_audio_and_gives_it_back(bucket: str) -> None:
    destination = Destination(bucket)

    saved = await destination.save(chunks_of(MP3), "speech")

    assert not destination.is_local
    assert saved.location == "memory:///speech/audio/speech.mp3"
    with fsspec.open(saved.location, "rb") as file:
        assert file.read() == MP3
    found = await destination.run(destination.find, "speech")
    assert found is not None
    assert (found.location, found.sha256, found.size_bytes) == (saved.location, saved.sha256, len(MP3))
    assert everything_in(bucket) == ["/speech/audio/speech.mp3"]


class PlainServer(MemoryFileSystem):
    """A file server on which a half-uploaded file is seen, as on most of them."""

    protocol = "plain"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's way
    pseudo_dirs = [""]  # noqa: RUF012
    uploads: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("plain://", "memory://")))

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self.uploads.append(rpath)
        super().put_file(lpath, rpath, *args, **kwargs)


async def test_where_half_an_upload_would_be_seen_it_goes_to_another_name_first() -> None:
    fsspec.register_implementation("plain", PlainServer, clobber=True)

    saved = await Destination("plain://speech").save(chunks_of(MP3), "run")

    assert PlainServer.uploads == ["/speech/run.mp3.part"]
    assert list(PlainServer.store) == ["/speech/run.mp3"]
    assert saved.location == "plain:///speech/run.mp3"
    assert await is_intact(Destination("plain://speech"), saved)


class BrokenBucket(MemoryFileSystem):
    """A bucket that refuses."""

    protocol = "broken"

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("AccessDenied")


async def test_a_bucket_that_refuses_is_explained_and_may_be_tried_again() -> None:
    fsspec.register_implementation("broken", BrokenBucket, clobber=True)

    with pytest.raises(StorageError, match="broken://speech cannot be used: AccessDenied") as caught:
        await Destination("broken://speech").save(chunks_of(MP3), "speech")

    assert caught.value.retryable


# Finding it again


@pytest.mark.parametrize("where", ["folder", "bucket"])
async def test_only_finished_audio_of_that_name_is_found(where: str, request: pytest.FixtureRequest) -> None:
    save_to = str(request.getfixturevalue(where))
    destination = Destination(save_to)
    await destination.save(chunks_of(MP3), "speech-2")
    fs, root = fsspec.core.url_to_fs(save_to)
    fs.pipe_file(f"{root}/speech.txt", b"notes")
    fs.pipe_file(f"{root}/.speech.0a1b2c3d.part", MP3)

    assert await destination.run(destination.find, "speech") is None
    saved = await destination.save(chunks_of(tone("ogg opus")), "speech")
    found = await destination.run(destination.find, "speech")
    assert found is not None
    assert (found.location, found.container, found.sha256) == (saved.location, "ogg", saved.sha256)


async def test_nothing_is_found_where_there_is_no_folder(folder: Path) -> None:
    assert Destination(str(folder)).find("speech") is None
    assert not folder.exists()


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(MP3 + b"x")], ids=["gone", "changed"])
async def test_audio_that_is_gone_or_changed_is_not_intact(change: Callable[[Path], object], folder: Path) -> None:
    destination = Destination(str(folder))
    saved = await destination.save(chunks_of(MP3), "speech")
    assert await is_intact(destination, saved)

    change(Path(saved.location))

    assert not await is_intact(destination, saved)


# Names


@pytest.mark.parametrize("run_id", HOSTILE, ids=ascii)
async def test_a_hostile_run_id_stays_inside_the_folder(run_id: str, folder: Path, tmp_path: Path) -> None:
    audio = await Destination(str(folder)).save(chunks_of(MP3), file_stem(run_id))

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [Path(audio.location)]
    assert Path(audio.location).parent == folder
    assert file_stem(run_id).isprintable()
    assert (found := Destination(str(folder)).find(file_stem(run_id)))
    assert found.location == audio.location


def test_run_ids_that_differ_have_names_that_differ() -> None:
    run_ids = [*HOSTILE, "a_b", "a--b", "-", "--", "x" * 513]

    assert len({file_stem(run_id) for run_id in run_ids}) == len(run_ids)


@pytest.mark.parametrize(
    ("name", "readable"), [("Übung 1 \u2013 früh", "Ubung-1-fruh"), ("Ça va?", "Ca-va"), ("ﬁn", "fin"), ("第1章", "1")]
)
def test_letters_with_marks_lose_the_marks_and_not_their_place(name: str, readable: str) -> None:
    assert re.fullmatch(rf"{readable}-[0-9a-f]{{16}}", file_stem(name))
    assert file_stem(name) != file_stem(readable)


@pytest.mark.parametrize(
    "run_id", ["98b0d593-fe8d-49b8-89c9-233022232297", "018f5c2e9d3b7c4e8a1b2c3d4e5f6071", "vc_run_789"]
)
def test_a_plain_run_id_is_its_own_name(run_id: str) -> None:
    assert file_stem(run_id) == run_id


@pytest.mark.parametrize(
    "name",
    ["CON", "con", "Prn", "aux", "NUL", "COM0", "com1", "COM9", "LPT1", "lpt0", "COM¹", "CONIN$", "CONOUT$", "con.x"],
)
def test_the_devices_of_windows_are_no_names_of_files(name: str) -> None:
    stem = file_stem(name)

    assert re.fullmatch(rf"{name[:3]}[A-Za-z0-9-]*-[0-9a-f]{{16}}", stem)
    assert file_stem(name) == stem


@pytest.mark.parametrize("name", ["console", "COM", "com10", "LPT", "auxiliary", "nul-1", "CON_"])
def test_names_that_begin_like_devices_stay(name: str) -> None:
    assert file_stem(name) == name


# Other audio under the same name


async def test_audio_that_another_run_saves_meanwhile_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_audio = Destination._audio_called
    others = [MP3 + b"another run's"]

    def saved_right_after(self: Destination, *name: str) -> dict[str, int]:
        there = list_audio(self, *name)
        if others:
            (folder / "speech.mp3").write_bytes(others.pop())
        return there

    monkeypatch.setattr(Destination, "_audio_called", saved_right_after)
    audio = await Destination(str(folder)).save(chunks_of(MP3), "speech")

    assert Path(audio.location).read_bytes() == MP3
    digest = hashlib.sha256(MP3 + b"another run's").hexdigest()
    assert {file.name for file in files_in(folder)} == {"speech.mp3", f"speech.{digest[:8]}.mp3"}


@pytest.mark.parametrize("meanwhile", [MP3 + b"other audio", None])
async def test_a_copy_is_of_the_audio_that_was_asked_for_or_none(meanwhile: bytes | None, folder: Path) -> None:
    place = Destination(str(folder))
    audio = await place.save(chunks_of(MP3), "speech")
    if meanwhile is None:
        (folder / "speech.mp3").unlink()
    else:
        (folder / "speech.mp3").write_bytes(meanwhile)
    assert await place.run(place.copy_from, place, "speech.mp3", "copy", audio) is None
    assert not (folder / "copy.mp3").exists()
