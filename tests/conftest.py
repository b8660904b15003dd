"""What every test shares: one thread per worker, no network, a fixed seed."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ.get("MOESTRO_TEST_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # parallel workers set it, and the command would wrap its lines

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
