"""Faulty parts of stage 2, each wrong in one way: contracts and the state machine must find every one."""

from stepengine.core.plan import Swap
from stepengine.stage2_paged.cache import PagedCache
from stepengine.stage2_paged.scheduler import PagedScheduler


class WritesIntoSharedBlocks(PagedCache):
    def grow(self, request, upto):
        grant = super().grow(request, upto)
        if grant is not None and grant.copies:
            self.pool.share([copy.source for copy in grant.copies])
            self.pool.free([copy.destination for copy in grant.copies])
        return grant and grant._replace(copies=())


class ForkTakesNoReference(PagedCache):
    def fork(self, parent, child):
        child.blocks.extend(parent.blocks)


class SwapsInBackwards(PagedCache):
    def swap_in(self, request):
        swap = super().swap_in(request)
        return swap and Swap(swap.request, tuple(zip(request.blocks[::-1], [s for _, s in swap.pairs], strict=True)))


class KeepsHostSlots(PagedCache):
    def release(self, request):
        self.hosted.pop(request.id, None)
        super().release(request)


class ForgetsThem(PagedScheduler):
    """Whoever gives way never comes back."""

    def _preempt(self, victim, moves):
        super()._preempt(victim, moves)
        self.waiting.remove(victim)


class QueuesThemLast(PagedScheduler):
    """Whoever gives way comes back after all who waited already."""

    def _preempt(self, victim, moves):
        super()._preempt(victim, moves)
        self.waiting.remove(victim)
        self.waiting.append(victim)
