"""How long tests throw generated input at something."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

LONG_PROFILE = "fuzz"
_LONG = settings(max_examples=20 * settings().max_examples)

settings.register_profile(LONG_PROFILE, _LONG)


def bounded(num_examples: int) -> settings:
    """Return settings for so many examples, always the same ones; with the profile `fuzz`, which
    `make fuzz` chooses, for 20 times as many that are new each time."""
    is_long = settings().max_examples == _LONG.max_examples
    return settings(
        max_examples=num_examples * (20 if is_long else 1),
        derandomize=not is_long,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
