"""A minimal proxy for stock vLLM prefill/decode over HTTP: what a user of the stock connector would write.

    python -m bench.stock_proxy --port 8100 --prefill http://127.0.0.1:8200 --decode http://127.0.0.1:8300

Two stages, as in vLLM's own examples: the request goes to the prefill server with ``max_tokens=1`` and
``do_remote_decode``; the ``kv_transfer_params`` it answers go to the decode server with the original request,
whose stream is passed on untouched. A measuring aid, not a product: loopback, one pair of servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp import web

PREFILL_PARAMS: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class StockProxy:
    """Serves ``/v1/completions`` and ``/health``. Owns one client session, closed by ``close``."""

    def __init__(self, prefill_url: str, decode_url: str, *, timeout_s: float = 300.0) -> None:
        self._prefill_url = prefill_url.rstrip("/")
        self._decode_url = decode_url.rstrip("/")
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s), connector=aiohttp.TCPConnector(limit=0)
        )

    def application(self) -> web.Application:
        application = web.Application(client_max_size=8 * 2**20)
        application.router.add_get("/health", self._health)
        application.router.add_post("/v1/completions", self._completions)
        application.on_cleanup.append(self._on_cleanup)
        return application

    async def close(self) -> None:
        await self._session.close()

    async def _on_cleanup(self, _: web.Application) -> None:
        await self.close()

    async def _health(self, _: web.Request) -> web.Response:
        for url in (self._prefill_url, self._decode_url):
            try:
                async with self._session.get(f"{url}/health") as answer:
                    if answer.status != 200:
                        return web.Response(status=503, text=f"{url} is not ready\n")
            except aiohttp.ClientError:
                return web.Response(status=503, text=f"{url} is not reachable\n")
        return web.Response(text="ok\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not isinstance(body, dict):
            return web.json_response({"error": "the body must be a JSON object"}, status=400)
        headers = {"X-Request-Id": uuid.uuid4().hex}
        prefill_body = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": PREFILL_PARAMS}
        prefill_body.pop("stream_options", None)
        try:
            async with self._session.post(
                f"{self._prefill_url}/v1/completions", json=prefill_body, headers=headers
            ) as answer:
                text = await answer.text()
                if answer.status != 200:
                    return web.Response(status=answer.status, text=text, content_type="application/json")
            params = json.loads(text).get("kv_transfer_params")
            if not params:
                return web.json_response({"error": "the prefill server gave no kv_transfer_params"}, status=502)
            return await self._relay(request, {**body, "kv_transfer_params": params}, headers)
        except aiohttp.ClientError as error:
            return web.json_response({"error": f"a server is not reachable: {type(error).__name__}"}, status=502)

    async def _relay(self, request: web.Request, body: dict[str, Any], headers: dict[str, str]) -> web.StreamResponse:
        async with self._session.post(f"{self._decode_url}/v1/completions", json=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stock_proxy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, help="URL of the prefill server")
    parser.add_argument("--decode", required=True, help="URL of the decode server")
    parsed = parser.parse_args(arguments)

    async def application() -> web.Application:
        return StockProxy(parsed.prefill, parsed.decode).application()

    web.run_app(application(), host="127.0.0.1", port=parsed.port, access_log=None, loop=asyncio.new_event_loop())
    return 0


if __name__ == "__main__":
    sys.exit(main())
