"""What a long stage tells as it proceeds."""

from collections.abc import Callable

Progress = Callable[[str, int, int, float], None]
"""Called as the work proceeds with (what, steps done, steps in all, loss or NaN)."""
