"""What a run asks of the machine, operator by operator: how many are launched, and what attention reads and writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepengine.llm import LLM

NO_WORK = ("empty", "new_empty", "resize_", "set_", "_unsafe_view", "detach_")  # these compute nothing
PICKS = ("index_select", "embedding", "index")  # read of their source as many bytes as they write
PUTS = ("index_copy_", "index_put_", "copy_")  # read only what they put, and write as many bytes into their target


@dataclass
class StepTraffic:
    """One step. An operator is one that computes: views and allocations are not counted."""

    max_q: int = 0  # tokens of the longest chunk
    operators: int = 0
    attention_operators: int = 0
    attention_bytes: int = 0  # every operator in attention reads its inputs once and writes its outputs once
    score_bytes: int = 0  # what softmax was given as a tensor, once; 0 where scores never leave an operator


@dataclass
class Traffic:
    """The steps of a run."""

    steps: list[StepTraffic] = field(default_factory=list)

    @property
    def attention_bytes(self) -> int:
        return sum(step.attention_bytes for step in self.steps)

    @property
    def score_bytes(self) -> int:
        return sum(step.score_bytes for step in self.steps)

    @property
    def decode_operators(self) -> float:
        """Operators of a step in which every request runs one token, on average."""
        decodes = [step.operators for step in self.steps if step.max_q == 1]
        return sum(decodes) / len(decodes)


@contextmanager
def counted(llm: LLM) -> Iterator[Traffic]:
    """Count the steps that the engine runs meanwhile, eagerly; they take longer, so time others."""
    traffic = Traffic()
    counter = _Counter(traffic)
    model, attention = llm.engine.runner.model, llm.engine.runner.attention
    compute, attend = model.forward, attention.forward

    def forward(batch: Any, backend: Any) -> Tensor:
        traffic.steps.append(StepTraffic(max(batch.lengths)))
        hidden: Tensor = compute(batch, backend)
        return hidden

    def attending(*args: Any) -> Tensor:
        counter.in_attention = True
        try:
            return attend(*args)
        finally:
            counter.in_attention = False

    with mock.patch.object(model, "forward", forward), mock.patch.object(attention, "forward", attending), counter:
        yield traffic


class _Counter(TorchDispatchMode):
    """Sees every operator. Those made of others are taken apart, or inference mode would hide what they launch."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self.in_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        written = _tensors(result)
        if self.traffic.steps and written and not _only_looks(func):
            self._note(self.traffic.steps[-1], func, _tensors((args, {**kwargs, "out": None})), written)
        return result

    def _note(self, step: StepTraffic, func: Any, read: list[Tensor], written: list[Tensor]) -> None:
        step.operators += 1
        if not self.in_attention:
            return
        name = func._schema.name.removeprefix("aten::")
        step.attention_operators += 1
        if name in PICKS:
            read = [*read[1:], written[0]]
        elif name in PUTS:
            read, written = read[1:], [read[-1]]
        step.attention_bytes += sum(tensor.nbytes for tensor in read + written)
        if "softmax" in name:
            step.score_bytes += read[0].nbytes


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _only_looks(func: Any) -> bool:
    """Whether an operator makes a view of its input, or room without contents."""
    arguments = func._schema.arguments
    view = any(each.alias_info is not None and not each.alias_info.is_write for each in arguments)
    return view or func._schema.name.removeprefix("aten::").startswith(NO_WORK)
