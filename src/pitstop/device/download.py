"""Where a repository is read from, and how a blob comes out of it: over any number of cuts, no byte too many."""

import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname

import urllib3
from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient import FetcherInterface

from pitstop import __version__
from pitstop.bundle.manifest import Artifact
from pitstop.device.incoming import Incoming
from pitstop.errors import BrokenInput, Untrusted, UsageError, WrongPiece
from pitstop.files import CHUNK

BASE = "repository:/"  # stands for the repository in the addresses python-tuf makes
TIMEOUT = urllib3.Timeout(connect=15, read=30)  # seconds without a byte
RETRIES = 4  # in a row that bring nothing new
PAUSE = 0.5  # seconds before the first retry; doubled for each in a row
_TEMPORARY = frozenset({408, 416, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Answer:
    """A file, or the rest of it."""

    start: int  # offset of the first byte
    total: int | None  # bytes of the whole file, if the source says so
    chunks: Iterator[bytes]


class Source(FetcherInterface, ABC):
    """A place that holds a repository."""

    where: str  # for people

    @abstractmethod
    def read(self, path: str, start: int = 0) -> Answer:
        """Read a file of the repository, from an offset if the source can.

        Raises:
            DownloadHTTPError: there is no such file, or the server refused.
            DownloadError: it cannot be reached; from the chunks as well.
        """

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self.read(url.removeprefix(BASE)).chunks


class Web(Source):
    """A repository on any static web server."""

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        parts = urlsplit(url)
        proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
        self._pool = urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()

    def read(self, path: str, start: int = 0) -> Answer:
        # A body the server compressed could not be resumed, nor its length compared.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"pitstop/{__version__}"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            response = self._pool.request(
                "GET",
                f"{self.where}/{path}",
                headers=headers,
                preload_content=False,
                timeout=TIMEOUT,
                retries=urllib3.Retry(5, connect=0, read=0, status=0, other=0),  # redirects only
            )
        except urllib3.exceptions.HTTPError as error:
            raise DownloadError(_reason(error)) from error
        try:
            first, total = _extent(response)
        except DownloadError:
            response.close()
            raise
        return Answer(first, total, _body(response))


class Folder(Source):
    """A repository in a folder: a disk, a stick."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder

    def read(self, path: str, start: int = 0) -> Answer:
        try:
            # Not to wait for a writer, should there be a pipe where a file belongs.
            descriptor = os.open(self._folder / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DownloadHTTPError(f"there is no {path}", 404) from error
        except OSError as error:
            raise DownloadError(f"{path}: {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise DownloadError(f"{path} is not a file")
        return Answer(start, status.st_size, _content(descriptor, start))


def open_source(url: str) -> Source:
    """Return the source an address means: http, https, file, or the path of a folder.

    Raises:
        UsageError: it is none of these, or the folder does not exist.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        return Web(url)
    if parts.scheme not in ("", "file"):
        raise UsageError("this is no address of a repository", where=url, cure="name an http(s) address or a folder")
    folder = Path(url2pathname(parts.path) if parts.scheme else url)
    if not folder.is_dir():
        raise UsageError("there is no such repository folder", where=folder, cure="name an http(s) address or a folder")
    return Folder(folder)


def fetch_blob(source: Source, artifact: Artifact, incoming: Incoming, on_bytes: Callable[[int], None]) -> None:
    """Bring a blob into the store, from where it stopped before; a piece that came wrong is fetched once more.

    Raises:
        Untrusted: the repository serves other bytes than those signed for.
        BrokenInput: the repository lacks the blob.
        UsageError: the repository cannot be reached; what came is kept.
        StorageError: the disk refused; what came is kept.
    """
    wrong_at = None
    while incoming.size < artifact.size:
        try:
            _fill(source, artifact, incoming, on_bytes)
        except WrongPiece:
            # Some of it may be what an earlier run left, and have lost bytes in a power cut.
            if incoming.size == wrong_at:
                raise
            wrong_at = incoming.size
    incoming.finish()


def unreachable(source: Source, error: Exception) -> UsageError:
    """Return the error that says a repository cannot be read."""
    return UsageError(
        f"the repository cannot be read: {error}",
        where=source.where,
        cure="check the address and the network, and run it again: what was fetched is kept",
    )


def _fill(source: Source, artifact: Artifact, incoming: Incoming, on_bytes: Callable[[int], None]) -> None:
    """Receive until the blob has its size, with new attempts as long as they bring something."""
    most, failures = incoming.size, 0
    while incoming.size < artifact.size:
        error = _attempt(source, artifact, incoming, on_bytes)
        failures = 0 if incoming.size > most else failures + 1
        most = max(most, incoming.size)
        if failures > RETRIES:
            raise unreachable(source, error or DownloadError(f"{artifact.name} stays incomplete"))
        if incoming.size < artifact.size:
            time.sleep(PAUSE * 2**failures)


def _attempt(
    source: Source, artifact: Artifact, incoming: Incoming, on_bytes: Callable[[int], None]
) -> DownloadError | None:
    """Receive what one answer brings; return what ended it early and may pass."""
    try:
        answer = source.read(f"blobs/sha256/{artifact.sha256}", incoming.size)
        if answer.total not in (None, artifact.size):
            raise Untrusted(
                f"{artifact.name}: the repository has {answer.total} bytes, {artifact.size} were signed for",
                where=source.where,
            )
        if answer.start != incoming.size:
            incoming.restart()
        if answer.start != incoming.size:
            raise DownloadError("the server answered with another part than asked for")
        for chunk in answer.chunks:
            on_bytes(len(chunk))
            incoming.append(chunk)
    except DownloadHTTPError as error:
        if error.status_code not in _TEMPORARY:
            raise BrokenInput(
                f"the repository does not hand out {artifact.name}: {error}",
                where=f"{source.where}/blobs/sha256/{artifact.sha256}",
                cure="the publisher has to copy the whole repository folder to this address, blobs first",
            ) from error
        if error.status_code == 416:
            incoming.restart()
        return error
    except DownloadError as error:
        return error
    return None


def _extent(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None]:
    """Return first byte and total length of what a server sends."""
    if response.status >= 400:
        raise DownloadHTTPError(f"the server answered {response.status}", response.status)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError("the server compresses files: switch Content-Encoding off for the repository")
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    part = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != 206 or part is None:
        raise DownloadError(f"the server answered {response.status} to a request for a file")
    return int(part[1]), None if part[2] == "*" else int(part[2])


def _body(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK, decode_content=False):
            yield chunk
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise DownloadError(_reason(error)) from error
    finally:
        response.close()


def _content(descriptor: int, start: int) -> Iterator[bytes]:
    try:
        while chunk := os.pread(descriptor, CHUNK, start):
            yield chunk
            start += len(chunk)
    except OSError as error:
        raise DownloadError(str(error.strerror)) from error
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """Return what went wrong without the objects urllib3 names before it."""
    cause = getattr(error, "reason", None) or error
    text = str(cause)
    return text.partition("): ")[2] or text
