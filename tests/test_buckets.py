"""Audio in a bucket: a real S3 API over HTTP, with keys from where people keep them."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from itertools import repeat
from pathlib import Path
from typing import Any

import fsspec
import pytest
from prefect.filesystems import RemoteFileSystem

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import StorageError
from prefect_nanogpt.flows import text_to_speech, wait_for_tts
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import save_audio
from tests.s3_server import READ, WRITE, S3Server, s3, s3_env
from tests.sounds import tone

__all__ = ["s3", "s3_env"]

BUCKET = "s3://speech/episodes"
WAV_HEADER = b"RIFF\xff\xff\xff\x7fWAVEfmt \x10\0\0\0\1\0\1\0\x80\xbb\0\0\0\x77\1\0\2\0\x10\0data"


def audio_in(s3: S3Server) -> dict[str, bytes]:
    """Read every object of the bucket that is not the ledger's."""
    return {name: content for name, content in s3.objects().items() if "/.nanogpt/" not in name}


@pytest.fixture
def to_bucket(credentials: NanoGPTCredentials, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "poll": quick, "save_to": BUCKET}


async def test_audio_goes_to_the_bucket_and_is_found_there(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    ticket = sandbox.add_job("Once, into a bucket.")
    name = f"episodes/{ticket['runId']}.mp3"
    audio = await wait_for_tts(ticket, **to_bucket)
    assert audio_in(s3_env) == {name: sandbox.audio_bytes(ticket["runId"])}
    assert s3_env.content_type(name) == audio.content_type == "audio/mpeg"
    assert audio.location == f"s3://speech/{name}"
    again = await wait_for_tts(ticket, **to_bucket)
    assert (again.location, again.sha256, again.size_bytes) == (audio.location, audio.sha256, audio.size_bytes)
    assert (len(sandbox.requests("status")), len(sandbox.requests("audio"))) == (1, 1)


async def test_wav_in_a_bucket_is_announced_as_wav(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    audio = await text_to_speech("At once.", model="Kokoro-82m", **to_bucket)
    assert s3_env.content_type(audio.location.removeprefix("s3://speech/")) == audio.content_type == "audio/wav"


async def test_an_equal_request_is_found_in_the_bucket_and_not_paid_again(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    first = await text_to_speech("The jingle of every episode.", **to_bucket)
    second = await text_to_speech("The jingle of every episode.", **to_bucket)
    assert second.location == first.location
    assert len(sandbox.ledger.charges) == 1
    assert len(sandbox.requests("audio")) == 1

    name = first.location.removeprefix("s3://speech/")
    s3_env.client("s3").put_object(Bucket="speech", Key=name, Body=b"ID3 no")
    third = await text_to_speech("The jingle of every episode.", **to_bucket)
    assert third.location == first.location
    assert hashlib.sha256(s3_env.objects()[name]).hexdigest() == first.sha256
    assert (len(sandbox.ledger.charges), len(sandbox.requests("audio"))) == (1, 2)


async def test_audio_is_not_taken_for_gone_while_the_bucket_is_out_of_reach(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = await text_to_speech("Here, but out of reach.", **to_bucket)
    name = audio.location.rpartition("/")[2]
    assert await Destination(BUCKET).run(Destination(BUCKET).has, name, audio.size_bytes, audio.sha256)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StorageError) as caught:
        await Destination(BUCKET).run(Destination(BUCKET).has, name, audio.size_bytes, audio.sha256)
    assert caught.value.retryable
    before = len(sandbox.requests())
    with pytest.raises(StorageError):
        await text_to_speech("Here, but out of reach.", **to_bucket)
    assert len(sandbox.requests()) == before


async def test_an_upload_broken_off_leaves_no_object_and_its_ticket_stays_good(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    s3_env.break_uploads = True
    with pytest.raises(StorageError, match=f"{BUCKET} cannot be used") as caught:
        await text_to_speech("Broken off.", **to_bucket)
    assert s3_env.uploads
    assert audio_in(s3_env) == {}
    ticket = caught.value.ticket
    assert ticket is not None
    s3_env.break_uploads = False
    audio = await wait_for_tts(ticket, **to_bucket)
    assert list(audio_in(s3_env).values()) == [sandbox.audio_bytes(ticket.run_id)]
    assert (audio.cost, len(sandbox.ledger.charges)) == (ticket.cost, 1)


async def test_long_audio_goes_up_in_parts_and_shows_only_when_they_are_together(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_audio, "retries", 0)
    novel = WAV_HEADER + bytes(101 * 2**20)  # s3fs uploads up to 100 MiB in one piece
    ticket = sandbox.add_job("A whole novel.")
    sandbox.on_audio(ticket["runId"], repeat(Answer(body=novel)))
    s3_env.break_uploads = True
    with pytest.raises(StorageError):
        await wait_for_tts(ticket, **to_bucket)
    assert any("partNumber" in query for query in s3_env.uploads)
    assert (audio_in(s3_env), s3_env.unfinished_uploads()) == ({}, [])
    s3_env.break_uploads = False
    audio = await wait_for_tts(ticket, **to_bucket)
    assert audio_in(s3_env) == {f"episodes/{ticket['runId']}.wav": novel}
    assert s3_env.content_type(f"episodes/{ticket['runId']}.wav") == "audio/wav"
    assert (audio.container, audio.size_bytes) == ("wav", len(novel))


@pytest.mark.parametrize(
    ("save_to", "key", "words"),
    [
        ("s3://missing/episodes", {}, "does not exist"),
        ("s3://private/episodes", {}, "Access Denied"),
        (BUCKET, {"AWS_SECRET_ACCESS_KEY": "mistyped"}, "signature"),
        (BUCKET, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
        ("remote-file-system/never-saved", {}, "never-saved"),
    ],
    ids=["no such bucket", "not allowed", "wrong key", "no key", "no such block"],
)
async def test_a_bucket_that_cannot_be_used_is_named_before_anything_is_paid(
    save_to: str,
    key: dict[str, str],
    words: str,
    sandbox: Sandbox,
    s3_env: S3Server,
    to_bucket: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in key.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=words) as caught:
        await text_to_speech("Nowhere to go.", **{**to_bucket, "save_to": save_to})
    assert save_to in str(caught.value)
    assert sandbox.ledger.charges == []


async def test_a_bucket_that_may_only_be_read_is_named_before_anything_is_paid(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    s3_env.allow_only(*READ)
    with pytest.raises(StorageError, match="Access Denied") as caught:
        await text_to_speech("Read only.", **to_bucket)
    assert BUCKET in str(caught.value)
    assert not caught.value.retryable
    assert sandbox.ledger.charges == []


async def test_a_bucket_that_may_be_written_and_not_read_is_named_before_anything_is_paid(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    s3_env.allow_only("s3:ListBucket", *WRITE)
    with pytest.raises(StorageError, match=BUCKET):
        await text_to_speech("Write only.", **to_bucket)
    assert sandbox.ledger.charges == []


REFUSALS = [
    (501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
    (400, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed."),
    (400, "InvalidArgument", "Unsupported header 'x-amz-checksum-crc32' received for this API call."),
    (400, "InvalidRequest", "The value specified in the x-amz-trailer header is not supported."),
    (411, "MissingContentLength", "You must provide the Content-Length HTTP header."),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal[1])
async def test_a_store_that_takes_no_checksums_is_said_to_and_with_the_settings_it_is_used(
    refusal: tuple[int, str, str],
    sandbox: Sandbox,
    s3_env: S3Server,
    to_bucket: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_env.refuses_checksums = refusal
    with pytest.raises(StorageError) as caught:
        await text_to_speech("Without a checksum.", **to_bucket)
    settings = re.findall(r"(AWS_\w+)=(\w+)", str(caught.value))
    assert settings == [
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
        ("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required"),
    ]
    assert not caught.value.retryable
    assert sandbox.ledger.charges == []

    for name, value in settings:
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    audio = await text_to_speech("Without a checksum.", **to_bucket)
    assert list(audio_in(s3_env)) == [audio.location.removeprefix("s3://speech/")]
    assert len(sandbox.ledger.charges) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        (400, "InvalidArgument", "Invalid bucket name."),
        (403, "AccessDenied", "No checksum."),
        (500, "InternalError", ""),
    ],
    ids=lambda refusal: refusal[1],
)
async def test_other_refusals_get_no_hint_about_checksums(
    refusal: tuple[int, str, str], s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    s3_env.refuses_checksums = refusal
    with pytest.raises(StorageError) as caught:
        await text_to_speech("Refused.", **to_bucket)
    assert "AWS_REQUEST_CHECKSUM_CALCULATION" not in str(caught.value)


async def test_a_ticket_that_a_bucket_cannot_take_goes_elsewhere(
    sandbox: Sandbox, s3_env: S3Server, to_bucket: dict[str, Any], save_to: str
) -> None:
    ticket = sandbox.add_job("Read only.")
    s3_env.allow_only(*READ)
    with pytest.raises(StorageError, match="Access Denied"):
        await wait_for_tts(ticket, **to_bucket)
    audio = await wait_for_tts(ticket, **{**to_bucket, "save_to": save_to})
    assert Path(audio.location).read_bytes() == sandbox.audio_bytes(ticket["runId"])


# Prefect's own block


@pytest.fixture
async def block(s3: S3Server) -> str:
    """A saved block that has the way to the bucket and the key, of which the environment has nothing."""
    saving = RemoteFileSystem(basepath=BUCKET, settings=s3.settings).save("episodes", overwrite=True)
    await saving  # type: ignore[misc]
    return "remote-file-system/episodes"


async def test_a_saved_block_has_the_bucket_and_the_key(
    sandbox: Sandbox, s3: S3Server, block: str, to_bucket: dict[str, Any]
) -> None:
    ticket = sandbox.add_job("Through a block.")
    into_block = {**to_bucket, "save_to": block}
    audio = await wait_for_tts(ticket, **into_block)
    assert audio.location == f"{BUCKET}/{ticket['runId']}.mp3"
    assert list(audio_in(s3).values()) == [sandbox.audio_bytes(ticket["runId"])]
    assert (await wait_for_tts(ticket, **into_block)).sha256 == audio.sha256
    assert len(sandbox.requests("audio")) == 1
    name = audio.location.rpartition("/")[2]
    assert await Destination(block).run(Destination(block).has, name, audio.size_bytes, audio.sha256)


async def test_many_at_once_save_through_the_same_block(s3: S3Server, block: str) -> None:
    async def chapter(number: int) -> AsyncIterator[bytes]:
        yield tone("mp3", 0.1 * (number + 1))

    saved = await asyncio.gather(*(Destination(block).save(chapter(number), f"{number}") for number in range(20)))
    assert sorted(audio.location for audio in saved) == sorted(f"s3://speech/{name}" for name in s3.objects())
    assert len(s3.objects()) == 20


async def test_a_folder_beside_the_blocks_is_a_folder() -> None:
    assert Destination("remote-file-systems/episodes").is_local
