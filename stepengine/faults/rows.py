"""Exhibit 6: sampled tokens that are booked to other requests than those whose rows they come from."""

from functools import partial

from stepengine.contracts import check_scheduler
from stepengine.core.plan import StepPlan
from stepengine.core.request import settle
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage2_paged.scheduler import PagedScheduler


class BooksById(PagedScheduler):
    """Goes through a step's results in the order of the requests' ids, which is not always that of its rows."""

    def update(self, plan: StepPlan, token_ids: list[int]) -> list[tuple[int, str]]:
        finished: list[tuple[int, str]] = []
        for chunk, token in zip(sorted(plan.chunks), token_ids, strict=True):
            request = self.running.get(chunk.request)
            if request is None or not request.accepts(chunk):
                continue
            reason = settle(request, chunk, token, self.cache.commit(request, chunk.end))
            if reason is not None:
                self.finish(request.id, reason)
                finished.append((request.id, reason))
        return finished


EXHIBIT = Exhibit(
    name="mixed rows",
    symptom=(
        "It ran well for months. Since the product team gives paying customers a priority, now and then a customer "
        "reads words that belong to another customer's question."
    ),
    where="what each row sampled, by the trace, beside what each request was given",
    choices=(
        "K/V of one request are read by another",
        "the model is right, and its tokens are given to the wrong requests",
        "the prompts are mixed up when they arrive",
    ),
    answer="the model is right, and its tokens are given to the wrong requests",
    workload=Workload(
        stage=2,
        asks=(
            Ask("The days of the week are Monday, Tuesday,", 16),
            Ask("To bake bread you need flour, water, salt and", 16),
            Ask("The capital of France is", 16, arrives=6, priority=-1),
        ),
        steps=30,
        settings={"block_size": 8, "num_blocks": 24, "max_num_seqs": 4, "max_model_len": 64},
        model=MODEL,
    ),
    seam="scheduler",
    healthy=PagedScheduler,
    broken=BooksById,
    method="update",
    check=partial(check_scheduler, preempts=True),
    promise="every request runs all its tokens, once, and ends; nothing is left behind",
    threads=("vllm-project/vllm#48419", "vllm-project/vllm#394"),
)
