"""Contiguous K/V: one slot of max_model_len tokens per request, reserved from its first step to its last."""

from stepengine.core.request import Request
from stepengine.core.seams import Grant, Limits


class SlotCache:
    """A slot is one block of `max_model_len` tokens; a request holds exactly one while it runs."""

    def __init__(self, limits: Limits) -> None:
        self.slot_tokens = limits.max_model_len
        self.capacity_tokens = limits.num_blocks * self.slot_tokens
        self.free_slots = list(range(limits.num_blocks, 0, -1))  # the lowest is taken first

    @property
    def free_tokens(self) -> int:
        return len(self.free_slots) * self.slot_tokens

    def match(self, request: Request) -> int:
        return 0

    def grow(self, request: Request, upto: int) -> Grant | None:
        if request.blocks:
            return Grant() if upto <= self.slot_tokens else None
        if not self.free_slots or upto > self.slot_tokens:
            return None
        return Grant((self.free_slots.pop(),))

    def commit(self, request: Request, upto: int) -> int:
        return upto

    def release(self, request: Request) -> None:
        self.free_slots.extend(request.blocks)
        self.free_slots.sort(reverse=True)
        request.blocks.clear()
