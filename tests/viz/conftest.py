"""The browser under the name that the pages' tests use."""

from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser(chromium: Any) -> Any:
    return chromium
