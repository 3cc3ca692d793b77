"""HTTP beneath the official client: aiohttp, which takes half of the processor time of the client's own transport.

Refuses an answer longer than a limit while it streams in, and one that is compressed, which could grow without end.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    import aiohttp
    import httpx2
    from openai import AsyncOpenAI

__all__ = ["Proxy", "Refused", "connect", "find_proxy", "is_azure", "is_openai"]

_KEPT = (b"retry-after", b"x-ratelimit")


class Refused(Exception):
    """An answer that is not read to its end; `problem` is too_large or encoded, the message says more."""

    def __init__(self, problem: str, status: int, message: str) -> None:
        super().__init__(message)
        self.problem, self.status = problem, status


@dataclass(frozen=True, slots=True)
class Proxy:
    """What stands between: its address without user and password, and these as a header; shown without them."""

    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """The password, as it is, as it stands in the address, and as it is sent."""


class BoundedTransport:
    """An asynchronous transport of httpx2 that holds at most `most_bytes` of an answer. Lives in one event loop."""

    def __init__(self, proxy: Proxy | None, most_bytes: int) -> None:
        self._proxy, self._most_bytes = proxy, most_bytes
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The whole response. Raises Refused, and what aiohttp raises."""
        import httpx2
        from yarl import URL

        headers = [(name.decode(), value.decode()) for name, value in request.headers.raw]
        password = self._proxy.headers if self._proxy else {}
        is_tunnel = request.url.scheme == "https"
        async with self._open().request(
            request.method,
            URL(str(request.url), encoded=True),
            # Through a tunnel the server would read what is meant for the proxy.
            headers=headers if is_tunnel else [*headers, *password.items()],
            data=await request.aread() or None,
            allow_redirects=False,
            proxy=self._proxy.url if self._proxy else None,
            proxy_headers=password if is_tunnel else None,
        ) as response:
            content = await self._read(response)
        # The client would act on others: decode by what they say, keep cookies, follow.
        told = [(name, value) for name, value in response.raw_headers if name.lower().startswith(_KEPT)]
        return httpx2.Response(response.status, headers=told, content=content)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if coding != "identity":
            raise Refused("encoded", response.status, f"the answer is compressed ({coding[:20]}), unasked")
        parts, size = [], 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._most_bytes:
                raise Refused("too_large", response.status, f"the answer is longer than {self._most_bytes:,} bytes")
            parts.append(part)
        return b"".join(parts)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            import aiohttp

            # Whoever sends decides how many requests are open and how long one may take.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                auto_decompress=False,
            )
        return self._session

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> BoundedTransport:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


def connect(base_url: str, key: str | None, *, timeout_s: float, most_bytes: int | None) -> AsyncOpenAI:
    """The official client without retries. `most_bytes` None: answers are streamed by the client's own transport.

    Its `key` goes to `base_url` only; no other key or name is taken from the environment for a server that is not
    OpenAI's.
    """
    import httpx2
    from openai import AsyncOpenAI, Omit

    client = None
    if most_bytes is not None:
        transport = cast(httpx2.AsyncBaseTransport, BoundedTransport(find_proxy(base_url), most_bytes))
        client = httpx2.AsyncClient(transport=transport, trust_env=False, timeout=timeout_s)
    headers: dict[str, str | Omit] = {"Accept-Encoding": "identity"}
    if not is_openai(base_url):
        headers |= {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
    return AsyncOpenAI(
        api_key=key or "none",  # else the client would look for one in the environment
        base_url=base_url,
        timeout=timeout_s,
        max_retries=0,
        default_headers=cast("dict[str, str]", headers),
        http_client=client,
    )


def is_openai(base_url: str) -> bool:
    """Whether OpenAI's own servers, or Azure's of the same models, are there."""
    return _is_of(base_url, "openai.com") or is_azure(base_url)


def is_azure(base_url: str) -> bool:
    """Whether an Azure service is there, which calls models by names of its user's."""
    return _is_of(base_url, "azure.com")


def find_proxy(base_url: str) -> Proxy | None:
    """The proxy that the environment names for an address; None where it names none."""
    parts = urlsplit(base_url)
    proxies = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    if not named or proxy_bypass(parts.netloc):
        return None
    place = urlsplit(named if "://" in named else f"http://{named}")
    secret, has_secret, host = place.netloc.rpartition("@")
    url = urlunsplit((place.scheme, host, place.path, "", ""))
    if not has_secret:
        return Proxy(url)
    user, _, password = secret.partition(":")
    pair = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode("ascii")
    # The longest first: what is blacked out of one must not leave the rest of another.
    shown = sorted({pair, password, unquote(password)} - {""}, key=len, reverse=True)
    return Proxy(url, {"Proxy-Authorization": f"Basic {pair}"}, tuple(shown))


def _is_of(base_url: str, domain: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    return host == domain or host.endswith("." + domain)
