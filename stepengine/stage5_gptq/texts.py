"""Text to calibrate on, and text to be judged by that was never calibrated on."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepengine.errors import InvalidSetting

_KINDS = (".txt", ".md", ".rst")
_EVERY = 4  # one document of so many is evaluation text; of a single document, its last quarter


class Texts(NamedTuple):
    """Two texts that have no paragraph in common."""

    calibration: str
    evaluation: str


def read_texts(path: str | Path | None = None) -> Texts:
    """Texts from a file or a folder of .txt, .md and .rst files; by default the help texts that come with Python.

    Raises `InvalidSetting` for a path that holds no text.
    """
    documents = _python_help() if path is None else _documents(Path(path))
    calibration: list[str] = []
    evaluation: list[str] = []
    seen: set[str] = set()
    for number, document in enumerate(documents):
        # Of paragraphs that come more than once, the first counts: no text is on both sides.
        found = [part for part in (piece.strip("\n") for piece in document.split("\n\n")) if part.strip()]
        paragraphs = [part for part in dict.fromkeys(found) if part not in seen]
        seen |= set(paragraphs)
        if len(documents) == 1:
            cut = len(paragraphs) - len(paragraphs) // _EVERY
            calibration, evaluation = paragraphs[:cut], paragraphs[cut:]
        else:
            (evaluation if number % _EVERY == _EVERY - 1 else calibration).extend(paragraphs)
    return Texts("\n\n".join(calibration), "\n\n".join(evaluation))


def _python_help() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _documents(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _KINDS and file.is_file())
    else:
        files = [path] if path.is_file() else []
    try:
        documents = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"The text in {path} cannot be read ({error}); give UTF-8 text.") from error
    if not any(document.strip() for document in documents):
        raise InvalidSetting(
            f"{path} holds no text; give a text file, or a folder with files of {', '.join(_KINDS)} in it."
        )
    return documents


def windows(tokenizer: Any, text: str, length: int, count: int | None = None, seed: int = 0) -> Tensor:
    """Token ids [count, length] of `text` in pieces that do not overlap: `count` of them drawn by `seed`, or all.

    Raises `InvalidSetting` where the text has fewer.
    """
    ids = torch.tensor(
        tokenizer.encode(text, verbose=False)
    )  # it would warn of more tokens than the model runs at once
    pieces = len(ids) // length
    if pieces < (count or 1):
        raise InvalidSetting(
            f"The text has {len(ids)} tokens, and {count or 1} pieces of {length} need {(count or 1) * length}; give "
            f"more text, or fewer or shorter pieces."
        )
    whole = ids[: pieces * length].view(pieces, length)
    if count is None:
        return whole
    return whole[torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:count]]
