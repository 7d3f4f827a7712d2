"""The audio pages, over real HTTP: what they show, what they hand out, and what they never do."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from playwright.async_api import Browser, async_playwright, expect
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.folders import folder_id, registered
from prefect_nanogpt.ledger import Job, Ledger
from prefect_nanogpt.lines import ManifestRow, read_lines
from prefect_nanogpt.listening import listening
from prefect_nanogpt.models import AudioFile, PollSchedule
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.storage import Destination, kept_name
from tests.conftest import API_KEY, files_in
from tests.sounds import tone

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '</p><script>alert(1)</script>{{ 7 * 7 }} & "quotes" \u202ereversed'
LINES = [
    {"id": "second", "text": "Comes first."},
    {"id": "bad <b>", "text": "[sandbox:reject] What nobody may say."},
    {"id": "first", "text": HOSTILE},
]


@pytest.fixture
def terms(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


@pytest.fixture(scope="module")
async def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with Sandbox(job_seconds=0.0, speak=False) as sandbox:
        credentials = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=sandbox.base_url)
        terms: dict[str, Any] = {"credentials": credentials, "save_to": str(folder)}
        await text_to_speech("Said by itself.", name="alone", **terms)
        await text_to_speech_batch(LINES, **terms, return_state=True)
    return folder


@pytest.fixture
def spoken(original: Path, save_to: str) -> Path:
    """A folder, moved here, with a batch, one line of which was refused, and a text that was said before."""
    return Path(shutil.copytree(original, save_to))


@pytest.fixture
def served(spoken: Path) -> Iterator[httpx.Client]:
    """The pages of the folder; what is asked for is relative to it."""
    with listening(port=0, folders=[spoken]) as url, httpx.Client(base_url=f"{url}/{folder_id(spoken)}/") as client:
        yield client


def test_the_page_of_a_batch_has_its_lines_in_order_with_those_that_failed_and_then_what_else_is_there(
    served: httpx.Client, spoken: Path
) -> None:
    page = served.get("").raise_for_status().text
    order = [
        "Comes first.",
        "CONTENT_POLICY_VIOLATION",
        "Content rejected",
        "alert(1)",
        "Also saved here",
        "Said by it",
    ]
    assert sorted(order, key=page.index) == order
    assert page.count("<audio ") == page.count('alt="Waveform"') == 3
    assert "1 line has no audio" in page
    assert page.count("Elevenlabs-Turbo-V2.5") == 4
    assert page.count(" USD<") == 4
    assert str(spoken) in page


def test_what_others_have_written_is_text_on_every_page(served: httpx.Client) -> None:
    for page in (served.get("").text, served.get("page/first.mp3").text):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}" in page
        assert "<script" not in page
    assert "bad &lt;b&gt;" in served.get("").text


def test_a_file_has_a_page_of_its_own(served: httpx.Client) -> None:
    page = served.get("page/alone.mp3").raise_for_status().text
    for told in ("Said by itself.", "../alone.mp3?download", "saved by the run", 'src="../alone.mp3"', "Waveform"):
        assert told in page


def test_a_file_comes_whole_and_in_ranges_as_players_ask_for_it(served: httpx.Client, spoken: Path) -> None:
    content = (spoken / "alone.mp3").read_bytes()
    whole = served.get("alone.mp3")
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-type"] == "audio/mpeg"
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["last-modified"]
    part = served.get("alone.mp3", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(content)}"
    assert served.get("alone.mp3", headers={"Range": "bytes=-10"}).content == content[-10:]
    again = {"Range": "bytes=5-", "If-Range": whole.headers["etag"]}
    assert served.get("alone.mp3", headers=again).content == content[5:]
    assert served.get("alone.mp3", headers={**again, "If-Range": '"another"'}).content == content
    assert served.get("alone.mp3", headers={"Range": f"bytes={len(content)}-"}).status_code == 416
    head = served.head("alone.mp3")
    assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", len(content))


def test_a_download_is_to_be_kept_and_a_file_to_be_heard_is_not(served: httpx.Client) -> None:
    assert served.get("alone.mp3").headers["content-disposition"] == 'inline; filename="alone.mp3"'
    kept = served.get("alone.mp3?download").headers["content-disposition"]
    assert kept == 'attachment; filename="alone.mp3"'


def test_all_of_a_folder_comes_as_a_zip(served: httpx.Client, spoken: Path) -> None:
    answer = served.get("all.zip")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        found = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert found == {path.name: path.read_bytes() for path in files_in(spoken) if path.suffix == ".mp3"}
    assert len(found) == 3
    assert served.head("all.zip").content == b""


async def page_at(url: str, folder: Path, *path: str) -> str:
    async with httpx.AsyncClient() as client:
        return (await client.get("/".join([url, folder_id(folder), *(path or [""])]))).raise_for_status().text


def raw(client: httpx.Client, target: str, *headers: str, method: str = "GET") -> tuple[int, str]:
    """Ask for something as it is written, which no client would send so."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection:
        lines = [f"{method} {target} HTTP/1.1", *(headers or ("Host: localhost",)), "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode("latin-1")
    return int(answer.split(" ", 2)[1]), answer


OUTSIDE = [
    "../secret.mp3",
    "%2e%2e/secret.mp3",
    "..%2fsecret.mp3",
    "%2e%2e%2fsecret.mp3",
    "..%5csecret.mp3",
    "%252e%252e%252fsecret.mp3",
    "%c0%ae%c0%ae/secret.mp3",
    "page/..%2f..%2fsecret.mp3",
    "page/%2e%2e%2fsecret.mp3",
    "/secret.mp3",
    "%2fetc%2fpasswd",
    "%00.mp3",
    "alone.mp3%00",
    "leading-out.mp3",
    "page/leading-out.mp3",
    "folder/inside.mp3",
    "folder%2finside.mp3",
    "folder.mp3",
    "folder.mp3/",
    "manifest.jsonl",
    ".nanogpt/",
    ".nanogpt",
    ".nanogpt/kept.mp3",
    ".nanogpt%2fkept.mp3",
    ".hidden.mp3",
    "notes.txt",
    "%s" * 10,
    "x" * 5_000 + ".mp3",
]


@pytest.mark.parametrize("target", OUTSIDE)
def test_nothing_is_handed_out_but_audio_that_lies_in_the_folder(
    target: str, served: httpx.Client, spoken: Path
) -> None:
    for place in (spoken.parent, spoken / "folder", spoken / "folder.mp3", spoken / ".nanogpt"):
        place.mkdir(exist_ok=True)
        for name in ("secret.mp3", "inside.mp3", "kept.mp3"):
            (place / name).write_bytes(b"SECRET")
    (spoken / "notes.txt").write_text("SECRET")
    (spoken / ".hidden.mp3").write_text("SECRET")
    (spoken / "leading-out.mp3").symlink_to(spoken.parent / "secret.mp3")
    status, answer = raw(served, f"/{folder_id(spoken)}/{target}")
    assert status == 404
    assert "SECRET" not in answer
    assert "passwd" not in answer
    assert "line" not in answer


def test_a_link_within_the_folder_leads_to_its_audio(served: httpx.Client, spoken: Path) -> None:
    (spoken / "same.mp3").symlink_to("alone.mp3")
    assert served.get("same.mp3").content == (spoken / "alone.mp3").read_bytes()


def test_a_folder_that_was_not_named_is_not_there(served: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    assert raw(served, f"/{folder_id(tmp_path / 'another')}/")[0] == 404
    assert raw(served, f"/{quote(str(tmp_path), safe='')}/")[0] == 404
    assert "another" not in raw(served, "/")[1]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("target", ["", "alone.mp3", "all.zip", "page/alone.mp3"])
def test_it_can_only_be_read(method: str, target: str, served: httpx.Client, spoken: Path) -> None:
    before = {path: path.read_bytes() for path in files_in(spoken)}
    assert served.request(method, target).status_code == 405
    assert {path: path.read_bytes() for path in files_in(spoken)} == before


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:80", "127.0.0.1:4201", "[::1]:4201", "LOCALHOST.", "127.1.2.3"]
)
def test_who_calls_it_by_a_name_of_loopback_is_answered(host: str, served: httpx.Client) -> None:
    assert raw(served, "/", f"Host: {host}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: evil.example",),
        ("Host: localhost.evil.example",),
        ("Host: 127.0.0.1.evil.example:80",),
        ("Host: evil@localhost",),
        ("Host: 192.168.1.1",),
        ("Host: ",),
        ("X-Forwarded-Host: localhost", "Host: evil.example"),
    ],
)
def test_who_calls_it_by_another_name_is_not_answered(headers: tuple[str, ...], served: httpx.Client) -> None:
    status, answer = raw(served, "/", *headers)
    assert status == 421
    assert "<html" not in answer


