"""`stepengine bench`: each question answered on a tiny model, the peer's tokens included."""

import json

import pytest

from stepengine.bench import run
from stepengine.bench.peers import Transformers
from stepengine.bench.runs import build
from stepengine.bench.runs import run as run_through
from stepengine.bench.workloads import corpus, uniform
from stepengine.errors import InvalidSetting

pytestmark = pytest.mark.filterwarnings("ignore")


def measured(capsys, *argv: str) -> dict:
    run.main([*argv, "--fast", "--rounds", "1", "--json"])
    return json.loads(capsys.readouterr().out)["results"][0]


def test_peer_hf(capsys, checkpoint) -> None:
    result = measured(capsys, "--peer", "hf", "--model", str(checkpoint()))
    assert result["single"]["equal_sequences"] == 1
    assert result["batch"]["equal_sequences"] == result["batch"]["workload"]["requests"]
    assert result["batch"]["ratio"]["median"] > 0
    assert "tokens/s" in run.text(result)


def test_peer_gives_what_was_asked_for_whatever_the_padding(checkpoint) -> None:
    llm = build(str(checkpoint()), "0", 3, 64)
    work = uniform(corpus(None, 499), 4, 7, (1, 30), (1, 12))
    peer = Transformers(checkpoint(), batch_size=3)
    assert peer.run(work) == run_through(llm, work).token_ids


def test_static(capsys, checkpoint) -> None:
    result = measured(capsys, "--what", "static", "--model", str(checkpoint()))
    for name in ("uniform", "exponential"):
        assert result[name]["met"] and result[name]["steps_ratio"] > 1
        assert result[name]["bound"] > 1
    assert "list scheduling" in run.text(result)


def test_context(capsys, checkpoint) -> None:
    result = measured(capsys, "--what", "context", "--model", str(checkpoint()))
    assert set(result["1 at once"]["ms_per_token"]) == {"128", "1024"}
    assert "1024" in run.text(result)


def test_trace(capsys) -> None:
    result = measured(capsys, "--what", "trace")
    assert result["us"]["off"] < result["us"]["on"]
    assert "us" in run.text(result)


def test_bad_questions_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="--peer"):
        run.main([])
    with pytest.raises(InvalidSetting, match="rounds is 0"):
        run.main(["--what", "trace", "--rounds", "0"])
