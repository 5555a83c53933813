"""Tiny models and data sets whose numbers can be checked by hand or against the oracle; one thread; no hub, no telemetry."""

import gc
import os


os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_collection_finish():
    # The Trainer ends with a garbage collection. Of all that the imports have made and keep, it takes a third of a second.
    gc.freeze()
