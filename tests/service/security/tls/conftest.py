"""An authority, and a server whose certificate it signed."""

from collections.abc import Iterator

import pytest

from support.certificates import Authority
from support.servers.tls import serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def address(authority: Authority) -> Iterator[str]:
    with serving(authority.pair()) as address:
        yield address
