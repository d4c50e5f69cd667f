"""The glossary: the terms that the lessons promise are there, each in both languages with a sentence."""

from pathlib import Path

import pytest

GLOSSARY = Path(__file__).parent.parent / "docs" / "glossary.md"
PROMISED = {
    "KV cache": "KV 缓存",
    "prefill": "预填充",
    "decode": "解码",
    "block table": "块表",
    "block pool": "块池",
    "preemption": "抢占",
    "swap": "换出/换入",
    "continuous batching": "连续批处理",
    "chunked prefill": "分块预填充",
    "prefix caching": "前缀复用",
    "copy-on-write": "写时复制",
    "quantisation": "量化",
    "calibration": "校准",
    "first-token latency": "首 token 延迟",
    "throughput": "吞吐",
    "fragmentation": "碎片",
    "scheduler": "调度器",
}


def rows() -> list[list[str]]:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "term" and not row[0].startswith("---")]


@pytest.mark.parametrize(("term", "chinese"), PROMISED.items())
def test_a_promised_term_has_its_usual_chinese_name(term: str, chinese: str) -> None:
    assert [row for row in rows() if term in row[0] and chinese in row[1]], f"{term} / {chinese} is missing"


@pytest.mark.parametrize(
    "term",
    "token TTFT ITL TPOT E2E throughput goodput slot GQA greedy logits iteration head-of-line static".split(),
)
def test_the_first_stages_terms_are_there(term: str) -> None:
    assert any(term in row[0] for row in rows())


def test_each_term_stands_once_and_has_one_sentence_in_each_language() -> None:
    table = rows()
    names = [row[0] for row in table]
    assert len(names) == len(set(names)) > 60
    for row in table:
        assert len(row) == 4 and all(row), row
        assert row[2].endswith(".") and row[3].endswith("。") and row[3].count("。") == 1, row
