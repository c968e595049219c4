import pytest

from threads import threads


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These models are small: threads that wait for each other would cost more than they bring."""
    with threads(1):
        yield
