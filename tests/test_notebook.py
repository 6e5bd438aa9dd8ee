"""The notebook: without outputs, in the words of this package, and it runs."""

import ast
import base64
import builtins
import importlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT

PATH = ROOT / 'examples' / 'drifting.ipynb'
CELLS = [cell for cell in json.loads(PATH.read_text())['cells'] if cell['cell_type'] == 'code']

def test_no_outputs_are_kept():
    assert len(CELLS) > 4 and all(cell['outputs'] == [] and cell['execution_count'] is None for cell in CELLS)

def test_every_name_is_there():
    """Of the package, and in the order of the cells."""
    known = {*dir(builtins)}

    for cell in CELLS:
        tree = ast.parse(''.join(cell['source']))
        compile(tree, PATH.name, 'exec')
        loaded = set()

        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                known |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module.startswith('drifting_pytorch'):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)):
                known.add(node.name)
            if isinstance(node, ast.arg):
                known.add(node.arg)
            if isinstance(node, ast.Name):
                (loaded if isinstance(node.ctx, ast.Load) else known).add(node.id)

        assert loaded <= known, loaded - known

@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    notebook = nbformat.read(PATH, 4)
    nbclient.NotebookClient(notebook, timeout = 1_200, resources = dict(metadata = dict(path = tmp_path))).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    printed = ''.join(output['text'] for output in outputs if output.get('name') == 'stdout')
    pictures = [output['data']['image/png'] for output in outputs if 'image/png' in output.get('data', {})]
    print(f'\n{printed}')
    assert 'pixel_B_sota is out of reach' in printed and 'digits that took no part' in printed
    assert len(pictures) == 5
    assert all(np.array(Image.open(io.BytesIO(base64.b64decode(data)))).std() > 10 for data in pictures)
