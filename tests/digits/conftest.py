import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # tiny.py


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """These models are small: threads that wait for another worker's cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
