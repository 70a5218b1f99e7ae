"""The state that Gradio keeps for each page, dropped some time after the page was closed."""

from __future__ import annotations

import datetime
from typing import Any

from gradio.state_holder import SessionState, StateHolder

CLOSED_SECONDS = 3600.0
"""How long the state of a closed page is kept, in case its browser only lost the network."""
MAX_SESSIONS = 1000
"""Pages whose state is kept; the least recently used are dropped."""


class Sessions(StateHolder):
    """Gradio's ``StateHolder`` never drops the session of a closed page: it keeps 10,000, each with a copy of the whole
    page's configuration (0.7 MB here)."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.set_blocks(blocks)
        self.capacity = MAX_SESSIONS

    @classmethod
    def attach(cls, site: Any, blocks: Any) -> None:
        """Use this holder in Gradio's app ``site``."""
        site.state_holder = cls(blocks)

    def __getitem__(self, session_id: str) -> SessionState:
        new = session_id not in self.session_data
        state = super().__getitem__(session_id)
        if new:
            state.config_values.clear()  # for deep links, which are off; filled again as components change
        return state

    def delete_all_expired_state(self) -> None:
        """Called by Gradio every second."""
        super().delete_all_expired_state()
        now = datetime.datetime.now()
        for name, state in list(self.session_data.items()):
            if state.is_closed and (now - self.time_last_used.get(name, now)).total_seconds() > CLOSED_SECONDS:
                self._drop(name)

    def update(self, session_id: str) -> None:
        """Mark a session as used. Called by Gradio for every event."""
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
                self.session_data[session_id].is_closed = False  # the browser is back
        while len(self.session_data) > self.capacity:
            self._drop(next(iter(self.session_data)))

    def _drop(self, name: str) -> None:
        """Drop a session with its unread events."""
        with self.lock:
            self.session_data.pop(name, None)
            self.time_last_used.pop(name, None)
        queue = self.blocks._queue
        if not queue.event_ids_to_events.keys() & queue.pending_event_ids_session.get(name, set()):  # none is running
            queue.pending_event_ids_session.pop(name, None)
            queue.pending_messages_per_session.pop(name, None)
