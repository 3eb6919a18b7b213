"""The bucket of a volume: immutable objects, made once, read by range, listed, deleted. obstore does the talking.

Errors leave as OSError: ENOENT for a missing object, EEXIST for one that was there, EACCES for credentials, ENOSPC for
a full store, ETIMEDOUT for what is worth another try.
"""

from __future__ import annotations

import configparser
import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

_TIMEOUT = timedelta(seconds=60)
_RETRY: Any = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
_MEMORY: dict[str, MemoryStore] = {}


MARK = "wbfuse-volume"
"""The object that says which volume a prefix belongs to: its uuid, and below it those that it had before (see load)."""


class ObjectsError(Exception):
    """The bucket cannot serve; one line for the person who asked."""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return re.sub(r"\s+", " ", text.split("\n\nDebug source")[0])[:300]


def _oserror(error: BaseException, key: str) -> OSError:
    said = _first_line(error)
    if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
        return OSError(errno.ENOENT, said, key)
    if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
        return OSError(errno.EEXIST, said, key)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return OSError(errno.EACCES, said, key)
    if "os error 28" in said or "507 Insufficient" in said or "InsufficientStorage" in said or "QuotaExceeded" in said:
        return OSError(errno.ENOSPC, said, key)
    return OSError(errno.ETIMEDOUT, said, key)


@contextlib.contextmanager
def _told(key: str) -> Iterator[None]:
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as e:
        raise _oserror(e, key) from e


def aws_profile(name: str) -> dict[str, str]:
    """Keys, token and region of a profile in ~/.aws/credentials and ~/.aws/config, as options. ObjectsError if none."""
    found: dict[str, str] = {}
    files = (
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), name),
        (os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"), name if name == "default" else f"profile {name}"),
    )
    for path, section in files:
        parser = configparser.ConfigParser()
        parser.read(os.path.expanduser(path))
        if parser.has_section(section):
            found |= dict(parser[section])
    if not found:
        raise ObjectsError(f"AWS profile {name!r} is not in ~/.aws/credentials or ~/.aws/config")
    names = {
        "aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "token", "region": "region", "endpoint_url": "endpoint",
    }  # fmt: skip
    return {option: found[key] for key, option in names.items() if key in found}


