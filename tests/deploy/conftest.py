import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The float parts between integer layers then compute the same in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
