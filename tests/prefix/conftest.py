"""The driver of stage 2's tests, for engines of stage 4."""

from tests.paged.conftest import drain, greedy, naive

__all__ = ["drain", "greedy", "naive"]