def _s3(bucket: str, prefix: str, options: dict[str, str]) -> S3Store:
    options = dict(options)
    profile = options.pop("profile", None) or os.environ.get("AWS_PROFILE")
    if profile:
        options = aws_profile(profile) | options
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    if endpoint:
        options["endpoint"] = endpoint
        # A server of one's own has one name and no certificate for a name that begins with the bucket.
        options.setdefault("virtual_hosted_style_request", "false")
    options.setdefault("region", os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1")
    # Frames have checksums of their own; SHA-256 of every body would be paid for in processor time.
    options.setdefault("unsigned_payload", "true")
    if options.pop("anonymous", "false") == "true":
        options["skip_signature"] = "true"
    config: Any = options
    return S3Store(bucket, prefix=prefix or None, config=config, client_options=_client(endpoint), retry_config=_RETRY)


def _client(endpoint: str | None) -> Any:
    client: dict[str, Any] = {"timeout": _TIMEOUT, "connect_timeout": timedelta(seconds=5)}
    if endpoint and endpoint.startswith("http://"):
        client["allow_http"] = True
    return client


def open_backend(url: str, options: dict[str, str]) -> Any:
    """The obstore store behind `url`. Raises ObjectsError."""
    parts = urlsplit(url)
    where, prefix = parts.netloc, unquote(parts.path).strip("/")
    client, config = _client(options.get("endpoint")), cast(Any, options)
    try:
        if parts.scheme == "file":
            path = "/" + prefix
            if where or not prefix:
                raise ObjectsError(f"{url}: write it with three slashes and an absolute path: file:///DIRECTORY")
            os.makedirs(path, exist_ok=True)
            return LocalStore(path)
        if parts.scheme == "memory":
            return _MEMORY.setdefault(url, MemoryStore())
        if not parts.scheme and url.startswith("/"):
            raise ObjectsError(f"{url}: write a directory as file://{url}")
        if not where:
            raise ObjectsError(f"{url}: no bucket in it; write {parts.scheme or 's3'}://BUCKET/PREFIX")
        if parts.scheme == "s3":
            return _s3(where, prefix, options)
        if parts.scheme in ("gs", "gcs"):
            return GCSStore(where, prefix=prefix or None, config=config, client_options=client, retry_config=_RETRY)
        if parts.scheme in ("az", "azure"):
            return AzureStore(where, prefix=prefix or None, config=config, client_options=client, retry_config=_RETRY)
    except ObjectsError:
        raise
    except OSError as e:
        raise ObjectsError(f"{url}: {e.strerror}") from e
    except (exceptions.BaseError, ValueError, TypeError) as e:
        raise ObjectsError(f"{url}: {_first_line(e)}") from e
    raise ObjectsError(
        f"{url}: not supported; use file:///DIR, s3://BUCKET/PREFIX, gs://..., az://... or memory://NAME"
    )


class Objects:
    """Objects under `url`. Raises ObjectsError where that cannot be. Every method may block, from any thread."""

    def __init__(self, url: str, options: dict[str, str] | None = None) -> None:
        self.url = url
        self.owner = ""
        """The volume that the mark must name, where one was asked for (`own`)."""
        self._store = open_backend(url, options or {})
        self._root = "/" + unquote(urlsplit(url).path).strip("/") if url.startswith("file:") else None

    def own(self, uuid: str) -> None:
        """This is the bucket of that volume. Raises OSError: ENOENT without a mark, EPERM with another's."""
        self.owner = uuid
        self.check_owner()

    def check_owner(self) -> None:
        """See that the volume has not been loaded into another database meanwhile, before anything is removed."""
        if self.owner:
            mark = self.owners()[0]
            if mark != self.owner:
                raise OSError(errno.EPERM, f"holds another volume ({mark}, not {self.owner})")

    def owners(self) -> list[str]:
        """The uuid in the mark, and those before it. ENOENT."""
        return self.get_all(MARK).decode(errors="replace").splitlines() or [""]

    def put(self, key: str, buffers: Sequence[memoryview | bytes], replace: bool = False) -> None:
        """Make the object; durable when this returns. EEXIST where it is there, unless it may be replaced."""
        self._check_mounted()
        with _told(key):
            mode: Any = "overwrite" if replace else "create"
            obstore.put(self._store, key, iter(buffers), mode=mode, use_multipart=False)
            if self._root is not None:
                self._persist(key)

    def _check_mounted(self) -> None:
        """Objects would be made beneath a mount point whose disk is gone. Raises EIO: it may come back."""
        if self._root is not None and self.owner and not os.path.exists(os.path.join(self._root, MARK)):
            raise OSError(errno.EIO, f"{self._root}: the mark of the volume is not there; is its disk mounted?")

    def _persist(self, key: str) -> None:
        """A local directory forgets in a power cut what was not synced: the file, and the names on its path."""
        path = os.path.join(cast(str, self._root), key)
        while True:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            if path == self._root:
                return
            path = os.path.dirname(path)

    def get(self, key: str, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes; ETIMEDOUT for less, which is worth another try."""
        try:
            with _told(key):
                data = memoryview(obstore.get_range(self._store, key, start=offset, length=length))
            if len(data) == length:
                return data
            error = OSError(errno.ETIMEDOUT, f"{len(data)} bytes came of {length}", key)
        except OSError as e:
            if e.errno != errno.ETIMEDOUT:
                raise
            error = e
        size = self.size(key)
        if size < offset + length:  # trying again would not help
            raise OSError(errno.EIO, f"the object has {size} bytes, {offset + length} are needed", key)
        raise error

    def get_all(self, key: str) -> bytes:
        with _told(key):
            return bytes(obstore.get(self._store, key).bytes())

    def size(self, key: str) -> int:
        with _told(key):
            return int(obstore.head(self._store, key)["size"])

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object whose key begins with this directory, in no order."""
        with _told(prefix):
            for page in obstore.list(self._store, prefix=prefix, chunk_size=1000):
                yield from ((item["path"], item["size"]) for item in page)

    def delete(self, key: str) -> None:
        """Gone afterwards, whether it was there or not."""
        try:
            with _told(key):
                obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def probe(self) -> None:
        """See that the store does what a volume rests on. Raises ObjectsError with what it does not."""
        key = f"probe/{secrets.token_hex(8)}"
        body = secrets.token_bytes(1000)
        try:
            self.put(key, [body])
            try:
                try:
                    self.put(key, [body])
                except FileExistsError:
                    pass
                else:
                    raise ObjectsError(
                        f"{self.url}: ignores create-only writes (If-None-Match), so it is not safe to use"
                    )
                if bytes(self.get(key, 10, 100)) != body[10:110]:
                    raise ObjectsError(f"{self.url}: does not honour range reads")
                if key not in {k for k, _ in self.list("probe")}:
                    raise ObjectsError(f"{self.url}: does not list what was just written")
            finally:
                self.delete(key)
            if key in {k for k, _ in self.list("probe")}:
                raise ObjectsError(f"{self.url}: does not delete")
        except OSError as e:
            raise ObjectsError(f"{self.url}: {explain(e)}") from e


def explain(error: OSError) -> str:
    """What to tell a person of a failed object call."""
    hints = {
        errno.EACCES: "access refused; check the credentials",
        errno.ENOENT: "no such bucket",
        errno.ENOSPC: "the store is full",
    }
    if "169.254.169.254" in str(error.strerror):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use --profile"
    hint = hints.get(error.errno or 0, "the store does not answer as it should")
    return f"{hint}: {error.strerror}"
