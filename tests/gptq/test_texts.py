"""Calibration and evaluation text have nothing in common, whatever they come from."""

import pytest
import torch

from stepengine.errors import InvalidSetting
from stepengine.stage5_gptq.texts import read_texts, windows


class Letters:
    """A tokenizer: one token a character."""

    def encode(self, text: str, verbose: bool = True) -> list[int]:
        return [ord(char) for char in text]


def paragraphs(text: str) -> set[str]:
    return set(text.split("\n\n"))


def test_pythons_own_help_is_enough_and_split():
    texts = read_texts()
    assert len(texts.calibration) > 150_000 and len(texts.evaluation) > 30_000
    assert not paragraphs(texts.calibration) & paragraphs(texts.evaluation)


def test_a_file_is_split_at_its_last_quarter(tmp_path):
    file = tmp_path / "book.anything"
    file.write_text("\n\n".join(f"paragraph {number}" for number in [*range(8), 1, 2]), encoding="utf-8")
    texts = read_texts(file)
    assert texts.calibration.split("\n\n") == [f"paragraph {number}" for number in range(6)]
    assert texts.evaluation.split("\n\n") == ["paragraph 6", "paragraph 7"]


def test_a_folder_is_split_by_files(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.md").write_text(f"text {number}\n\nin all of them", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    texts = read_texts(tmp_path)
    assert texts.evaluation.split("\n\n") == ["text 3", "text 7"]
    assert texts.calibration.split("\n\n") == [
        "text 0",
        "in all of them",
        "text 1",
        "text 2",
        "text 4",
        "text 5",
        "text 6",
    ]


def test_paths_without_text_are_refused(tmp_path):
    with pytest.raises(InvalidSetting, match="holds no text"):
        read_texts(tmp_path)
    with pytest.raises(InvalidSetting, match="holds no text"):
        read_texts(tmp_path / "missing.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidSetting, match="cannot be read"):
        read_texts(tmp_path)


def test_windows_do_not_overlap_and_are_drawn_by_the_seed():
    text = "".join(chr(number) for number in range(1, 104))
    every = windows(Letters(), text, 10)
    assert every.shape == (10, 10) and every.flatten().tolist() == list(range(1, 101))
    drawn = windows(Letters(), text, 10, 4)
    assert torch.equal(drawn, windows(Letters(), text, 10, 4)) and len({row[0] for row in drawn.tolist()}) == 4
    assert all(row in every.tolist() for row in drawn.tolist())
    with pytest.raises(InvalidSetting, match="103 tokens, and 11 pieces of 10 need 110"):
        windows(Letters(), text, 10, 11)
    with pytest.raises(InvalidSetting, match="1 pieces of 200 need 200"):
        windows(Letters(), text, 200)
