"""The one place that opens connections: GET from a hub, only when a person asked for it.

Connections are encrypted, but for those to this machine itself; a redirect cannot change that. The token goes to the
hub alone. Servers that say nothing, or next to nothing, are left. What is read is believed by nobody before its digest
is known to be right (``download.py``).
"""

from __future__ import annotations

import ipaddress
import json
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from qexport.errors import IntegrityError, QexportError, ResourceExhausted, UsageError
from qexport.exporter.hub.patience import LONGEST, asked_pause, words

STALL = 30.0
"""Seconds without a byte after which a server is left."""
SLOWEST = 1024
"""Bytes a second, over ``STALL`` seconds, below which it is left too."""
PAUSES = (1.0, 4.0)
"""Seconds before the second and the third try of what a server could not do, if it does not ask for more."""

_MOST_JSON = 32 << 20
_PIECE = 1 << 18
_OVERLOADED = 429
_AGAIN = "try again later: what has arrived is kept, and is not fetched again"
_NO_HUB = "set HF_ENDPOINT to the address of the hub, such as https://hub.example"


def address_of_list(repo: str, revision: str) -> str:
    """Where a hub tells the files of a model, with sizes and digests; below the endpoint, as all addresses are."""
    return f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"


def address_of_file(repo: str, commit: str, name: str) -> str:
    """Where a hub has a file."""
    return f"/{repo}/resolve/{commit}/{quote(name)}"


class CutError(Exception):
    """A connection has ended before its time."""


class Meter:
    """Raises ``ResourceExhausted`` where too little arrives, over all connections of one file."""

    def __init__(self) -> None:
        self._seconds, self._bytes = 0.0, 0

    def count(self, size: int, seconds: float, where: str) -> None:
        """Bytes have arrived, and were waited for."""
        self._bytes += size
        self._seconds += seconds
        if self._seconds > STALL:
            if self._bytes < SLOWEST * self._seconds:
                raise _stalled(f"it sends {self._bytes} bytes in {self._seconds:.0f} s", where)
            self._seconds, self._bytes = 0.0, 0


class Answer:
    """The body of an answer.

    Attributes:
        start: The place in the file where it begins.
    """

    def __init__(self, response: HTTPResponse, where: str, meter: Meter) -> None:
        self.start = _start(response)
        self._response, self._where, self._meter = response, where, meter
        self._left = response.length  # a server may leave the connection open behind it

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, none at its end.

        Raises:
            CutError: The connection is lost.
            ResourceExhausted: Nothing comes, or too little.
        """
        size = min(size, _PIECE) if self._left is None else min(size, _PIECE, self._left)
        began = time.monotonic()
        try:
            data = self._response.read1(size) if size else b""
        except TimeoutError as error:
            raise _stalled(f"nothing has come for {STALL:g} s", self._where) from error
        except (OSError, HTTPException) as error:
            raise CutError(str(error)) from error
        self._left = None if self._left is None else self._left - len(data)
        self._meter.count(len(data), time.monotonic() - began, self._where)
        return data

    def close(self) -> None:
        """Leave the rest."""
        with suppress(OSError):
            self._response.close()


class Hub:
    """A server with the interface of the Hugging Face hub.

    Args:
        endpoint: Its address: ``https://``, or ``http://`` on this machine.
        token: What it is told to know the person; nobody else is told.

    Raises:
        UsageError: That is no address.
    """

    def __init__(self, endpoint: str | None, token: str | None = None) -> None:
        if not endpoint:
            raise UsageError("no hub is known: HF_ENDPOINT is not set", hint=_NO_HUB)
        place = _allowed(endpoint)
        if place is None or place.query or place.fragment:
            raise UsageError("HF_ENDPOINT is no https:// address, or has more than a place in it", hint=_NO_HUB)
        self._endpoint, self._token, self._place = endpoint.rstrip("/"), token, place
        self._opener = OpenerDirector()  # one that knows no other schemes, such as file:
        proxies: dict[str, str] | None = {} if _is_here(place) else None
        for handler in (ProxyHandler(proxies), HTTPHandler(), HTTPSHandler(), HTTPErrorProcessor()):
            self._opener.add_handler(handler)
        self._opener.add_handler(HTTPDefaultErrorHandler())
        self._opener.add_handler(_Redirects(self))

    def json(self, address: str) -> Any:
        """A JSON document.

        Raises:
            QexportError: As of ``get``; ``IntegrityError`` where it is none.
        """
        answer, data = self.get(address), bytearray()
        try:
            while part := answer.read(_PIECE):
                data += part
                if len(data) > _MOST_JSON:
                    raise ResourceExhausted(f"the answer has more than {_MOST_JSON} bytes", where=address)
            return json.loads(data)
        except (CutError, ValueError, RecursionError) as error:
            raise IntegrityError("the hub's answer is damaged", where=address, hint=_NO_HUB) from error
        finally:
            answer.close()

    def get(self, address: str, start: int = 0, meter: Meter | None = None) -> Answer:
        """Ask for a document from a place on; what a server cannot do at the moment is tried three times.

        Args:
            address: Path below the endpoint, encoded.
            start: Where to begin; the answer says where it does.
            meter: What counts the bytes.

        Raises:
            UsageError: There is no such thing, or it is not for this person.
            ResourceExhausted: The server does not answer, or says that it cannot.
            IntegrityError: It leads where nobody should go, or is not who it says it is.
        """
        pauses = list(PAUSES)
        while True:
            try:
                return Answer(self._open(address, start), address, meter or Meter())
            except _AgainError as error:
                if not pauses or error.pause > LONGEST:
                    later = f", and wants to be left alone for {words(error.pause)}" if error.pause else ""
                    what = f"the hub cannot be asked: {error}{later}"
                    raise ResourceExhausted(what, where=address, hint=_AGAIN) from error
                time.sleep(max(pauses.pop(0), error.pause))

    def sign(self, request: Request) -> None:
        """Add the token where the request goes to the hub itself."""
        if self._token and _origin(urlsplit(request.full_url)) == _origin(self._place):
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")

    def _open(self, address: str, start: int) -> HTTPResponse:
        headers = {"User-Agent": "qexport", **({"Range": f"bytes={start}-"} if start else {})}
        try:
            request = Request(self._endpoint + address, headers=headers)
            self.sign(request)
            response: HTTPResponse = self._opener.open(request, timeout=STALL)
        except HTTPError as error:
            with error:
                raise _refused(error.code, address, asked_pause(error.headers) or 0.0) from error
        except (OSError, HTTPException, ValueError) as error:
            raise _failed(error, address) from error
        return response


class _AgainError(Exception):
    """What may work a moment later, or after the ``pause`` in seconds that the server has asked for."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


