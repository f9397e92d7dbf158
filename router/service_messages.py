"""Requests of the public API in the words of ``baton.request``: the way in. The way out is ``service_events.py``.

Written once for router, client and fake: see ``baton/request_proto.py``.
"""

from __future__ import annotations

from baton.request_proto import chat_from_proto, request_from_proto, resume_from_proto

__all__ = ["chat_from_proto", "request_from_proto", "resume_from_proto"]