def test_the_name_that_links_begin_with_is_one_of_its_own(spoken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_LISTEN_URL", "https://audio.example.org/")
    with listening(port=0, folders=[spoken]) as url, httpx.Client(base_url=url) as client:
        assert raw(client, "/", "Host: audio.example.org")[0] == 200
        assert raw(client, "/", "Host: example.org")[0] == 421


def test_pages_allow_no_scripts_and_no_frames(served: httpx.Client) -> None:
    for target in ("", "page/alone.mp3", "alone.mp3", "no-such.mp3"):
        policy = served.get(target).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script" not in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


def test_audio_that_is_gone_is_said_to_be(served: httpx.Client, spoken: Path) -> None:
    (spoken / "second.mp3").unlink()
    (spoken / "alone.mp3").unlink()
    page = served.get("").text
    assert page.count("The file is not there any more.") == 1
    assert page.count("<audio ") == 1
    assert "Said by itself." not in page


async def test_audio_whose_name_another_text_has_taken_is_heard_under_the_name_it_is_kept_as(
    terms: dict[str, Any], save_to: str
) -> None:
    first = await text_to_speech("The first to be called so.", name="same", **terms)
    await text_to_speech(
        "The second to be called so, which takes rather longer to say than the first.", name="same", **terms
    )
    folder = Path(save_to)
    with listening(port=0, folders=[folder]) as url:
        page = await page_at(url, folder)
        kept = kept_name("same.mp3", first.sha256)
        assert page.index('src="same.mp3"') < page.index(f'src="{kept}"')  # what is newest comes first
        assert "The first to be called so." in await page_at(url, folder, "page", kept)
        assert (folder / kept).read_bytes() != (folder / "same.mp3").read_bytes()


async def test_the_parts_of_a_long_text_are_not_listed_beside_it(terms: dict[str, Any], save_to: str) -> None:
    await text_to_speech("One sentence of it. And another one of it.", name="long", max_chars=25, **terms)
    folder = Path(save_to)
    with listening(port=0, folders=[folder]) as url:
        page = await page_at(url, folder)
        assert page.count("<audio ") == 1
        assert 'src="long.mp3"' in page


async def test_a_ledger_elsewhere_is_read_where_it_is(
    terms: dict[str, Any], save_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "ledger"))
    await text_to_speech("Noted elsewhere.", name="noted", **terms)
    await text_to_speech("In another folder.", name="other", **{**terms, "save_to": str(tmp_path / "other")})
    folder = Path(save_to)
    with listening(port=0, folders=[folder]) as url:
        page = await page_at(url, folder)
        assert "Noted elsewhere." in page
        assert "In another folder." not in page


