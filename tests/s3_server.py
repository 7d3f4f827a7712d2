"""A real S3 API on loopback: moto's server, which checks keys, signatures and policies, and can break uploads off."""

import json
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote

import boto3
import pytest
import requests
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.exceptions import ClientDisconnected
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

READ = ["s3:ListBucket", "s3:GetObject"]
ERRORS = {409: "ConditionalRequestConflict", 500: "InternalError", 501: "NotImplemented", 503: "ServiceUnavailable"}
WRITE = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListBucketMultipartUploads", "s3:ListMultipartUploadParts"]
CHECKSUM_HEADERS = ("HTTP_X_AMZ_CHECKSUM_", "HTTP_X_AMZ_SDK_CHECKSUM_", "HTTP_X_AMZ_TRAILER")
NOBODY = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}
"""An environment in which AWS's tools find no account of whoever runs the tests, and do not try for long."""


class S3Server:
    """A server with the bucket `speech`, which its one user may use, and `private`, which nobody may.

    There is no bucket `missing`, and the user may know it.

    Attributes:
        env: What AWS's own tools expect in the environment to find the server and the user's key.
        requests: Method and path with query of each request, as they came.
        uploads: The query string of each PUT and POST for an object, as they came.
        break_uploads: Close the connection of each upload in the middle of its body, but for the notes of the ledger.
        fail_reads: Answer each GET of the bucket or of an object in it with HTTP 500.
        creations: Each write of an object that must not be there (`If-None-Match: *`): its name and the HTTP status.
        faults: What becomes of such writes: a part of the name, and an HTTP status to answer without a look at it;
            or `lost` to close the connection when the object is written; or `blind` to fail all reads then, too.
        ignore_conditions: Write the object although it is there, as stores do that do not know the condition.
        name_conditions: Say which condition failed, as AWS does and other stores do not.
        refuses_checksums: How to refuse an upload that has a checksum with it, as older stores do: HTTP status, code
            and message; None to take it.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.uploads: list[str] = []
        self.break_uploads = False
        self.fail_reads = False
        self.creations: list[tuple[str, int]] = []
        self.faults: list[tuple[str, int | str]] = []
        self.ignore_conditions = False
        self.name_conditions = True
        self.refuses_checksums: tuple[int, str, str] | None = None
        self._one_creation = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {"AWS_ENDPOINT_URL": self.url}

    def __enter__(self) -> "S3Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        requests.post(f"{self.url}/moto-api/reset").raise_for_status()
        root = {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        for bucket in ("speech", "private"):
            self.client("s3", **root).create_bucket(Bucket=bucket)
        iam = self.client("iam", **root)
        iam.create_user(UserName="speaker")
        self._allow(iam, [*READ, *WRITE])
        key = iam.create_access_key(UserName="speaker")["AccessKey"]
        self.key = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
        self.env |= {name.upper(): value for name, value in self.key.items()}
        self._check_keys_after(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._check_keys_after(float("inf"))
        self._server.shutdown()
        self._server.server_close()

    @property
    def settings(self) -> dict[str, str]:
        """What the driver needs to find the server and the user's key, with nothing in the environment."""
        return {
            "key": self.key["aws_access_key_id"],
            "secret": self.key["aws_secret_access_key"],
            "endpoint_url": self.url,
        }

    def client(self, service: str, **key: str) -> Any:
        return boto3.client(service, endpoint_url=self.url, region_name="us-east-1", **(key or self.key))

    def objects(self) -> dict[str, bytes]:
        """Read every object of the bucket."""
        s3 = self.client("s3")
        names = [found["Key"] for found in s3.list_objects_v2(Bucket="speech").get("Contents", [])]
        return {name: s3.get_object(Bucket="speech", Key=name)["Body"].read() for name in names}

    def content_type(self, name: str) -> str:
        return str(self.client("s3").head_object(Bucket="speech", Key=name)["ContentType"])

    def unfinished_uploads(self) -> list[Any]:
        return list(self.client("s3").list_multipart_uploads(Bucket="speech").get("Uploads", []))

    def allow_only(self, *actions: str) -> None:
        self._check_keys_after(float("inf"))
        self._allow(self.client("iam"), list(actions))
        self._check_keys_after(0)

    def _allow(self, iam: Any, actions: list[str]) -> None:
        resources = [f"arn:aws:s3:::{name}" for name in ("speech", "speech/*", "missing")]
        allowed = {"Effect": "Allow", "Action": actions, "Resource": resources}
        iam.put_user_policy(
            UserName="speaker",
            PolicyName="speech",
            PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}),
        )

    def _check_keys_after(self, requests_unchecked: float) -> None:
        requests.post(f"{self.url}/moto-api/reset-auth", data=str(requests_unchecked)).raise_for_status()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}")
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and environ["PATH_INFO"].startswith("/speech/"):
            self.uploads.append(environ["QUERY_STRING"])
            size = int(environ.get("CONTENT_LENGTH") or 0)
            if self.break_uploads and size and "/.nanogpt/" not in environ["PATH_INFO"]:
                environ["wsgi.input"].read(size // 2)
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                with suppress(ClientDisconnected):
                    environ["wsgi.input"].read()  # or else it would be taken for the next request
                raise ConnectionAbortedError("the upload was broken off")
        if self.refuses_checksums and any(name.startswith(CHECKSUM_HEADERS) for name in environ):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _error(*self.refuses_checksums)(environ, start_response)
        if "HTTP_IF_NONE_MATCH" in environ:
            return self._create(environ)(environ, start_response)
        if environ["REQUEST_METHOD"] in ("GET", "HEAD") and "X-Amz-Signature=" in environ["QUERY_STRING"]:
            return self._read_signed(environ)(environ, start_response)
        if self.fail_reads and environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].startswith("/speech"):
            return _error(500)(environ, start_response)
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    def _read_signed(self, environ: dict[str, Any]) -> Response:
        """Give an object for a signed URL, which moto does not know how to check."""
        query = dict(parse_qsl(environ["QUERY_STRING"]))
        signed = re.sub("&?X-Amz-Signature=[^&]*", "", environ["QUERY_STRING"])
        request = AWSRequest("GET", f"{self.url}{quote(environ['PATH_INFO'])}?{signed}")
        request.context["timestamp"] = query["X-Amz-Date"]
        key = Credentials(self.key["aws_access_key_id"], self.key["aws_secret_access_key"])
        auth = S3SigV4QueryAuth(key, "s3", "us-east-1")
        expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        began = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if query["X-Amz-Signature"] != expected or datetime.now(UTC) > began + timedelta(
            seconds=min(604_800, int(query["X-Amz-Expires"]))
        ):
            return _error(403, "SignatureDoesNotMatch")
        bucket, _, name = environ["PATH_INFO"].lstrip("/").partition("/")
        part = {"Range": environ["HTTP_RANGE"]} if "HTTP_RANGE" in environ else {}
        found = self.client("s3").get_object(Bucket=bucket, Key=name, **part)
        headers = {"Accept-Ranges": "bytes"}
        if "ContentRange" in found:
            headers["Content-Range"] = found["ContentRange"]
        if disposition := query.get("response-content-disposition"):
            headers["Content-Disposition"] = disposition
        status = found["ResponseMetadata"]["HTTPStatusCode"]
        return Response(found["Body"].read(), status, headers, content_type=found["ContentType"])

    def _create(self, environ: dict[str, Any]) -> Response:
        """Write an object that must not be there. S3 does it as one operation, moto alone looks and then writes."""
        name = environ["PATH_INFO"].removeprefix("/speech/")
        fault = next((fault for fault in self.faults if fault[0] in name), ("", None))
        if fault in self.faults:
            self.faults.remove(fault)
        if isinstance(fault[1], int):
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            response = _error(fault[1])
        else:
            with self._one_creation:
                if self.ignore_conditions:
                    self._forget(name)
                response = Response.from_app(self._moto, environ, buffered=True)
        self.creations.append((name, response.status_code))
        if fault[1] in ("lost", "blind"):
            self.fail_reads = fault[1] == "blind"
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("the answer was lost")
        if not self.name_conditions:
            response.data = re.sub(rb"<Condition>.*?</Condition>", b"", response.data)
        return response

    def _forget(self, name: str) -> None:
        for account in s3_backends.values():
            if name in (objects := account["aws"].buckets["speech"].keys):
                objects.pop(name)


def _error(status: int, code: str | None = None, message: str | None = None) -> Response:
    code = code or ERRORS[status]
    words = f"<Error><Code>{code}</Code><Message>{message or code}</Message></Error>"
    return Response(words, status, mimetype="application/xml")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 API; nothing in the environment says where it is or has its key."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in NOBODY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    # The collector of an earlier test may have made one for this bucket, before there was a key.
    S3FileSystem.clear_instance_cache()
    with S3Server() as server:
        yield server
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_env(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 API that the environment gives the way to, and the key of."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3
