import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """These models are small: threads that wait for another worker's cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
