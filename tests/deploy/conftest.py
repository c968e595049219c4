"""What the tests of deployment share: one thread, and a small integer model with its files."""

import pytest

from deploy.small import small_images, small_prepared
from qk.deploy import convert, save
from threads import threads


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The float parts between integer layers then compute the same in every run."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def model():
    return convert(small_prepared(overrides={"left": {"group_size": 12}}))


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path / "out")


@pytest.fixture
def small():
    """An integer model and images for it."""
    return convert(small_prepared()), small_images()
