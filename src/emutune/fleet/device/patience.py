"""A server that does not answer: how long to wait, whom to tell, and when to give up."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from emutune.errors import FleetError
from emutune.fleet.device import clock
from emutune.fleet.security import Credentials


class PassingError(Exception):
    """A failure that may be over when the request is sent again."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a request is sent again: doubling, with jitter so that a fleet does not come at once.

    Attributes:
        first_s, longest_s: least and most of what the waits are drawn from.
        attempts: after so many in a row the failure is raised; None to go on for ever.
        patience_s: after so long without any answer the failure is raised; None to go on for ever.
    """

    first_s: float = 0.2
    longest_s: float = 15.0
    attempts: int | None = None
    patience_s: float | None = None

    def wait_s(self, failures: int) -> float:
        """The wait after so many failures in a row."""
        return random.uniform(0.5, 1.0) * min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 30))


class Patience:
    """A device's patience with its server.

    Args:
        url: where the server is.
        credentials: of the device.
        backoff: how to wait between attempts.
        remark: told when the server cannot be reached, and when it can again.
    """

    def __init__(
        self, url: str, credentials: Credentials, backoff: Backoff, remark: Callable[[str], None]
    ) -> None:
        self._url, self._credentials, self.backoff, self._remark = url, credentials, backoff, remark
        self._silent_since: float | None = None
        self._complaint: str | None = None

    def heard(self) -> None:
        """The server is there, whatever it answers."""
        self._silent_since = None

    async def wait(self, error: Exception, failures: int) -> None:
        """Wait before the next attempt, after so many failures in a row.

        Raises:
            FleetError: the server is not of this device's fleet, or there were enough attempts.
        """
        text = str(error) or type(error).__name__
        problem = _certificate_problem(error)
        if problem is not None and getattr(problem, "verify_code", 0) not in clock.OUT_OF_DATE:
            raise FleetError(
                f"{self._url}: its certificate is not of the fleet {self._credentials.fleet!r} "
                f"({problem.verify_message}); give that fleet's address, or credentials of this one"
            ) from error
        if problem is not None:
            # A clock is set, and a certificate renewed, while a device waits.
            text = problem.verify_message
            if self._complaint != text:
                wrong = await clock.what_is_wrong(self._url, self._credentials.ca)
                self._complain(text, f"{wrong or text}; trying again")
        if self.backoff.attempts is not None and failures >= self.backoff.attempts:
            raise FleetError(f"{self._url}: {text}, {failures} times; is the server running?") from error
        self._check_patience(error)
        wait_s = max(self.backoff.wait_s(failures), getattr(error, "wait_s", 0.0))
        # A single failure is everyday life on a radio link.
        if failures == 2 and problem is None:
            self._complain(text, f"{text}; trying again until it answers")
        await asyncio.sleep(wait_s)

    def _check_patience(self, error: Exception) -> None:
        """Give up a server that has been silent for too long, such as one whose steps are all done."""
        if not isinstance(error, httpx2.TransportError):
            return
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        patience_s = self.backoff.patience_s
        if patience_s is not None and now - self._silent_since >= patience_s:
            raise FleetError(
                f"{self._url}: has not answered for {patience_s / 3600:.3g} hours; nothing is lost: once the server "
                "runs, the same command goes on"
            ) from error

    def _complain(self, reason: str, remark: str) -> None:
        self._complaint = reason
        self._remark(f"{self._url}: {remark}")

    def answered(self) -> None:
        """A request was answered as it should be."""
        if self._complaint is not None:
            self._complaint = None
            self._remark(f"{self._url}: answers again")


def _certificate_problem(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None