def test_a_folder_whose_record_is_damaged_still_opens(served: httpx.Client, spoken: Path) -> None:
    for note in (spoken / ".nanogpt").glob("*.json"):
        note.write_bytes(b'{"audio": ')
    with (spoken / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"id": "torn\n\xff\xfe\n[]\n')
    page = served.get("").raise_for_status().text
    assert page.count("<audio ") == 2
    (spoken / "manifest.jsonl").write_bytes(b"\xff")
    assert "Nothing that the record of this folder knows of" in served.get("").raise_for_status().text


def test_ten_thousand_lines_open_a_page_at_a_time(tmp_path: Path) -> None:
    provider, sound = "https://provider.test/api", tone("mp3", 0.2)
    lines = read_lines([{"id": f"line-{n:05}", "text": f"Text {n}."} for n in range(10_000)], {"model": "Kokoro-82m"})
    digest = hashlib.sha256(sound).hexdigest()
    rows = []
    for line in lines:
        (tmp_path / f"{line.id}.mp3").write_bytes(sound)
        rows.append(
            ManifestRow(
                id=line.id,
                text=line.request.text,
                outcome="completed",
                location=f"/moved/since/{line.id}.mp3",
                sha256=digest,
                size_bytes=len(sound),
                job=Job(provider, line.request, 1, line.id).id,
            )
        )
    told = "".join(json.dumps(row.model_dump(mode="json", exclude_none=True)) + "\n" for row in rows)
    (tmp_path / "manifest.jsonl").write_text(told)
    ledger = Ledger(Destination(tmp_path))
    last = AudioFile(
        location=str(tmp_path / "line-09999.mp3"),
        container="mp3",
        content_type="audio/mpeg",
        size_bytes=len(sound),
        sha256=digest,
        peaks=(1, 50, 100),
    )
    ledger.note_saved(Job(provider, noted_as=rows[-1].job), 1, last)
    with listening(port=0, folders=[tmp_path]) as url, httpx.Client(base_url=url, timeout=120) as client:
        first = client.get(f"/{folder_id(tmp_path)}/").text
        assert "10000 files" in first
        assert "Page 1 of 200" in first
        assert (first.count("<audio "), "Text 49." in first, "Text 50." in first) == (50, True, False)
        assert 'href="?page=2"' in first
        assert "Waveform" not in first
        end = client.get(f"/{folder_id(tmp_path)}/?page=200").text
        assert (end.count("<audio "), "Text 9999." in end, "Waveform" in end) == (50, True, True)
        for odd in ("0", "-1", "201", "x", "9" * 50):
            assert client.get(f"/{folder_id(tmp_path)}/?page={odd}").status_code == 200


async def test_what_runs_have_saved_to_is_served_without_being_named(original: Path, terms: dict[str, Any]) -> None:
    assert registered()[folder_id(original)] == original
    later = Path(terms["save_to"])
    with listening(port=0) as url:
        assert "Said by itself." in await page_at(url, original)
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            await page_at(url, later)
        await text_to_speech("Said while it is served.", **terms)
        assert "Said while it is served." in await page_at(url, later)
        async with httpx.AsyncClient() as client:
            start = (await client.get(url)).text
    assert start.index(f'href="{folder_id(later)}/"') < start.index(f'href="{folder_id(original)}/"')


def test_a_port_that_is_taken_is_said_to_be_and_by_what() -> None:
    with (
        listening(port=0) as url,
        pytest.raises(NanoGPTError, match="is taken") as caught,
        listening(port=int(url.rpartition(":")[2])),
    ):
        pass
    assert caught.value.code == "PORT_TAKEN"
    if sys.platform == "linux":
        assert f"process {os.getpid()} (" in str(caught.value)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(NanoGPTError, match=r"192\.0\.2\.1"), listening(port=0, host="192.0.2.1"):
        pass


def test_the_port_is_free_again_after_the_end() -> None:
    with listening(port=0) as url:
        port = int(url.rpartition(":")[2])
    with listening(port=port) as again:
        assert again == url


def test_listen_serves_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "said").mkdir()
    command = [str(Path(sys.executable).parent / "prefect-nanogpt"), "listen", "--port", "0", "--folder", "said"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = process.stderr.readline().split(" at ")[1].partition(". Ctrl-C")[0]
    assert f'href="{folder_id(tmp_path / "said")}/"' in httpx.get(url).text
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")


def test_listen_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "prefect-nanogpt"), "listen", "--folder", "missing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "missing is not a folder" in done.stderr


# In a browser


@pytest.fixture
async def browser() -> Any:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--mute-audio"]
        )
        yield browser
        await browser.close()


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
async def test_a_browser_plays_what_is_on_the_page(
    scripts: bool, spoken: Path, terms: dict[str, Any], browser: Browser
) -> None:
    page = await browser.new_page(java_script_enabled=scripts, viewport={"width": 390, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    with listening(port=0, folders=[spoken]) as url:
        await page.goto(url)
        await page.get_by_role("link", name=spoken.name).click()
        await expect(page.locator("audio")).to_have_count(3)
        await page.get_by_role("link", name="alone.mp3").click()
        player = page.locator("audio")
        await expect(page.get_by_alt_text("Waveform")).to_be_visible()
        box = await player.bounding_box()
        assert box is not None
        await page.mouse.click(box["x"] + 27, box["y"] + box["height"] / 2)  # the button of the player itself
        for _ in range(200):
            if played := await player.evaluate("audio => audio.currentTime"):
                break
            await page.wait_for_timeout(50)
        assert played > 0
        assert await player.evaluate("audio => audio.error") is None
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert said == []
    await page.close()
