"""Every test starts from the same random state and leaves the defaults of torch as they were."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() is torch.float32
