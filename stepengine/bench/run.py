"""The `stepengine bench` command: one question at a time, each with its bar and the numbers behind it."""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from stepengine.bench import blocksize, chunked, flash, gptq, paging, peers, preemption, prefix, steps
from stepengine.bench.measure import machine
from stepengine.bench.options import Options
from stepengine.errors import InvalidSetting
from stepengine.stages import find_stage


class Measure(NamedTuple):
    """A question: how it is answered, how the answer is put in a few lines, what it is about."""

    answer: Callable[[Options], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]
    about: str


MEASURES = {
    "static": Measure(steps.static, steps.text_static, "batching policies against their formulas"),
    "context": Measure(steps.context, steps.text_context, "time per token at 1024 tokens against 128"),
    "trace": Measure(steps.trace, steps.text_trace, "cost of recording"),
    "paged": Measure(paging.paged, paging.text, "blocks against slots of the same bytes: how many fit, how fast"),
    "preemption": Measure(preemption.preemption, preemption.text, "a pool too small: recompute against swap"),
    "blocksize": Measure(blocksize.blocksize, blocksize.text, "blocks of 1 to 128 tokens: waste against speed"),
    "flash": Measure(flash.flash, flash.text, "scores never written (stage 3) against scores in memory (stage 2)"),
    "chunked": Measure(chunked.chunked, chunked.text, "long prompts beside decodes: chunks (4a) against prefill first"),
    "prefix": Measure(prefix.prefix, prefix.text, "prompts that begin alike: found (4b) against computed again"),
    "gptq": Measure(gptq.gptq, gptq.text, "weights of 4 bits (stage 5): perplexity, bytes, speed"),
}
PEERS = {"hf": Measure(peers.peer_hf, peers.text_peer_hf, "transformers.generate")}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 where a bar was asked to be enforced and missed."""
    args = _parser().parse_args(argv)
    if args.peer is None and args.what is None:
        raise InvalidSetting(f"bench needs a question: --peer {'|'.join(PEERS)} or --what {'|'.join(MEASURES)}.")
    for name, value in (("rounds", args.rounds), ("peer-batch", args.peer_batch)):
        if value < 1:
            raise InvalidSetting(f"{name} is {value}; it must be at least 1.")
    options = Options(
        args.model, find_stage(args.stage).name, args.rounds, args.seed, args.fast, not args.json, args.peer_batch
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    asked = [PEERS[args.peer]] if args.peer else []
    asked += [MEASURES[args.what]] if args.what else []
    results = [measure.answer(options) for measure in asked]
    if args.json:
        print(json.dumps({"model": options.model, "machine": machine(), "results": results}, indent=2))
    else:
        for result in results:
            print(text(result))
    return int(args.check and not all(_met(result) for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepengine bench", description="Measure one stage, or compare it.")
    abouts = "; ".join(f"{name}: {measure.about}" for name, measure in MEASURES.items())
    parser.add_argument("--peer", choices=sorted(PEERS), help="run another engine on the same requests, alternating")
    parser.add_argument("--what", choices=sorted(MEASURES), help=abouts)
    parser.add_argument("--model", default="smollm2-135m", help="catalogue name, local folder or hub id")
    parser.add_argument("--stage", default="1b", help="of peer, context and trace (default 1b); others fix their own")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default 0)")
    parser.add_argument("--peer-batch", type=int, default=16, help="requests in a batch of the peer (default 16)")
    parser.add_argument("--fast", action="store_true", help="smaller sets")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _met(result: dict[str, Any]) -> bool:
    parts = [part for part in result.values() if isinstance(part, dict) and "met" in part]
    return all(part["met"] for part in parts) and bool(result.get("met", True))


def text(result: dict[str, Any]) -> str:
    """A result as a few lines."""
    named = {**MEASURES, **{f"peer {name}": measure for name, measure in PEERS.items()}}
    return named[result["what"]].text(result)
