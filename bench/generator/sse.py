"""Server-sent events out of pieces of a response, however the network cut them. Pure.

After https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end with LF, CRLF or CR, an empty line
ends an event, several ``data`` lines are one, lines that begin with a colon are comments. One thing is kinder than
the standard: what a server leaves without its last empty line is an event, too.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 4 * 2**20


class EventTooLong(ValueError):
    """An event without an end: this is no event stream, or a broken one."""


class EventStream:
    """Feed it bytes; it gives the data of each event that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises ``EventTooLong`` rather than keep more than ``MAX_EVENT_BYTES``."""
        text = self._rest + piece if self._rest else piece
        if b"\r" in text:
            held = b"\r" if text.endswith(b"\r") else b""  # its LF may be in the next piece
            text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            held = b""
        *lines, rest = text.split(b"\n")
        self._rest = rest + held
        events = self._events(lines)
        if len(self._rest) > MAX_EVENT_BYTES or sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def end(self) -> list[bytes]:
        """What is left when the response has ended."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return self._events([rest, b""])

    def _events(self, lines: list[bytes]) -> list[bytes]:
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if not line:
                if data:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data.clear()
            elif line.startswith(b"data:"):
                data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        return events
