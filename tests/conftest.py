import os

os.environ['DRIFTING_TYPECHECK'] = '1'    # shapes in signatures are checked throughout the tests

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)    # small tensors: a second thread only waits

REFERENCE = Path(__file__).parent / 'reference'

def relative(a, b):
    """norm of the difference / norm"""
    a, b = (np.asarray(t.detach() if torch.is_tensor(t) else t, dtype = np.float64) for t in (a, b))
    assert a.shape == b.shape, f'{a.shape} against {b.shape}'
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)

@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)

@pytest.fixture(autouse = True)
def fresh_accelerate():
    """accelerate keeps one state per process, for example its precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state = True)
