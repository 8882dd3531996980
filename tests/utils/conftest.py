"""The environment of a launcher."""

import os
from collections.abc import Callable, Iterator

import pytest
from processes import in_launcher

from utils import distributed
from utils.seed import seed_everything


@pytest.fixture(autouse=True)
def _same_draws_in_each_test() -> None:
    seed_everything(0)


@pytest.fixture
def launcher() -> Iterator[Callable[..., None]]:
    """Returns a function that sets a launcher's variables; the environment is as before afterwards."""
    before = dict(os.environ)

    def prepare(**variables: str) -> None:
        for name in filter(in_launcher, list(os.environ)):
            del os.environ[name]
        os.environ.update(variables)

    prepare()
    yield prepare
    distributed.shutdown()
    os.environ.clear()
    os.environ.update(before)
