"""Answers that no honest provider gives: each harms the job that it is about, with a code, and nothing else."""

import gzip
import json
import pickle
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from prefect_nanogpt import NanoGPTCredentials, client, connections
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.errors import AudioError, NanoGPTError, ProviderError, SubmissionUncertain
from prefect_nanogpt.flows import text_to_speech, wait_for_tts
from prefect_nanogpt.ledger import FOLDER
from prefect_nanogpt.models import Completed, Pending, PollSchedule, Rejected, Ticket, TTSRequest, one_line
from prefect_nanogpt.sandbox import Accept, Answer, Redirect, Sandbox, Slow
from tests.conftest import API_KEY

pytestmark = pytest.mark.usefixtures("transport")
MODEL = "Elevenlabs-Turbo-V2.5"
REQUEST = TTSRequest(text="Hello there.", model=MODEL)
TICKET = Ticket(run_id="98b0", model=MODEL)
DEEP = "[" * 100_000


@pytest.fixture
async def asking(sandbox: Sandbox) -> AsyncIterator[NanoGPTClient]:
    async with NanoGPTClient(API_KEY, sandbox.base_url) as asking:
        yield asking


def raw(body: str | bytes, status: int = 200, **headers: str) -> Answer:
    """Make an answer of bytes that are said to be JSON."""
    content = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    return Answer(status, body=content, headers={"content-type": "application/json", **headers})


# Words


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("  Not\r\nnow. \u2028 Later\x85 ", "Not now. Later"),
        ("\x1b[31;1mRed\x1b[0m and \x9b2Jclear", "Red and clear"),
        ("\x1b]0;title\x07Title, \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\.", "Title, link."),
        ("\x1b(0lqk\x1b(B \x1bPq#0\x1b\\sixel", "lqk sixel"),
        ("half \ud83d of it", "half of it"),
        ("nul\0 and bell\a", "nul and bell"),
        ("right\u202eto left\u2066", "right to left"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("x" * 61, "x" * 59 + "…"),
        (" " * 10**6 + "far", ""),
    ],
)
def test_words_of_others_are_one_line_of_plain_text(said: str, shown: str) -> None:
    assert one_line(said, 60) == shown