class _Redirects(HTTPRedirectHandler):
    """Follows where that is as safe as before, and looks before it asks anybody."""

    max_redirections = 5

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:  # its arguments are those of the library
        place = _allowed(newurl)
        if place is None or (urlsplit(req.full_url).scheme, place.scheme) == ("https", "http"):
            fp.close()
            shown = newurl.partition("?")[0][:200]  # what follows may be a secret
            raise _astray(f"the server leads to {shown!r}, which is not encrypted", req.selector)
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found is not None:
            self._hub.sign(found)
        return found


def _allowed(url: str) -> SplitResult | None:
    """The parts of an address that may be asked; ``None`` for others."""
    try:
        place = urlsplit(url)
        known = bool(place.hostname) and place.port != 0 and place.username is None
    except ValueError:
        return None
    return place if known and (place.scheme == "https" or (place.scheme == "http" and _is_here(place))) else None


def _is_here(place: SplitResult) -> bool:
    """Whether it is this machine."""
    host = place.hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _origin(place: SplitResult) -> tuple[str, str | None, int]:
    return place.scheme, place.hostname, place.port or (443 if place.scheme == "https" else 80)


def _start(response: HTTPResponse) -> int:
    """Where in the file an answer begins; -1 where that is not said as it should be."""
    if response.status != 206:
        return 0
    first = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isascii() and first.isdecimal() else -1


def _refused(code: int, where: str, pause: float) -> Exception:
    """What an answer of 300 and more means."""
    if code == _OVERLOADED or code >= 500:
        return _AgainError(f"it answers {code}", pause)
    if code < 400:
        return _astray("the server leads in a circle, or to what is no https:// address", where)
    told: Mapping[int, tuple[str, str]] = {
        401: ("the hub does not say whether there is such a model", "check the name, or set HF_TOKEN"),
        403: ("the hub does not give this to you", "ask for access to the model, and set HF_TOKEN"),
        404: ("no such model, revision or file", "write it as OWNER/NAME or OWNER/NAME@REVISION"),
        416: ("the file ends before the place that was asked for", "fetch again"),
    }
    what, hint = told.get(code, (f"the hub refuses: {code}", "check the name, and HF_ENDPOINT"))
    return CutError(what) if code == 416 else UsageError(what, where=where, hint=hint)


def _failed(error: Exception, where: str) -> Exception:
    """What it means that there is no answer."""
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, TimeoutError):
        return _stalled(f"no answer for {STALL:g} s", where)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _astray(f"the server is not who it says it is: {cause}", where)
    if isinstance(cause, ValueError) and not isinstance(cause, OSError):
        return _astray(f"the server leads to no address: {cause}", where)
    return _AgainError(str(cause) or type(cause).__name__)


def _stalled(what: str, where: str) -> QexportError:
    return ResourceExhausted(f"the server is too slow: {what}", where=where, hint=_AGAIN)


def _astray(what: str, where: str) -> QexportError:
    return IntegrityError(what, where=where, hint="check HF_ENDPOINT, and who stands between you and the hub")
