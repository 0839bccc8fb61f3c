"""What is asked of running servers: vLLM's OpenAI API with token-id prompts, and LMCache's HTTP API."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from lmcache_rag.credentials import API_KEY_REMEDY, INGEST_KEY_REMEDY, LMCACHE_KEY_REMEDY, lmcache_headers
from lmcache_rag.errors import EngineError, EngineUnavailableError
from lmcache_rag.protocol import INGEST_KEY_HEADER, answer_statistics, ingests

SHORT_S = 3.0
TOP = 5  # log-probabilities asked for with each token


@dataclass(frozen=True)
class Served:
    """What a vLLM server serves.

    Attributes:
        name: Name for requests.
        root: Folder or Hugging Face name that it was loaded from.
        most_tokens: Longest prompt and answer together; 0 where it does not say.
    """

    name: str
    root: str
    most_tokens: int


@dataclass(frozen=True)
class Answer:
    """A completion.

    Attributes:
        tokens: Ids of the answer.
        top: For each of them the most likely ids and their log-probabilities.
        statistics: What our connector did; None without it.
    """

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...] = ()
    statistics: dict[str, Any] | None = field(default=None)


def get_json(url: str, path: str) -> dict[str, Any] | None:
    """A JSON document from an LMCache server; None when it does not answer as it should.

    Raises:
        EngineError: It asks for a key.
    """
    try:
        response = httpx.get(
            url + path,
            timeout=SHORT_S,
            verify=False,  # noqa: S501
            trust_env=False,
            headers=lmcache_headers(url),
        )
        if response.status_code in (401, 403):
            raise EngineError(f"{url}{path} asks for a key.", remedy=LMCACHE_KEY_REMEDY)
        document = response.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return document if isinstance(document, dict) else None


def get_text(url: str, path: str) -> str:
    """A page of an LMCache server; "" when it does not answer as it should."""
    headers = lmcache_headers(url)
    try:
        response = httpx.get(url + path, timeout=SHORT_S, verify=False, trust_env=False, headers=headers)  # noqa: S501
        return response.raise_for_status().text
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""


def answers(url: str, path: str) -> bool:
    """Whether a server answers this path with 200."""
    try:
        # Certificates are not checked: only "it is up" is asked here, of a server beside us.
        return httpx.get(url + path, timeout=SHORT_S, verify=False, trust_env=False).status_code == 200  # noqa: S501
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


class VLLM:
    """A vLLM server. Use it as a context manager.

    Args:
        url: Its address, with or without /v1.
        api_key: Its key, or "".
        ingest_key: Its ingest key, or ""; sent with ingestions only.
        timeout: Longest wait for an answer, in seconds.
        verify: Whether to check its certificate.
    """

    def __init__(
        self, url: str, api_key: str = "", *, ingest_key: str = "", timeout: float = 120.0, verify: bool = True
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._ingest_headers = {INGEST_KEY_HEADER: ingest_key} if ingest_key else {}
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, verify=verify)

    def __enter__(self) -> VLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def healthy(self) -> bool:
        """Whether it answers /health."""
        try:
            return self._client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def version(self) -> str:
        """Its version, "" where it does not say."""
        try:
            return str(self._call("GET", "/version").get("version", ""))
        except EngineError:
            return ""

    def metrics(self) -> str:
        """Its Prometheus page, "" where there is none."""
        try:
            return self._client.get("/metrics").raise_for_status().text
        except httpx.HTTPError:
            return ""

    def served(self) -> Served:
        """The model that it serves."""
        models = self._call("GET", "/v1/models").get("data")
        if not models:
            raise EngineError("The server lists no model.", remedy="Is it vLLM's OpenAI server?")
        first = models[0]
        return Served(str(first["id"]), str(first.get("root") or first["id"]), int(first.get("max_model_len") or 0))

    def complete(self, model: str, prompt: list[int], *, most: int = 1, params: dict[str, Any]) -> Answer:
        """Greedy completion of a prompt of token ids, with these kv_transfer_params."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": most,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": TOP,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "kv_transfer_params": params,
        }
        document = self._call("POST", "/v1/completions", body, ingest=ingests(params))
        try:
            choice = document["choices"][0]
            top = (choice.get("logprobs") or {}).get("top_logprobs") or ()
            return Answer(
                tuple(choice["token_ids"]),
                tuple({int(name.rpartition(":")[2]): value for name, value in row.items()} for row in top if row),
                answer_statistics(document),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as problem:
            raise EngineError(
                f"The server's answer is not vLLM's: {type(problem).__name__}: {problem}.",
                remedy="vLLM 0.25.1 or newer is needed.",
            ) from problem

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, ingest: bool = False
    ) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body, headers=self._ingest_headers if ingest else None)
        except (httpx.HTTPError, httpx.InvalidURL) as problem:
            words = str(problem) or type(problem).__name__
            raise EngineUnavailableError(
                f"{self.url} does not answer: {words}.", remedy="Is the server up, and the address right?"
            ) from problem
        if response.status_code == 401 or (ingest and response.status_code == 403):
            remedy = f"{API_KEY_REMEDY} An ingest key goes elsewhere. {INGEST_KEY_REMEDY}" if ingest else API_KEY_REMEDY
            raise EngineError(f"{self.url} asks for a key.", remedy=remedy)
        if response.status_code >= 400:
            raise EngineError(
                f"{self.url}{path} answers {response.status_code}: {' '.join(response.text.split())[:300]}.",
                remedy="Its log may say more.",
            )
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise EngineError(f"{self.url}{path} does not answer in JSON.", remedy="Is it vLLM's OpenAI server?")
        return document
