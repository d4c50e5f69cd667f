"""A cache that remembers nothing, which is all that "naive" means."""

from stepengine.core.request import Request
from stepengine.core.seams import Grant, Limits


class NoCache:
    """Has room for everything and keeps none of it: after each step all tokens must be computed again."""

    def __init__(self, limits: Limits) -> None:
        self.capacity_tokens = limits.max_num_seqs * limits.max_model_len
        self.free_tokens = self.capacity_tokens  # nothing is ever stored

    def match(self, request: Request) -> int:
        return 0

    def grow(self, request: Request, upto: int) -> Grant:
        return Grant()

    def commit(self, request: Request, upto: int) -> int:
        return 0

    def release(self, request: Request) -> None:
        pass
