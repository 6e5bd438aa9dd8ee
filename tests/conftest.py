import multiprocessing
import os
import socket
import subprocess
import sys

os.environ['DRIFTING_TYPECHECK'] = '1'    # shapes in signatures are checked throughout the tests

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)    # small tensors: a second thread only waits

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / 'tests' / 'reference'

def run(*command, **kwargs):
    """What a command prints, or its error where it fails."""
    result = subprocess.run([*map(str, command)], capture_output = True, text = True, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout

def run_example(script, *args):
    return run(sys.executable, ROOT / 'examples' / script, *args, timeout = 300)

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
    """accelerate keeps one state per process, for example its precision; examples set the number of threads."""
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state = True)

def launch(fn, world, *args, timeout = 120):
    """Run fn(*args) in `world` forked processes that accelerate takes for one run; what each returns, or its exit code if it died."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    context = multiprocessing.get_context('fork')
    pipes, processes = [], []

    def child(rank, pipe):
        os.environ.update(RANK = str(rank), LOCAL_RANK = str(rank), WORLD_SIZE = str(world), LOCAL_WORLD_SIZE = str(world), MASTER_ADDR = '127.0.0.1', MASTER_PORT = str(port), OMP_NUM_THREADS = '1')      # accelerate would take more
        AcceleratorState._reset_state(reset_partial_state = True)
        pipe.send(fn(*args))
        os._exit(0)             # no exit handlers of the parent

    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target = child, args = (rank, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    results = []

    for pipe, process in zip(pipes, processes):
        try:
            assert pipe.poll(timeout), f'no answer within {timeout} s'
            results.append(pipe.recv())
            process.join()
        except EOFError:
            process.join()
            results.append(process.exitcode)
        finally:
            if process.is_alive():
                process.kill()

    return results
