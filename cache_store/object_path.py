"""Caches in an object store: ``s3://bucket/prefix``, by the part of pathlib's interface that the store uses.

Credentials, region and endpoint come from the usual variables: ``AWS_ACCESS_KEY_ID``, ``AWS_REGION``,
``AWS_ENDPOINT_URL`` and so on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from cache_store.contract import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import RetryConfig, S3Store

SCHEME = "s3://"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_RETRY: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


class ObjectStat(NamedTuple):
    """Size in bytes, and when it was written, in seconds since 1970."""

    st_size: int
    st_mtime: float


class ObjectPath:
    """An object, or the prefix that some objects share, which is all that a folder is here.

    Args:
        bucket: ``s3://bucket``.
        key: The key of the object without a leading slash.
    """

    def __init__(self, bucket: str, key: PurePosixPath) -> None:
        self._bucket = bucket
        self._key = key

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self._bucket, self._key / name)

    def __str__(self) -> str:
        return self._bucket if self._key == PurePosixPath() else f"{self._bucket}/{self._key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self._key.name

    @property
    def stem(self) -> str:
        """The last part of the key without its suffix."""
        return self._key.stem

    @property
    def suffix(self) -> str:
        """What the key has from its last dot on."""
        return self._key.suffix

    @property
    def parent(self) -> ObjectPath:
        """The prefix above."""
        return ObjectPath(self._bucket, self._key.parent)

    def resolve(self) -> ObjectPath:
        """Return itself: there are no links."""
        return self

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a prefix is there when an object has it."""

    def is_dir(self) -> bool:
        """Tell whether any object lies below."""
        with self._errors():
            return any(self._store.list(self._prefix, chunk_size=1))

    def exists(self) -> bool:
        """Tell whether this is an object, or some lie below."""
        try:
            self.stat()
        except FileNotFoundError:
            return self.is_dir()
        return True

    def stat(self) -> ObjectStat:
        """Return size and time of an object.

        Raises:
            FileNotFoundError: There is none.
        """
        with self._errors():
            found = self._store.head(str(self._key))
        return ObjectStat(found["size"], found["last_modified"].timestamp())

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield the objects and prefixes right below."""
        with self._errors():
            found = self._store.list_with_delimiter(self._prefix)
        for key in (*found["common_prefixes"], *(entry["path"] for entry in found["objects"])):
            yield ObjectPath(self._bucket, PurePosixPath(key))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the objects and prefixes right below whose names fit a pattern."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def rglob(self, name: str) -> Iterator[ObjectPath]:
        """Yield all objects of this name below."""
        return (self / key for key in self.sizes() if PurePosixPath(key).name == name)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of all objects below, by relative key."""
        with self._errors():
            return {
                str(PurePosixPath(entry["path"]).relative_to(self._key)): entry["size"]
                for entries in self._store.list(self._prefix)
                for entry in entries
            }

    def read_bytes(self) -> bytes:
        """Return an object.

        Raises:
            FileNotFoundError: There is none.
        """
        with self._errors():
            return bytes(self._store.get(str(self._key)).bytes())

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BytesIO:  # noqa: ARG002
        """Return an object as a file to read from; all of it is in memory."""
        return io.BytesIO(self.read_bytes())

    def read_range(self, offset: int, num_bytes: int) -> memoryview:
        """Return a part of an object; less if it ends before."""
        with self._errors():
            return memoryview(self._store.get_range(str(self._key), start=offset, length=num_bytes))

    def download(self, path: Path) -> None:
        """Write an object to a new file, whose folder is created."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(), path.open("xb") as file:
            for block in self._store.get(str(self._key)).stream():
                file.write(block)

    def put(self, data: bytes | Path, *, create: bool = False) -> None:
        """Write an object, which is there whole or not at all.

        Args:
            data: Its bytes, or the file that holds them.
            create: Only if there is none, or one of the same bytes: of a request that is made again, since its answer
                was lost, the first may have been heard.

        Raises:
            FileExistsError: There is another one.
        """
        # a condition binds one request, not the parts of several
        options: dict[str, Any] = {"mode": "create", "use_multipart": False} if create else {}
        try:
            with self._errors():
                self._store.put(str(self._key), data, **options)
        except FileExistsError:
            if self.read_bytes() != (data if isinstance(data, bytes) else data.read_bytes()):
                raise

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete an object."""
        if not missing_ok:
            self.stat()
        with self._errors():
            self._store.delete(str(self._key))

    @property
    def _prefix(self) -> str | None:
        return None if self._key == PurePosixPath() else str(self._key)

    @property
    def _store(self) -> S3Store:
        if _first_process() != os.getpid():
            raise CacheError(f"{self}: obstore does not survive a fork; start the processes that read by spawn")
        return _connect(self._bucket)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what pathlib would where there is such an error, else CacheError."""
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(f"{self}: no such object") from None
        except AlreadyExistsError:
            raise FileExistsError(f"{self} is there already") from None
        except BaseError as error:
            reason = " ".join(str(error).partition("<?xml")[0].partition("\n")[0].split())
            raise CacheError(
                f"{self}: {reason.rstrip(': ')}; check the bucket and the AWS_* variables, then run again"
            ) from error


Root: TypeAlias = Path | ObjectPath
"""Where a cache lies."""


def root_of(location: str) -> Root:
    """Return the path of a cache by what a user calls it: a folder, or ``s3://bucket/prefix``."""
    if not location.startswith(SCHEME):
        return Path(location)
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise CacheError(f"{location} names no bucket; write s3://bucket/prefix")
    if importlib.util.find_spec("obstore") is None:
        raise CacheError(f"{location}: the extra s3 is not installed; pip install 'diffsynth-pipe[s3]'")
    return ObjectPath(SCHEME + bucket, PurePosixPath(key))


@functools.cache
def _first_process() -> int:
    """Return the process that used obstore first: a forked one lacks the threads that answer, and would hang."""
    return os.getpid()


@functools.cache
def _connect(bucket: str) -> S3Store:
    from obstore.store import S3Store

    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    # whoever names an endpoint by http:// has chosen http
    options: dict[str, Any] = {"client_options": {"allow_http": True}} if endpoint.startswith("http://") else {}
    return S3Store.from_url(bucket, retry_config=_RETRY, **options)
