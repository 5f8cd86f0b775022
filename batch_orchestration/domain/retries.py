"""When a failed request is sent again, and when it is given up: a pure decision."""

import math

import msgspec

from batch_orchestration.core.outcomes import Failure


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Exponential back-off with full jitter.

    Delay before attempt n+1: uniform in [0, min(max_delay, base_delay · 2^(n-1))] seconds, the
    "full jitter" of AWS's architecture blog, "Exponential Backoff And Jitter".

    Attributes:
        max_retry_after_seconds: What an engine may ask for at most.
    """

    max_attempts: int = 5
    base_delay_seconds: float = 0.5
    max_delay_seconds: float = 30.0
    max_retry_after_seconds: float = 600.0


def retry_delay(
    failure: Failure,
    *,
    attempts: int,
    policy: RetryPolicy,
    jitter: float,
    seconds_left: float = math.inf,
) -> float | None:
    """Return seconds to wait before the next attempt, or None to give up.

    What the engine asks for counts up to the policy's limit, and up to half of the time that the
    batch has left: so that the request is asked again before that is over.

    Args:
        failure: Of the latest attempt.
        attempts: How many attempts were made, the failed one included.
        jitter: A random number in [0, 1); passed in to keep the decision pure.
        seconds_left: Until the deadline of the request's batch.
    """
    if not failure.retryable or attempts >= policy.max_attempts:
        return None
    # Doubled 64 times any delay is beyond its maximum; 1,024 times it is beyond a float.
    doubled = policy.base_delay_seconds * 2.0 ** min(attempts - 1, 64)
    ceiling = min(policy.max_delay_seconds, doubled)
    delay = ceiling * jitter
    most = max(0.0, min(policy.max_retry_after_seconds, seconds_left / 2))
    return max(delay, min(failure.retry_after_seconds or 0.0, most))
