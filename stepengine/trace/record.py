"""A trace while it grows: what the engine records, and nothing derived from it."""

from collections.abc import Sequence
from typing import Any, Protocol

from stepengine.core.plan import RequestInfo, StepRecord
from stepengine.errors import TraceError
from stepengine.trace.text import token_pieces


class Decodes(Protocol):
    """Anything that turns token ids into text."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class Trace:
    """Everything that happened in a run: the requests as they arrived and one record per step.

    `meta` names the stage, the model and the sizes that readers need (`block_size` in tokens, `num_blocks`
    without block 0 and 0 where there is no K/V storage, `kv_bytes_per_token`, ...); readers use `meta.get`.
    """

    def __init__(self, meta: dict[str, Any], tokenizer: Decodes | None = None) -> None:
        self.meta = meta
        self.requests: dict[int, RequestInfo] = {}
        self.steps: list[StepRecord] = []
        self.tokenizer = tokenizer
        self.texts: dict[int, tuple[str, tuple[str, ...]]] = {}  # filled by `load`

    def add_request(self, info: RequestInfo) -> None:
        """Record a request when it arrives."""
        self.requests[info.id] = info

    def append(self, record: StepRecord) -> None:
        """Record a step when it is done."""
        self.steps.append(record)

    def output_ids(self) -> dict[int, tuple[int, ...]]:
        """The sampled token ids of every request, in order; a forked child's begin with its parent's."""
        ids: dict[int, list[int]] = {request: [] for request in self.requests}
        for record in self.steps:
            for parent, child in record.forked:
                ids[child] = list(ids.get(parent, ()))
            for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
                if token >= 0:
                    ids.setdefault(chunk.request, []).append(token)
        return {request: tuple(tokens) for request, tokens in ids.items()}

    def text(self, request: int) -> tuple[str, tuple[str, ...]]:
        """The prompt's text, and one piece of text per output token; a piece is "" while a character is incomplete.

        The pieces concatenated are the text that the outputs add to the prompt. A loaded trace gives what was
        saved; without a tokenizer and without saved text the answer is ("", ()).
        """
        if request not in self.requests:
            raise TraceError(f"Request {request} is not in this trace, which holds {len(self.requests)} requests.")
        if self.tokenizer is None:
            return self.texts.get(request, ("", ()))
        prompt = self.requests[request].prompt_ids
        return self.tokenizer.decode(list(prompt)), token_pieces(
            self.tokenizer.decode, prompt, self.output_ids()[request]
        )

    def __repr__(self) -> str:
        stage, model = self.meta.get("stage", "?"), self.meta.get("model", "?")
        return f"<Trace of stage {stage} on {model}: {len(self.requests)} requests, {len(self.steps)} steps>"
