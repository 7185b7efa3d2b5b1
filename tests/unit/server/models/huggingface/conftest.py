"""A fixture: transformers without its progress bars and warnings."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _silent() -> Iterator[None]:
    """Hide transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
