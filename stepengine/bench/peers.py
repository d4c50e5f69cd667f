"""Other engines on the same requests. So far: `transformers.generate`, greedy, fp32, with its own KV cache."""

from pathlib import Path
from typing import Any

import torch

from stepengine.bench import runs, workloads
from stepengine.bench.measure import alternate
from stepengine.bench.options import Options, bar_text, ratio_text, told_of
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


def peer_hf(options: Options) -> dict[str, Any]:
    """One stage against `transformers.generate`, one request alone and 32 together; above 1 the stage is faster.

    Only tokens that were asked for count on either side. The stage has room for all 32 at once; the
    peer takes batches of `peer_batch`.
    """
    peer = Transformers(options.model, options.peer_batch)
    count, prompt, output = (8, (16, 48), (8, 32)) if options.fast else (32, (32, 256), (32, 128))
    llm = runs.build(options.model, options.stage, count, max(128, prompt[1] + output[1]))
    ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
    sets = {
        "single": (workloads.uniform(ids, options.seed, 1, (64, 64), (16, 16) if options.fast else (64, 64)), 1.0),
        "batch": (workloads.uniform(ids, options.seed, count, prompt, output), 1.6),
    }
    result: dict[str, Any] = {"what": "peer hf", "stage": options.stage, "peer": peer.padding, "max_num_seqs": count}
    for name, (work, bar) in sets.items():
        tokens: dict[str, list[list[int]]] = {}

        def ours(work: workloads.Workload = work, tokens: dict[str, Any] = tokens) -> None:
            tokens["ours"] = runs.run(llm, work).token_ids

        def theirs(work: workloads.Workload = work, tokens: dict[str, Any] = tokens) -> None:
            tokens["peer"] = peer.run(work)

        # One request alone is over in seconds and its ratio close to 1: more rounds, or noise would decide.
        rounds = options.rounds if name == "batch" or options.fast else max(options.rounds, 11)
        with told_of(options, f"{name}: stage {options.stage}, transformers", 2 * (rounds + 1)) as told:
            timed = alternate({"ours": ours, "peer": theirs}, rounds, told=told)
        result[name] = {
            "workload": work.describe(),
            "seconds": timed.values,
            "tokens_per_s": {arm: work.num_outputs / timed.median(arm) for arm in timed.values},
            "ratio": vars(timed.ratio("peer", "ours")),
            "bar": bar,
            "met": timed.ratio("peer", "ours").median >= bar,
            "equal_sequences": sum(a == b for a, b in zip(tokens["ours"], tokens["peer"], strict=True)),
        }
    return result


def text_peer_hf(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [
        f"stage {result['stage']}, up to {result['max_num_seqs']} requests at once, against transformers.generate, "
        f"{result['peer']}; fp32, greedy"
    ]
    for name in ("single", "batch"):
        part = result[name]
        speed, work = part["tokens_per_s"], part["workload"]
        lines.append(
            f"  {name + ':':8}{speed['ours']:7.1f} against {speed['peer']:7.1f} tokens/s: {ratio_text(part['ratio'])}; "
            f"{bar_text(part, '>=')}; equal tokens in {part['equal_sequences']} of {work['requests']}"
        )
    return "\n".join(lines)
