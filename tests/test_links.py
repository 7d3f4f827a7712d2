"""The links with which a report begins: they lead to the audio, for as long as they say."""

import re
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from playwright.async_api import async_playwright
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey
from prefect.filesystems import RemoteFileSystem
from pydantic import SecretStr, ValidationError

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.folders import folder_id
from prefect_nanogpt.listening import listening
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.storage import Destination, Links, problem_with_public_url
from tests.s3_server import S3Server, s3, s3_env
from tests.sounds import tone

__all__ = ["s3", "s3_env"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUCKET = "s3://speech/episodes"
TEMPLATE = "https://cdn.example.org/{path}"


@pytest.fixture
def terms(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


async def report_of(key: str) -> str:
    async with get_client() as client:
        [found] = await client.read_latest_artifacts(
            artifact_filter=ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[key]))
        )
    assert found.type == "markdown"
    return str(found.data)


async def said(key: str, text: str = "Said to be heard.", **terms: Any) -> str:
    """Say a text and give its report."""
    await text_to_speech(text, **terms, artifact_key=key)
    return await report_of(key)


def links_in(report: str) -> dict[str, str]:
    return dict(re.findall(r"\[([^\]]+)\]\((http[^)]+)\)", report))


async def fetched(url: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:  # whose requests have nothing of anybody's
        return (await client.get(url)).raise_for_status()


# Local folders


async def test_the_report_of_a_local_folder_begins_with_links_to_the_audio_pages(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(port=0) as url:
        monkeypatch.setenv("NANOGPT_LISTEN_URL", f"{url}/")
        report = await said("links-local", name="intro", **terms)
        assert report.startswith(f"# Speech ready\n\n[Listen]({url}/")
        assert "listen`" not in report
        links = links_in(report)
        assert "Said to be heard." in (await fetched(links["Listen"])).text
        sound = await fetched(links["Download"])
    assert sound.content == Path(terms["save_to"], "intro.mp3").read_bytes()
    assert sound.headers["content-disposition"] == 'attachment; filename="intro.mp3"'


async def test_where_nobody_has_said_what_serves_the_pages_the_report_says_what_would(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOGPT_LISTEN_URL", raising=False)
    report = await said("links-default", **terms)
    base = f"http://127.0.0.1:4201/{folder_id(terms['save_to'])}"
    assert links_in(report)["Listen"].startswith(f"{base}/page/")
    assert "served by `prefect-nanogpt listen`, or `serve`, on the machine " in report


async def test_a_login_in_the_address_of_the_pages_stands_in_no_report(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_LISTEN_URL", "https://me:s3cret@audio.example.org")
    report = await said("links-login", **terms)
    assert links_in(report)["Listen"].startswith("https://audio.example.org/")
    assert "s3cret" not in report


async def test_an_address_that_no_browser_follows_from_a_report_makes_no_link(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_LISTEN_URL", "javascript:alert(1)//")
    report = await said("links-script", **terms)
    assert "javascript" not in report
    assert report.startswith("# Speech ready\n\nThe audio is saved and verified.")


async def test_the_providers_own_link_is_named_as_what_it_is(terms: dict[str, Any]) -> None:
    report = await said("links-provider", **terms)
    assert re.search(
        r"^\| At the provider \| \[at 127\.0\.0\.1\]\(http.*\), for as long as it is kept there \|$", report, re.M
    )


async def test_the_table_of_a_batch_links_each_line_and_begins_with_all_of_them(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {"id": "one [x](http://a.test) | <b>", "text": "The first | line."},
        {"id": "two", "text": "[sandbox:reject] No."},
    ]
    with listening(port=0) as url:
        monkeypatch.setenv("NANOGPT_LISTEN_URL", url)
        await text_to_speech_batch(lines, **terms, artifact_key="links-batch", return_state=True)
        report = await report_of("links-batch")
        links = links_in(report)
        assert list(links) == ["Listen to all", "Download all", "Listen"]
        assert "The first | line." in (await fetched(links["Listen"])).text
        assert "CONTENT_POLICY_VIOLATION" in (await fetched(links["Listen to all"])).text
        assert (await fetched(links["Download all"])).content.startswith(b"PK")
    rows = [row for row in report.splitlines() if row.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6, 6, 6]
    assert r"\[x\]\(http" in rows[2]


# Public addresses


@pytest.mark.parametrize(
    ("save_to", "template", "link"),
    [
        ("memory://speech/episodes", TEMPLATE, "https://cdn.example.org/episodes/a%20%25%3F%23.mp3"),
        (
            "memory://speech/é/",
            "http://x.test/{bucket}/{path}?n={name}",
            "http://x.test/speech/%C3%A9/a%20%25%3F%23.mp3?n=a%20%25%3F%23.mp3",
        ),
        ("memory://speech", TEMPLATE, "https://cdn.example.org/a%20%25%3F%23.mp3"),
        ("memory://speech", "https://{bucket}.example.org/{name}", "https://speech.example.org/a%20%25%3F%23.mp3"),
        ("/srv/audio", TEMPLATE, "https://cdn.example.org/srv/audio/a%20%25%3F%23.mp3"),
    ],
)
def test_a_public_address_is_made_of_a_template(save_to: str, template: str, link: str) -> None:
    place = Destination(save_to)
    place.public_url = template
    assert place.links("a %?#.mp3") == Links(link)
    assert place.links_to_all() is None


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("ftp://cdn.example.org/{path}", "http"),
        ("cdn.example.org/{path}", "http"),
        ("https:///{path}", "http"),
        ("https://[::1/{path}", "http"),
        ("https://me:secret@cdn.example.org/{path}", "login"),
        ("https://cdn.example.org/{file}", "{file}"),
        ("https://cdn.example.org/{}", "{}"),
        ("https://cdn.example.org/audio", "the same address"),
        ("https://{name}.example.org/{path}", "behind its host"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused_where_it_is_saved(template: str, problem: str) -> None:
    assert problem in str(problem_with_public_url(template))
    with pytest.raises(ValidationError, match="public_url") as caught:
        NanoGPTCredentials(api_key=SecretStr("k"), public_url=template)
    assert "secret" not in str(caught.value)


async def test_a_public_address_of_the_environment_comes_before_the_pages_of_this_machine(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_PUBLIC_URL", "https://cdn.example.org/{name}")
    report = await said("links-public", name="intro", **terms)
    assert report.startswith("# Speech ready\n\n[Listen](https://cdn.example.org/intro.mp3)\n")


async def test_a_public_address_of_the_block_comes_before_that_of_the_environment(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_PUBLIC_URL", "https://environment.example.org/{name}")
    terms["credentials"] = terms["credentials"].model_copy(update={"public_url": "https://block.example.org/{name}"})
    for _ in range(2):  # also where it was there already
        report = await said("links-block", name="intro", **terms)
        assert links_in(report)["Listen"] == "https://block.example.org/intro.mp3"


async def test_a_template_of_the_environment_that_cannot_be_used_is_warned_of_and_fails_nothing(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NANOGPT_PUBLIC_URL", "https://me:s3cret@cdn.example.org/{path}")
    report = await said("links-unusable", **terms)
    assert report.startswith("# Speech ready\n\nThe audio is saved and verified.")
    assert "NANOGPT_PUBLIC_URL" in caplog.text
    assert "s3cret" not in caplog.text + report


# Buckets


@pytest.fixture
def to_bucket(terms: dict[str, Any]) -> dict[str, Any]:
    return {**terms, "save_to": BUCKET}


async def test_the_report_of_a_bucket_begins_with_signed_links_and_says_how_long_they_last(
    s3_env: S3Server, to_bucket: dict[str, Any]
) -> None:
    before = datetime.now(UTC).replace(second=0, microsecond=0)
    report = await said("links-bucket", name="intro", **to_bucket)
    links = links_in(report)
    assert report.startswith(f"# Speech ready\n\n[Listen]({s3_env.url}/speech/episodes/intro.mp3?")
    found = re.search(r", until (\d{4}-\d\d-\d\d \d\d:\d\d) UTC\.$", report.split("\n\n")[1])
    assert found is not None
    lasts = datetime.strptime(found[1], "%Y-%m-%d %H:%M").replace(tzinfo=UTC) - before
    assert timedelta(days=7) <= lasts < timedelta(days=7, minutes=10)
    assert "X-Amz-Expires=604800" in links["Listen"]  # the present way, which every bucket takes
    heard, kept = await fetched(links["Listen"]), await fetched(links["Download"])
    assert heard.content == kept.content == s3_env.objects()["episodes/intro.mp3"]
    assert heard.headers["content-type"] == "audio/mpeg"
    assert "content-disposition" not in heard.headers
    assert "response-content-disposition=attachment" in links["Download"]
    assert s3_env.key["aws_secret_access_key"] not in report


async def test_a_browser_plays_a_signed_link(s3_env: S3Server, to_bucket: dict[str, Any]) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    links = links_in(await said("links-played", **to_bucket))
    flags = ["--no-sandbox", "--disable-gpu", "--mute-audio", "--autoplay-policy=no-user-gesture-required"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = await browser.new_page()
        await page.goto(links["Listen"])
        played = await page.wait_for_function("document.querySelector('video, audio').currentTime > 0")
        assert await played.json_value() is True
        await browser.close()


async def test_each_line_of_a_batch_in_a_bucket_is_linked(s3_env: S3Server, to_bucket: dict[str, Any]) -> None:
    lines = [{"id": "one", "text": "One."}, {"id": "two", "text": "Two."}]
    await text_to_speech_batch(lines, **to_bucket, artifact_key="links-bucket-batch")
    report = await report_of("links-bucket-batch")
    found = re.findall(r"\[Listen\]\((http[^)]+)\)", report)
    assert [(await fetched(url)).headers["content-type"] for url in found] == ["audio/mpeg", "audio/mpeg"]
    assert "Download all" not in report


async def test_a_link_that_a_temporary_key_signs_is_not_said_to_last_longer_than_the_key(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-an-hour")
    links = Destination(BUCKET).links("intro.mp3")
    assert links is not None
    assert " at most: the key that it is signed with is a temporary one" in links.lasts


def test_without_a_key_there_is_no_link(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert Destination(BUCKET).links("intro.mp3") is None
    assert Destination(BUCKET).links_to_all() is None


def test_an_address_that_nobody_has_signed_is_no_link(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    assert Destination(BUCKET).fs.anon
    assert Destination(BUCKET).links("intro.mp3") is None


def test_a_driver_that_signs_nothing_has_no_link() -> None:
    assert Destination("memory://speech").links("intro.mp3") is None


async def test_a_saved_block_signs_with_the_key_that_it_has(s3: S3Server) -> None:
    saving = RemoteFileSystem(basepath=BUCKET, settings=s3.settings).save("signing", overwrite=True)
    await saving  # type: ignore[misc]
    place = Destination("remote-file-system/signing")

    async def sound() -> AsyncIterator[bytes]:
        yield tone("mp3", 0.2)

    await place.save(sound(), "intro")
    links = await place.run(place.links, "intro.mp3")
    assert links is not None
    assert (await fetched(links.listen)).content == tone("mp3", 0.2)
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        await fetched(links.listen.replace("intro", "other"))
