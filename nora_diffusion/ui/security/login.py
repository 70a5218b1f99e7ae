"""The password of a shared app, and the limit on guesses."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import deque

TRIES, WINDOW = 8, 60.0
"""Wrong passwords accepted from one address in this many seconds; then the address has to wait."""
MANY_TRIES = 40
"""Wrong passwords in that time from all addresses together; from then on each address has one try in that time."""
HINT = f"After {TRIES} wrong passwords, wait a minute before you try again."


class Password:
    """Gradio's ``auth`` function: one user, compared in constant time."""

    def __init__(self, user: str, password: str) -> None:
        self._expected = (_bytes(user), _bytes(password))

    def __call__(self, user: str, password: str) -> bool:
        given = (_bytes(user), _bytes(password))
        same = [hmac.compare_digest(a, b) for a, b in zip(self._expected, given, strict=True)]
        return all(same)  # always compares both


class Attempts:
    """Counts wrong passwords by address and altogether.

    An address that guessed too often has to wait. No one else does: an address without a wrong password in the window
    always gets its password checked, so nobody can lock out the owner. Refused tries do not extend the wait.
    """

    def __init__(self) -> None:
        self._wrong: dict[str, deque[float]] = {}

    def start(self, address: str) -> float:
        """Count a try. Returns the seconds that the address has to wait first; 0 if its password may be checked."""
        now = time.monotonic()
        self._forget(now - WINDOW)
        tries = self._wrong.setdefault(_network(address), deque())
        under_attack = sum(map(len, self._wrong.values())) >= MANY_TRIES
        if len(tries) >= (1 if under_attack else TRIES):
            return WINDOW - (now - tries[0])  # in this order never above WINDOW
        tries.append(now)  # before the answer is known: tries sent at the same moment count as well
        return 0.0

    def succeed(self, address: str) -> None:
        """Forget the tries of an address that gave the right password."""
        self._wrong.pop(_network(address), None)

    def _forget(self, before: float) -> None:
        for network, tries in list(self._wrong.items()):
            while tries and tries[0] < before:
                tries.popleft()
            if not tries:
                del self._wrong[network]


def _network(address: str) -> str:
    """The address, or for IPv6 its /64 network: one customer of a provider has all addresses of such a network."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