async def test_a_rejection_keeps_its_words_within_bounds(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    words = "\x1b[2J" + "very long \ud800 " * 1_000
    sandbox.on_status("98b0", [{"status": "error", "code": "bad-voice" * 100, "error": words}])

    status = await asking.status(TICKET)

    assert isinstance(status, Rejected)
    assert len(status.code) <= 64
    assert status.code.startswith("BAD_VOICEBAD_VOICE")
    assert status.message.startswith("very long very long")
    assert len(status.message) == 2_000


async def test_a_status_word_is_one_line_and_not_long(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_status("98b0", [{"status": "Warming\n\x1b[1m up " * 100}])

    status = await asking.status(TICKET)

    assert isinstance(status, Pending)
    assert status.word.startswith("warming up warming up")
    assert len(status.word) == 200


async def test_a_key_that_the_provider_repeats_is_masked(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_status("98b0", [Answer(401, {"error": f"Invalid key {API_KEY}."}, headers={"x-request-id": API_KEY})])
    sandbox.on_submit([raw(f'{{"error": "{API_KEY}"'), {"error": f"no job for {API_KEY}"}])

    errors = []
    for ask in (asking.status(TICKET), asking.submit(REQUEST), asking.submit(REQUEST)):
        with pytest.raises(NanoGPTError) as caught:
            await ask
        errors.append(caught.value)

    told = repr([(str(error), vars(error), pickle.dumps(error)) for error in errors])
    assert "Invalid key ***" in told
    assert API_KEY not in told


async def test_a_url_with_the_key_in_it_is_not_fetched(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_audio(None, [Redirect(f"/audio/1.mp3?key={API_KEY}")])

    with pytest.raises(AudioError, match="has the API key in it") as caught:
        async with asking.download(f"{sandbox.audio_url}/audio/1.mp3"):
            pass

    assert API_KEY not in str(caught.value)
    assert len(sandbox.requests("audio")) == 1


# Numbers


@pytest.mark.parametrize(
    "number",
    [
        "-1",
        "1" * 400,
        "1" * 5_000,
        "1e1000000",
        "1e99999999999999999999",
        "1.5",
        '"3"',
        "true",
        "null",
        "NaN",
        "Infinity",
    ],
)
async def test_an_odd_place_in_the_queue_is_no_place(number: str, asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_status("98b0", [raw(f'{{"status": "pending", "queuePosition": {number}}}')])

    assert await asking.status(TICKET) == Pending(word="pending")


@pytest.mark.parametrize(
    "cost",
    [
        *("-1", "1e1000000", "1e-1000000", "1e99999999999999999999", "1" * 400, "1" * 5_000, "NaN", "-Infinity"),
        *('"NaN"', '"1e1000000"', '"1e-1000000"', '"free"', "[]", '{"usd": 1}', "true", "1e10"),
    ],
)
async def test_an_odd_cost_is_not_known_and_all_else_of_the_ticket_is_kept(
    cost: str, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([raw(f'{{"runId": "98b0", "model": "its-own", "cost": {cost}, "paymentSource": "USD"}}', 202)])

    ticket = await asking.submit(REQUEST)

    assert isinstance(ticket, Ticket)
    assert ticket.cost in (None, Decimal(1))  # true is a number of Python
    assert (ticket.run_id, ticket.model, ticket.payment_source) == ("98b0", "its-own", "USD")


async def test_an_amount_of_thirty_decimals_is_kept_exactly(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    amount = "0.000000000000000000000000000123"
    sandbox.on_submit([raw(f'{{"runId": "98b0", "cost": {amount}, "paymentSource": "XNO"}}')])

    ticket = await asking.submit(REQUEST)

    assert isinstance(ticket, Ticket)
    assert f"{ticket.cost:f}" == amount


@pytest.mark.parametrize(
    "model", ["", "x" * 201, "x" * 300_000, "two\nlines", "\ud800", 7, ["a"]], ids=lambda m: repr(m)[:9]
)
async def test_an_odd_model_on_a_ticket_is_the_one_asked_for(
    model: Any, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([{"runId": "98b0", "model": model, "cost": 0.5}])

    ticket = await asking.submit(REQUEST)

    assert isinstance(ticket, Ticket)
    assert (ticket.model, ticket.cost) == (MODEL, Decimal("0.5"))


# What was paid for and is odd


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('{"runId": "../../etc/passwd"}', "'../../etc/passwd'"),
        ('{"runId": "two\\nlines"}', "'two\\\\nlines'"),
        ('{"runId": "half \\ud800"}', "'half \\\\ud800'"),
        (f'{{"runId": "{"x" * 600}"}}', "'xxx"),
        ('{"runId": ["a"]}', None),
        ('{"runId": true}', None),
        (f'{{"runId": {"7" * 100}}}', "'777"),
        ('{"runId": "98b0", "cost": ', "'98b0'"),
        (f'{{"runId": "98b0", "more": {DEEP}', "'98b0'"),
        ('{"runId": "98b0"} and more', "'98b0'"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_an_odd_run_id_is_kept_escaped_in_message_and_note(
    body: str, named: str | None, sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    sandbox.on_submit([raw(body, 202)])

    for _ in range(2):  # the second one reads it from the note
        with pytest.raises(SubmissionUncertain) as caught:
            await text_to_speech("Hello.", save_to=save_to, credentials=credentials)
        assert named is None or f"The run id in it is {named}" in str(caught.value)
        assert str(caught.value).isprintable()

    assert len(sandbox.requests("submit")) == 1
    [note] = (Path(save_to) / FOLDER).glob("*.over-uncertain.json")
    assert json.loads(note.read_text())["message"] in str(caught.value)


ODD_URLS = [
    *("mailto:speech@audio.test", "http://127.0.0.1:99999/1.mp3", "http://[::1", "http://xn--a/1.mp3", "http:///1.mp3"),
    *(
        f"http://{'a' * 70}.test/1.mp3",
        "http://127.0.0.1:0/",
        "http://127.0.0.1/" + "x" * 70_000,
        "http://a b/",
        "http://%@/",
    ),
]
ODD_IN_JSON = ["http://\ud800/", "\ud800", "//x", f"http://ü{'a' * 70}.test/", "http://u\0ser:p@[::1/", "x" * 300_000]


@pytest.mark.parametrize("url", [*ODD_URLS, *ODD_IN_JSON], ids=lambda url: ascii(url)[:30])
async def test_a_url_that_is_none_is_an_audio_error_and_the_job_stays_open(
    url: str, sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [sandbox.completed_body(ticket["runId"]) | {"audioUrl": url}])

    states = [
        await wait_for_tts(ticket, save_to=save_to, credentials=credentials, poll=quick, return_state=True)
        for _ in range(2)
    ]

    assert [state.name for state in states] == ["AUDIO_UNAVAILABLE", "Completed"]


@pytest.mark.parametrize("url", ODD_URLS, ids=lambda url: ascii(url)[:30])
async def test_a_redirect_to_what_is_no_url_is_an_audio_error(
    url: str, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_audio(None, [Redirect(url)])

    with pytest.raises(AudioError) as caught:
        async with asking.download(f"{sandbox.audio_url}/audio/1.mp3"):
            pass

    assert len(str(caught.value)) < 1_000


async def test_a_strange_login_in_the_url_of_saved_audio_ends_no_run(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    ticket = sandbox.add_job()
    body = sandbox.completed_body(ticket["runId"])
    login = "speaker%00:s[e]c@ret"
    body["audioUrl"] = body["audioUrl"].replace("http://", f"http://{login}@")
    sandbox.on_status(ticket["runId"], [body])

    audio = await wait_for_tts(ticket, save_to=save_to, credentials=credentials, poll=quick)

    kept = audio.model_dump_json() + "".join(note.read_text() for note in (Path(save_to) / FOLDER).glob("*.json"))
    assert Path(audio.location).exists()
    assert "ret" not in kept
    assert "speaker" not in kept


# Size and time


@pytest.mark.parametrize("layers", [1, 2])
async def test_an_answer_that_unpacks_without_end_is_given_up(
    layers: int, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    packed = b" " * 400_000_000
    for _ in range(layers):
        packed = gzip.compress(packed, mtime=0)
    encoding = {"content-encoding": ", ".join(["gzip"] * layers)}
    sandbox.on_status("98b0", [raw(packed, **encoding)])
    sandbox.on_submit([raw(packed, **encoding)])
    tracemalloc.start()
    try:
        with pytest.raises(ProviderError, match=r"larger than|not asked for"):
            await asking.status(TICKET)
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
        with pytest.raises(SubmissionUncertain, match=r"larger than|not asked for"):
            await asking.submit(REQUEST)
        assert tracemalloc.get_traced_memory()[1] < 400_000_000
    finally:
        tracemalloc.stop()


async def test_an_answer_may_be_packed_once_as_it_was_asked_for(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    packed = gzip.compress(b'{"status": "pending"}')
    odd = [raw(packed[:20], **{"content-encoding": "gzip"}), raw(b"junk", **{"content-encoding": "gzip"})]
    sandbox.on_status("98b0", [raw(packed, **{"content-encoding": "gzip"}), *odd])

    assert await asking.status(TICKET) == Pending(word="pending")
    for _ in odd:
        with pytest.raises(ProviderError, match="UNEXPECTED_ANSWER"):
            await asking.status(TICKET)


@pytest.mark.parametrize("encoding", ["utf-8", "aws-chunked", "none", "br", "zstd, gzip", "gzip"])
async def test_a_ticket_is_read_though_it_is_not_packed_as_is_said(
    encoding: str, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([raw('{"runId": "98b0"}', 202, **{"content-encoding": encoding})])

    assert await asking.submit(REQUEST) == Ticket(run_id="98b0", model=MODEL)


@pytest.mark.parametrize("encoding", ["aws-chunked", "utf-8", "gzip, identity", "deflate"])
async def test_audio_is_read_however_its_packing_is_spelt(
    encoding: str, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    packing = {"gzip, identity": gzip.compress, "deflate": zlib.compress}
    body = packing.get(encoding, bytes)(b"ID3 and sound")
    sandbox.on_audio(None, [Answer(body=body, headers={"content-encoding": encoding})])

    async with asking.download(f"{sandbox.audio_url}/audio/1.mp3") as response:
        assert await response.aread() == b"ID3 and sound"


@pytest.mark.parametrize(
    "body",
    [b"junk", gzip.compress(b"ID3 and sound")[:-9], gzip.compress(b"ID3")[:-8] + bytes(8)],
    ids=["not packed", "cut short", "another trailer"],
)
async def test_packed_audio_that_cannot_be_unpacked_is_fetched_again(
    body: bytes, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_audio(None, [Answer(body=body, headers={"content-encoding": "gzip"})])

    with pytest.raises(AudioError) as caught:
        async with asking.download(f"{sandbox.audio_url}/audio/1.mp3") as response:
            await response.aread()

    assert (caught.value.code, caught.value.retryable) == ("AUDIO_TRUNCATED", True)


async def test_packed_audio_is_unpacked_a_little_at_a_time(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    bomb = gzip.compress(b"ID3" + bytes(200_000_000), mtime=0)
    sandbox.on_audio(None, [Answer(body=bomb, headers={"content-encoding": "gzip"})])
    size = 0
    async with asking.download(f"{sandbox.audio_url}/audio/1.mp3") as response:
        tracemalloc.start()
        try:
            async for piece in response.aiter_raw():
                size += len(piece)
            assert tracemalloc.get_traced_memory()[1] < 16_000_000
        finally:
            tracemalloc.stop()

    assert size == 200_000_003


async def test_a_damaged_trailer_costs_no_ticket(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    packed = gzip.compress(b'{"runId": "98b0"}')[:-8] + bytes(8)
    sandbox.on_submit([raw(packed, 202, **{"content-encoding": "gzip"})])

    assert await asking.submit(REQUEST) == Ticket(run_id="98b0", model=MODEL)


async def test_a_server_error_with_a_run_id_in_it_names_it(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_submit([Answer(500, {"error": "Oh", "runId": "98b0"})])

    with pytest.raises(SubmissionUncertain, match="The run id in it is '98b0'"):
        await asking.submit(REQUEST)


async def test_a_key_that_hides_behind_escapes_is_masked(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    escaped = API_KEY.replace("-", "\\u002d")
    sandbox.on_status("98b0", [raw(f'{{"status": "error", "error": "No {escaped}"}}')])
    sandbox.on_audio(None, [Redirect(f"/1.mp3?{API_KEY.replace('-', '%2D')}")])

    assert await asking.status(TICKET) == Rejected(message="No ***")
    with pytest.raises(AudioError, match="has the API key in it"):
        async with asking.download(f"{sandbox.audio_url}/audio/1.mp3"):
            pass


async def test_an_answer_that_is_too_large_is_given_up(
    asking: NanoGPTClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.on_status("98b0", [raw(b" " * (9 * 1024**2))])
    with pytest.raises(ProviderError, match="larger than 8,388,608 bytes"):
        await asking.status(TICKET)

    monkeypatch.setattr(client, "LARGEST_ANSWER_BYTES", 1_000)
    sandbox.on_submit([Answer(body=b"ID3" + bytes(2_000), headers={"content-type": "audio/mpeg"})])
    with pytest.raises(SubmissionUncertain, match="larger than 1,000 bytes"):
        await asking.submit(REQUEST)


@pytest.mark.parametrize("deep", [DEEP, '{"a":' * 100_000, '{"status": "pending", "x": ' + DEEP])
async def test_an_answer_that_is_too_deep_is_no_answer(deep: str, asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_status("98b0", [raw(deep)])

    with pytest.raises(ProviderError, match="UNEXPECTED_ANSWER"):
        await asking.status(TICKET)


@pytest.mark.parametrize(
    "retry_after",
    [
        "1e400",
        "9" * 400,
        "nan",
        "-5",
        "Mon, 99 Foo 99999999999 99:99:99 +99999999999",
        "Thu, 01 Jan 9999 00:00:00 GMT",
        "soon",
    ],
)
async def test_an_odd_retry_after_is_bounded(retry_after: str, asking: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_status("98b0", [Answer(429, {"error": "Slow down."}, headers={"retry-after": retry_after})])

    with pytest.raises(ProviderError) as caught:
        await asking.status(TICKET)

    assert caught.value.retry_after_seconds is None or 0 <= caught.value.retry_after_seconds <= 366 * 86_400


async def test_a_status_that_trickles_is_given_up(
    asking: NanoGPTClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_LOOK_SECONDS", 0.5)
    sandbox.on_status("98b0", [Slow(20)])
    ticket = Ticket.model_validate(sandbox.add_job(run_id="98b0"))

    with pytest.raises(ProviderError, match="not whole after") as caught:
        await asking.status(ticket)

    assert (caught.value.code, caught.value.retryable) == ("UNEXPECTED_ANSWER", True)


async def test_a_submission_that_trickles_is_uncertain(
    asking: NanoGPTClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_ANSWER_SECONDS", 0.5)
    sandbox.on_submit([Accept(then=Slow(20))])

    with pytest.raises(SubmissionUncertain, match="not whole after"):
        await asking.submit(REQUEST)


async def test_a_ticket_that_is_whole_counts_though_its_answer_breaks_off(
    asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    body = b'{"runId": "98b0", "cost": 0.5}'
    sandbox.on_submit([raw(body, 202, **{"content-length": str(size)}) for size in (len(body) + 50, len(body))])
    sandbox.on_submit([raw(body[:20], 202, **{"content-length": str(len(body))})])

    assert await asking.submit(REQUEST) == await asking.submit(REQUEST)
    with pytest.raises(SubmissionUncertain, match=r"broke off .* The run id in it is '98b0'"):
        await asking.submit(REQUEST)


async def test_a_download_that_trickles_is_given_up_and_tried_again(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    quick: PollSchedule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "LEAST_BYTES_SECONDS", 0.5)
    sandbox.on_audio(None, [Slow(1_000)])

    audio = await wait_for_tts(sandbox.add_job(), save_to=save_to, credentials=credentials, poll=quick)

    assert Path(audio.location).exists()
    assert len(sandbox.requests("audio")) == 2


async def test_a_download_that_takes_too_long_is_given_up(
    asking: NanoGPTClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LONGEST_DOWNLOAD_SECONDS", 0.5)
    ticket = sandbox.add_job(text="A sentence that is long enough. " * 20)
    size = len(sandbox.audio_bytes(ticket["runId"]))
    sandbox.on_audio(None, [Slow(size / 5)])

    with pytest.raises(AudioError, match="not whole after") as caught:
        async with asking.download(sandbox.completed_body(ticket["runId"])["audioUrl"]) as response:
            await response.aread()

    assert (caught.value.code, caught.value.retryable) == ("AUDIO_TRUNCATED", True)


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd", "gzip, identity, br", ", ".join(["gzip"] * 200)])
async def test_audio_that_is_packed_as_nobody_asked_is_not_read(
    encoding: str, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_audio(None, [Answer(body=b"ID3", headers={"content-encoding": encoding})])

    with pytest.raises(AudioError, match="not asked for"):
        async with asking.download(f"{sandbox.audio_url}/audio/1.mp3"):
            pass


async def test_the_size_of_audio_counts_unpacked(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    quick: PollSchedule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefect_nanogpt.storage.LARGEST_AUDIO_BYTES", 10_000_000)
    bomb = gzip.compress(b"ID3" + bytes(200_000_000), mtime=0)
    sandbox.on_audio(None, repeat(Answer(body=bomb, headers={"content-encoding": "gzip"})))

    state = await wait_for_tts(
        sandbox.add_job(), save_to=save_to, credentials=credentials, poll=quick, return_state=True
    )

    assert state.name == "AUDIO_UNAVAILABLE"
    assert "larger than 10000000 bytes" in str(state.message)


# What a job ends as that is resubmitted and gets the same run id


@pytest.mark.parametrize("status", [{"status": "failed"}, Answer(404), {"status": "pending"}], ids=str)
async def test_a_job_that_gets_the_run_id_of_an_earlier_one_is_waited_for_and_no_longer(
    status: Any, sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    ticket = sandbox.add_job(run_id="98b0")
    sandbox.on_submit(repeat(Answer(202, ticket)))
    sandbox.on_status("98b0", [{"status": "failed"}, *repeat(status, 60)])

    for _ in range(2):
        state = await text_to_speech(
            "Hello.", save_to=save_to, credentials=credentials, poll=quick, timeout_seconds=1, return_state=True
        )

    assert state.name in ("TTS_FAILED", "TTS_TIMEOUT")
    assert len(sandbox.requests("submit")) == 2
    assert len(sandbox.requests("status")) < 10


async def test_a_url_of_a_model_that_answers_at_once_is_kept_though_half_of_a_character_is_in_it(
    asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit(
        [{"audioUrl": "http://127.0.0.1/\ud800.mp3", "cost": "1e999", "duration": 1e300, "contentType": 7}]
    )

    assert await asking.submit(REQUEST) == Completed(audio_url="http://127.0.0.1/\\ud800.mp3")
