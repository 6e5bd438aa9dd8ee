"""A generator outside of Python: torch.export, and ONNX where the extra [onnx] is installed."""

import json
import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from drifting_pytorch import ConvGenerator
from helpers import ROOT, awake, raises_one_line, relative, tiny_generator

def conv_generator():
    torch.manual_seed(0)
    return ConvGenerator(image_size = 8, channels = 2, num_classes = 5, dim = 16, dim_noise = 6, output_conv_dim = 4)

KINDS = dict(
    everything = partial(tiny_generator, depth = 1, outer_slope = 0.1),
    noise_and_alpha = partial(
        tiny_generator, depth = 1, num_classes = None, num_style_tokens = 0, num_register_tokens = 0
    ),
    convolutions = conv_generator,
    conditions = partial(tiny_generator, depth = 1, dim_condition = 3, condition_channels = 2),
    picture = lambda: ConvGenerator(image_size = 8, channels = 2, dim = 16, condition_channels = 1)
)

@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    import export
    return export

@pytest.mark.parametrize('kind', KINDS)
def test_exported_program_takes_any_batch_size(script, kind):
    call = script.Call(awake(KINDS[kind]()).eval())
    program = script.export(call).module()

    for batch in (1, 3, 7):
        inputs = call.draw(batch, seed = batch)
        with torch.no_grad():
            assert relative(program(*inputs), call(*inputs)) < 1e-6

@pytest.mark.parametrize('kind', KINDS)
def test_checkpoints_are_exported_with_their_average(script, tmp_path, kind):
    model = awake(KINDS[kind]())
    model.save_pretrained(tmp_path)
    call = script.Call(model)
    inputs = call.draw(2)

    def sample(model):
        return script.Call(model)(*inputs)

    loaded = script.load_generator(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(sample(loaded), sample(model))

    averages = [deepcopy(awake(model)) for _ in range(3)]
    first, *others = (average.state_dict() for average in averages)
    save_file(first, tmp_path / 'ema.safetensors')
    named = {f'{name}.{i}': t for i, other in enumerate(others) for name, t in other.items()}
    save_file(named, tmp_path / 'averages.safetensors')

    for best, expected in ((None, 0), (0.9, 0), (0.99, 1), (0.999, 2)):
        best = best and dict(value = 1., step = 1, ema_decay = best)
        manifest = dict(best = best, config = dict(ema_decay = [0.9, 0.99, 0.999]))
        (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
        assert torch.equal(sample(script.load_generator(tmp_path)), sample(averages[expected]))

    (tmp_path / 'config.json').write_text('null')
    with raises_one_line('does not say which generator it is of'):
        script.load_generator(tmp_path)

@pytest.mark.parametrize('kind', [
    pytest.param(kind, marks = pytest.mark.slow if kind == 'noise_and_alpha' else ()) for kind in KINDS
])
def test_onnx_equals_pytorch(script, tmp_path, monkeypatch, capsys, kind):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, path = awake(KINDS[kind]()), tmp_path / 'out.onnx'
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch, 'compile', lambda module, **kwargs: module)          # which takes a minute
    script.main([str(tmp_path), str(path), '--rounds', '1', '--batch-sizes', '2', '--threads', '1'])

    text = capsys.readouterr().out
    differences = [float(value) for value in re.findall(r'differs from PyTorch by (\S+)', text)]
    assert len(differences) == 2 and max(differences) < 1e-5
    timed = re.findall(r'batch 2, (.+): \S+ ms per sample', text)
    assert timed == ['PyTorch, eager', 'PyTorch, compiled', 'onnxruntime']

    call, loaded = script.Call(model.eval()), script.session(path, 1)
    assert script.difference(torch.zeros(2), torch.zeros(2)) == 0                   # nothing is trained
    shapes = {each.name: each.shape for each in loaded.get_inputs()}
    noise = ['batch', *call.model.noise_shape]
    expected = dict(noise = noise, labels = ['batch'], alpha = ['batch'], styles = ['batch', 4])
    expected |= dict(vector = ['batch', 3], image = ['batch', *call.model.condition_shapes.get('image', [0])[:1], 8, 8])
    assert shapes == {name: expected[name] for name in call.names}
    assert not list(tmp_path.glob('*.data'))                                        # one file

    inputs = call.draw(5, seed = 5)
    with torch.no_grad():
        assert relative(script.run_onnx(loaded, call, inputs), call(*inputs)) < 1e-5
