"""One undisturbed run of the whole DAG, which the runs that are disturbed must equal."""

import injection
import pytest
from injection import SECRETS, Stand
from shrinking import small_library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    injection.preload()
    return small_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="session")
def undisturbed(library, tmp_path_factory) -> Stand:
    stand = Stand(tmp_path_factory.mktemp("undisturbed") / "project", library)
    return stand.run_all(environment=SECRETS)


@pytest.fixture
def stand(undisturbed, tmp_path) -> Stand:
    """A copy of that project: published, with no work left."""
    return undisturbed.copy(tmp_path / "project")
