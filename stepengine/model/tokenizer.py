"""The tokenizer of a checkpoint folder."""

from pathlib import Path
from typing import Any

from stepengine.errors import ModelError


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, or None if it has none. Raises `ModelError` for one that cannot be read."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"The tokenizer in {folder} cannot be read ({error}); remove it to use token ids.") from error
