"""Exhibit 8: a request that is overtaken for ever."""

from functools import partial
from typing import TYPE_CHECKING

from stepengine.contracts import check_scheduler
from stepengine.core.plan import Chunk
from stepengine.core.request import State
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.workload import Ask, Workload
from stepengine.stage2_paged.scheduler import PagedScheduler

if TYPE_CHECKING:
    from stepengine.stage2_paged.scheduler import _Moves


class LetsOthersPass(PagedScheduler):
    """Whoever finds no room is passed over, so that no block stays idle."""

    def _admit(self, moves: "_Moves") -> tuple[list[Chunk], str]:
        """Start, in order, what places, blocks and budget allow; the chunks, and what stopped it."""
        chunks: list[Chunk] = []
        budget, places = self.limits.max_num_batched_tokens, self.limits.max_num_seqs
        for request in list(self.waiting):
            if len(self.running) >= places:
                return chunks, f"all {self.limits.max_num_seqs} places are taken"
            if self._prompt_runs(request):  # the next step finds it cached; until then its place is kept
                places -= 1
                continue
            if request.state is State.SWAPPED:
                blocked = self._no_room(request.num_tokens)
                swap = None if blocked else self.cache.swap_in(request)
                if swap is None:
                    return chunks, blocked or self._needs(request.num_tokens)
                moves.swapped_in.append(swap)
                self._start(request)
                continue
            cached = self.cache.match(request)
            needed = request.num_tokens - min(cached, request.num_tokens - 1)
            if needed > budget:
                return chunks, f"its {needed} tokens do not fit in the {budget} left of this step"
            if self._no_room(needed):
                continue
            request.keep(cached)  # tells the cache that what it found is wanted
            grant = self.cache.grow(request, request.num_tokens)
            if grant is None:
                request.keep(0)
                return chunks, self._needs(needed)
            self._start(request)
            chunks.append(moves.schedule(request, grant, cached))
            budget -= needed
        return chunks, ""


def _asks() -> tuple[Ask, ...]:
    short = [Ask(tuple(range(10 + number, 18 + number)), 9, arrives=2 * number) for number in range(16)]
    large = Ask(tuple(1 + at % 90 for at in range(40)), 6, arrives=9)
    return tuple(sorted([*short, large], key=lambda ask: ask.arrives))


EXHIBIT = Exhibit(
    name="starved request",
    symptom=(
        "Throughput is excellent and the pool is well used, and yet one customer's request never begins. It is larger "
        "than the others; at night, when traffic falls, it is suddenly done."
    ),
    where="the request that waits, and who starts while it waits",
    choices=(
        "it was lost from the queue",
        "smaller requests that came later start before it, again and again",
        "it is preempted as soon as it starts",
    ),
    answer="smaller requests that came later start before it, again and again",
    workload=Workload(
        stage=2,
        asks=_asks(),
        steps=60,
        settings={"block_size": 8, "num_blocks": 10, "max_num_seqs": 6, "max_model_len": 64},
    ),
    seam="scheduler",
    healthy=PagedScheduler,
    broken=LetsOthersPass,
    method="_admit",
    check=partial(check_scheduler, preempts=True),
    promise="whoever gave way comes back before newer ones",
    threads=("vllm-project/vllm#33522", "inference-sim/inference-sim#573"),
)
