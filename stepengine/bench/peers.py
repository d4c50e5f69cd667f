"""Other engines on the same requests. So far: `transformers.generate`, greedy, fp32, with its own KV cache."""

from pathlib import Path

import torch

from stepengine.bench.workloads import Workload
from stepengine.model.catalog import resolve


class Transformers:
    """`transformers.generate` in left-padded batches of `batch_size`, taken in the requests' order.

    A batch runs until its longest request has all its tokens; that is how `generate` works. Only the
    tokens that were asked for are returned and counted. EOS is switched off rather than suppressed, so
    no logits processor slows the peer down.
    """

    def __init__(self, model: str | Path, batch_size: int = 16) -> None:
        from transformers import AutoModelForCausalLM

        folder = resolve(model)
        self.batch_size = batch_size
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        own = self.model.generation_config
        own.eos_token_id, own.pad_token_id, own.do_sample = None, 0, False
        own.temperature = own.top_p = own.top_k = None  # unused by greedy search; set, they would warn

    @property
    def padding(self) -> str:
        return f"left-padded batches of {self.batch_size}, each run to its longest request"

    @torch.inference_mode()
    def run(self, workload: Workload) -> list[list[int]]:
        """The output token ids of every request, in order."""
        outputs: list[list[int]] = []
        for at in range(0, len(workload.prompts), self.batch_size):
            window = slice(at, at + self.batch_size)
            outputs += self._batch(workload.prompts[window], workload.output_lens[window])
        return outputs

    def _batch(self, prompts: tuple[tuple[int, ...], ...], lens: tuple[int, ...]) -> list[list[int]]:
        longest, steps = max(map(len, prompts)), max(lens)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        found = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, use_cache=True
        )
        return [row[longest : longest + n].tolist() for row, n in zip(found, lens, strict=True)]
