"""Requests to an OpenAI-compatible server over HTTP, and their errors in one line."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import httpx

from reference.training.errors import UserError

CONNECT_S = 10  # the time for a connection
RETRY_S = 10  # a server may be out of reach for so long before the run ends
BACK_OFF_S = 0.5  # the wait before the second attempt; it doubles with each further one
REQUESTS_AT_ONCE = 64
TRANSIENT = {429, 502, 503, 504}  # a proxy or a server that is busy or starts
IDLE_S = 1  # an idle connection is dropped before the server drops it, which would be a failure


class ServerError(UserError):
    """A request failed; `status` is that of the answer, or None if there was none."""

    status: int | None = None


class Server:
    """A server, and the time that it has for an answer.

    Attributes:
        url: without the /v1 of the paths.
        timeout: seconds for a request, its retries included.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise UserError(f"--sampler {url}: {error}") from None
        if parsed.userinfo or parsed.query or not parsed.host:  # secrets would be logged
            raise UserError(
                "--sampler must be a URL like http://HOST:PORT without a user, password or query; "
                "an API key is read from $VLLM_API_KEY"
            )
        key = os.environ.get("VLLM_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("$VLLM_API_KEY must be one line of ASCII")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=REQUESTS_AT_ONCE, keepalive_expiry=IDLE_S),
        )
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._is_aborted = False

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path."""
        return self._json(path, self.request("GET", path))

    def post(
        self, path: str, body: dict[str, Any], deadline: float | None = None
    ) -> dict[str, Any]:
        """Post JSON and return the JSON object that is the answer."""
        return self._json(path, self.request("POST", path, body, deadline))

    def has_route(self, path: str) -> bool:
        """Return whether the server has a path: there, vLLM complains of a body without fields."""
        try:
            self.request("POST", path, {})
        except ServerError as error:
            if error.status is None or error.status in TRANSIENT:
                raise
            return error.status in (400, 422)
        return False  # some servers answer so to every path

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        deadline: float | None = None,
    ) -> httpx.Response:
        """Return an answer without an error, and retry while the server is out of reach or busy.

        Args:
            deadline: by time.monotonic(). None: in `timeout` seconds.

        Raises:
            ServerError: the reason, and the first failure if it was another one.
        """
        started, wait, failures = time.monotonic(), BACK_OFF_S, []
        deadline = started + self.timeout if deadline is None else deadline
        give_up = min(deadline, started + RETRY_S)
        while True:
            status = None
            remaining = max(deadline - time.monotonic(), 0.001)
            timeout = httpx.Timeout(remaining, connect=min(CONNECT_S, remaining))
            try:
                response = self._client.request(
                    method, path, json=body, timeout=timeout, extensions={"trace": self._trace}
                )
            except httpx.RequestError as error:
                if self._is_aborted:
                    failures.append("was not waited for")
                    break
                if isinstance(error, httpx.TimeoutException) and time.monotonic() >= deadline:
                    failures.append(f"did not answer within {self.timeout:g} s")
                    break
                failures.append(f"is out of reach: {error or type(error).__name__}")
            else:
                status = response.status_code
                if status < 300:
                    return response
                failures.append(f"answered {status}: {_reason(response)}")
                if status not in TRANSIENT:
                    break
            if time.monotonic() + wait > give_up:
                break
            time.sleep(wait)
            wait *= 2
        told = ", then ".join(dict.fromkeys((failures[0], failures[-1])))
        if status == 401:
            told += " (set $VLLM_API_KEY to the --api-key of the server)"
        error = ServerError(f"{self.url}{path} {told}")
        error.status = status
        raise error

    def abort(self) -> None:
        """Let requests fail that other threads wait for, and all later ones."""
        self._is_aborted = True
        for connection in list(self._sockets):
            with suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._client.close()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember each connection that is made."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.add(info["return_value"].get_extra_info("socket"))
            if self._is_aborted:
                self.abort()

    def _json(self, path: str, response: httpx.Response) -> dict[str, Any]:
        content = None
        with suppress(ValueError, RecursionError):
            content = response.json()
        if not isinstance(content, dict):
            raise UserError(f"{self.url}{path} did not answer with a JSON object")
        return content


def _reason(response: httpx.Response) -> str:
    """Return the message of an answer that is an error, on one line."""
    text = response.text
    with suppress(ValueError, RecursionError, AttributeError, TypeError, LookupError):
        content = response.json()
        content = content.get("error", content)
        text = str(content if isinstance(content, str) else content["message"])
    if text.lstrip().startswith("<"):  # a page of HTML
        text = ""
    return " ".join(text.split())[:300] or response.reason_phrase
