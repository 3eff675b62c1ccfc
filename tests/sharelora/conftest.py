"""Every test of the method draws the same weights, alone or beside others."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
