"""Waiting for the events of a ticket without a thread, and for a client that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack

from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool

from ..request import Request
from ..tickets import Cancelled, Event, Picture, Ticket, pictures_of
from .state import State
from .telemetry.watching import Watcher

SILENCE_SECONDS = 15.0
"""Proxies and clients take a stream that is silent for longer, often for a minute, for a broken one."""


async def submitted(state: State, request: Request, http: HttpRequest) -> Ticket:
    """Queue a request. It is cancelled when the answer ends, however that comes about."""
    http.scope["state"]["request"] = request
    ticket = await run_in_threadpool(state.submit, request)
    ticket.watch(Watcher(ticket, state.metrics, state.tracing, http.scope["state"]["span"]))
    ending_of(http).callback(state.settle, ticket)
    ending_of(http).callback(ticket.cancel)
    return ticket


def ending_of(http: HttpRequest) -> ExitStack:
    """What is undone when the answer to a request has ended, or will never be sent."""
    ending: ExitStack = http.scope["state"]["ending"]
    return ending


async def unsilent(events: AsyncGenerator[Event, None]) -> AsyncIterator[Event | None]:
    """The events of a ticket, and ``None`` after each silence."""
    coming: asyncio.Future[Event] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((coming,), timeout=SILENCE_SECONDS)
            if not done:
                yield None
                continue
            try:
                event, coming = coming.result(), None
            except StopAsyncIteration:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()


async def pictures(ticket: Ticket, http: HttpRequest) -> list[Picture]:
    """Wait for all pictures. Raises the first error, and :class:`Cancelled` if the client goes away."""
    work, gone = asyncio.ensure_future(_all(ticket)), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        ticket.cancel()
        raise Cancelled("the client closed the connection")
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _all(ticket: Ticket) -> list[Picture]:
    return pictures_of([event async for event in ticket.follow() if event.is_last])


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
