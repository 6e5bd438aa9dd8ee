import os

os.environ.setdefault('OMP_NUM_THREADS', '1')           # small tensors: a second thread only waits

import pytest
import torch
from accelerate.state import AcceleratorState

os.environ['DRIFTING_TYPECHECK'] = '1'      # before the first import: shapes in signatures are checked in all tests
pytest.register_assert_rewrite('helpers')

torch.set_num_threads(1)

@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)

@pytest.fixture(autouse = True)
def fresh_accelerate():
    """accelerate keeps one state per process, for example its precision; examples set the number of threads."""
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state = True)
