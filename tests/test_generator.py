"""The generator: the release's, its files, the architecture, sampling."""

import io
import json
import math
import shutil

import msgpack
import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file

from drifting_pytorch import DriftingGenerator, LatentMAE, drifting
from helpers import (
    REFERENCE,
    awake,
    flat_gradients,
    nchw,
    packed,
    packed_array,
    raises_one_line,
    relative,
    tiny_generator as tiny,
    tiny_mae,
)

ARTIFACT = REFERENCE / 'artifact_generator'

# the release

def test_generator_equals_the_release():
    arrays = np.load(REFERENCE / 'generator.npz')
    noise = nchw(arrays['noise'])
    labels, styles = (torch.from_numpy(arrays[name]).long() for name in ('labels', 'style'))
    alpha = torch.from_numpy(arrays['alpha'])

    model = DriftingGenerator.from_pretrained(ARTIFACT)

    with torch.no_grad():
        assert relative(model.condition(labels, alpha, styles), arrays['cond']) < 1e-5
        samples = model(noise, labels, alpha, styles)

    assert relative(rearrange(samples, 'b ch h w -> b h w ch'), arrays['samples']) < 1e-5

@pytest.mark.parametrize('name, parameters', [
    ('B/2', 132_708_880),
    ('L/2', 462_909_456),
    ('B/16', 133_864_704),
    ('L/16', 464_450_304),
])
def test_presets_have_the_release_parameter_counts(name, parameters):
    with torch.device('meta'):
        model = DriftingGenerator.from_preset(name, num_classes = 1000)

    assert sum(p.numel() for p in model.parameters()) == parameters

# files of the release

def copied(tmp_path):
    folder = tmp_path / 'artifact'
    shutil.copytree(ARTIFACT, folder)
    return folder, folder / 'ema_params.msgpack'

def with_bytes(tmp_path, change):
    """The artifact, what its file holds changed."""
    folder, weights = copied(tmp_path)
    weights.write_bytes(change(weights.read_bytes()))
    return folder

def with_tree(tmp_path, change):
    """The artifact, its nested dict of arrays changed in place."""
    folder, weights = copied(tmp_path)
    tree = msgpack.unpackb(weights.read_bytes())
    change(tree)
    weights.write_bytes(msgpack.packb(tree))
    return folder

FEWER_CLASSES = packed_array(np.zeros((3, 48), dtype = np.float32))

@pytest.mark.parametrize('change, says', [
    (lambda tree: tree.pop('Embed_0'), "missing ['class_embed.weight ("),
    (lambda tree: tree.update(Embed_1 = tree['Embed_0']), "unknown ['Embed_1.weight ("),
    (
        lambda tree: tree['Embed_0'].update(embedding = FEWER_CLASSES),
        "missing ['class_embed.weight (11, 48)'], unknown ['class_embed.weight (3, 48)']"
    ),
    (lambda tree: tree.update(Embed_0 = 'text'), 'found str at Embed_0'),
    (
        lambda tree: tree['Embed_0'].update(embedding = msgpack.ExtType(2, b'')),
        'not a msgpack file of arrays'
    ),
])
def test_wrong_parameters_are_refused(tmp_path, change, says):
    folder = with_tree(tmp_path, change)
    with pytest.raises(ValueError, match = 'weights|msgpack') as error:
        DriftingGenerator.from_pretrained(folder)
    message = str(error.value)
    assert says in message
    assert '\n' not in message

@pytest.mark.parametrize('array, says', [
    (packed((2,), 'quint8', bytes(2)), "unknown array type 1, 'quint8', expected one of float32"),
    (packed((2,), 'qint32', bytes(8)), "unknown array type 1, 'qint32'"),
    (packed((2,), 'int32', bytes(8)), "unknown array type 1, 'int32'"),
    (packed((2,), 'complex64', bytes(16)), "unknown array type 1, 'complex64'"),
    (packed((2,), 'frombuffer', bytes(8)), "unknown array type 1, 'frombuffer'"),
    (packed((2,), 4, bytes(8)), 'unknown array type 1, 4'),
    (packed((-1, 2), 'float32', bytes(16)), 'an array of shape [-1, 2] with 4 numbers'),
    (packed((3, 2), 'float32', bytes(20)), 'an array of shape [3, 2] with 5 numbers'),
    (packed((2 ** 40, 2 ** 40), 'float32', bytes(20)), 'with 5 numbers'),
    (packed(2, 'float32', bytes(8)), 'not a msgpack file of arrays'),
    (packed((2,), 'float32', bytes(7)), 'not a msgpack file of arrays'),
    (
        {'__msgpack_chunked_array__': True, 'shape': [2], 'chunks': [packed_array(np.zeros(2))]},
        'expected nested maps of arrays, found bool at Embed_0/embedding/__msgpack_chunked_array__'
    ),
])
def test_arrays_of_other_types_or_sizes_are_refused(tmp_path, array, says):
    folder = with_tree(tmp_path, lambda tree: tree['Embed_0'].update(embedding = array))
    with raises_one_line(says):
        DriftingGenerator.from_pretrained(folder)

@pytest.mark.parametrize('change', [
    lambda data: data[:1000],
    lambda data: data[:-1],
    lambda data: data + b'\x00',
    lambda data: b'\x80\x04pickle',
    lambda data: b'',
])
def test_damaged_files_are_refused(tmp_path, change):
    folder = with_bytes(tmp_path, change)
    with pytest.raises(ValueError, match = 'not a msgpack file of arrays'):
        DriftingGenerator.from_pretrained(folder)

def test_missing_folder_is_refused(tmp_path, monkeypatch):
    message = 'is neither a folder nor a published model, which are latent_L_sota, latent_B_sota'
    for missing in (tmp_path / 'nothing', 'latent_XL_sota'):
        with pytest.raises(ValueError, match = message):
            DriftingGenerator.from_pretrained(missing)
    shutil.copy(ARTIFACT / 'metadata.json', tmp_path / 'one')
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match = message):
        DriftingGenerator.from_pretrained(f'{tmp_path.name}/one')
    with pytest.raises(ValueError, match = 'No such file or directory: .*config.json'):
        DriftingGenerator.from_pretrained(tmp_path)
    shutil.copy(ARTIFACT / 'metadata.json', tmp_path)
    with pytest.raises(ValueError, match = 'No such file or directory: .*ema_params.msgpack'):
        DriftingGenerator.from_pretrained(tmp_path)

def test_bfloat16_arrays_are_read(tmp_path):
    whole = DriftingGenerator.from_pretrained(ARTIFACT)
    bias = whole.to_patch.bias.detach().bfloat16()
    half = packed(tuple(bias.shape), 'bfloat16', bias.view(torch.int16).numpy().tobytes())

    def change(tree):
        tree['LightningDiT_0']['FinalLayer_0']['TorchLinear_1']['Dense_0']['bias'] = half

    model = DriftingGenerator.from_pretrained(with_tree(tmp_path, change))
    assert torch.equal(model.to_patch.bias, whole.to_patch.bias.bfloat16().float())

@pytest.mark.parametrize('name, repository, folder, files', [
    ('latent_L_sota', 'Goodeat/drifting', 'models/gen/jax/latent_L_sota/', ('metadata.json', 'ema_params.msgpack')),
    ('someone/generator', 'someone/generator', '', ('config.json', 'model.safetensors')),
])
def test_names_are_fetched_from_the_hub(tmp_path, monkeypatch, name, repository, folder, files):
    """What is asked of huggingface_hub; the answer comes from this disk."""
    model = DriftingGenerator.from_pretrained(ARTIFACT)
    model.save_pretrained(tmp_path)
    on_disk = ARTIFACT if name == 'latent_L_sota' else tmp_path
    asked = []

    def hf_hub_download(repository, file, revision = None):
        asked.append((repository, file, revision))
        return str(on_disk / file.split('/')[-1])

    monkeypatch.setattr(drifting, 'hf_hub_download', hf_hub_download)
    fetched = DriftingGenerator.from_pretrained(name, revision = 'v1')
    assert torch.equal(fetched.sample([1, 2], seed = 0), model.sample([1, 2], seed = 0))
    assert asked == [(repository, folder + file, 'v1') for file in files]

# files of its own

def test_a_whole_model_can_be_pickled():
    model, file = awake(tiny()), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only = False)
    inputs = torch.randn(2, *model.noise_shape), torch.zeros(2).long(), 1., model.draw_styles(2)
    assert torch.equal(again(*inputs), model(*inputs))

def test_saved_models_are_read_back(tmp_path):
    model = awake(tiny(share_style_codebook = True)).eval()
    model.save_pretrained(tmp_path)
    again = DriftingGenerator.from_pretrained(tmp_path)
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    saved, read = model.state_dict().values(), again.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(saved, read, strict = True))
    assert torch.equal(model.sample([0, 3], seed = 1), again.sample([0, 3], seed = 1))

    with pytest.raises(ValueError, match = 'is not a LatentMAE'):
        LatentMAE.from_pretrained(tmp_path)

    tiny(num_classes = np.int64(4)).bfloat16().save_pretrained(tmp_path / 'half')
    again = DriftingGenerator.from_pretrained(tmp_path / 'half')
    assert again.num_classes == 4
    assert {p.dtype for p in again.parameters()} == {torch.float32}

    kept = dict(ff_mult = np.float32(2.), share_style_codebook = np.bool_(True))
    model = tiny(**kept)
    model.save_pretrained(tmp_path / 'numpy')
    again = DriftingGenerator.from_pretrained(tmp_path / 'numpy')
    assert again.blocks[0].ff.ff[0].proj.weight.shape == model.blocks[0].ff.ff[0].proj.weight.shape
    assert again.style_stride == 0

    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match = 'is not a DriftingGenerator: Error while deserializing'):
        DriftingGenerator.from_pretrained(tmp_path)

def saved(folder, config = None, **weights):
    """A saved generator, its config and some of its weights changed."""
    tiny().save_pretrained(folder)
    if config is not None:
        kept = json.loads((folder / 'config.json').read_text())
        changed = {**kept, **config} if isinstance(config, dict) else config
        (folder / 'config.json').write_text(json.dumps(changed))
    state = load_file(folder / 'model.safetensors')
    save_file({**state, **weights}, folder / 'model.safetensors')
    return folder

@pytest.mark.parametrize('config, weights, says', [
    ([1, 2], {}, 'is not a DriftingGenerator'),
    (dict(dim = -8), {}, 'more than its weights'),
    (dict(heads = 0), {}, 'heads must be a whole number from 1 on, got 0'),
    (dict(heads = '4'), {}, "heads must be a whole number from 1 on, got '4'"),
    (dict(patch_size = 0), {}, 'division'),
    (dict(image_size = '8'), {}, 'is not a DriftingGenerator'),
    (dict(image_size = 2 * 10 ** 7), {}, '2 blocks and 100000000000003 tokens, more than its weights'),
    (dict(num_register_tokens = 10 ** 14), {}, '2 blocks and 100000000000016 tokens, more than its weights'),
    (dict(dim = 2 ** 60), {}, 'more than its weights'),
    (dict(dim = '32', image_size = 10 ** 9), {}, 'is not a DriftingGenerator'),
    (dict(depth = 10 ** 9), {}, 'its config has 1000000000 blocks and 19 tokens, more than its weights'),
    (dict(ff_mult = float('nan')), {}, 'is not a DriftingGenerator'),
    (dict(ff_mult = 1e300), {}, 'is not a DriftingGenerator'),
    (dict(num_classes = 2 ** 62), {}, 'is not a DriftingGenerator'),
    (dict(unknown = 1), {}, "unexpected keyword argument 'unknown'"),
    ({}, {'to_patch.bias': torch.full((8,), math.nan)}, 'model.safetensors must be finite'),
    ({}, {'to_patch.bias': torch.full((8,), -math.inf).bfloat16()}, 'model.safetensors must be finite'),
    ({}, {'to_patch.bias': torch.zeros(8, dtype = torch.int64)}, 'is torch.int64, expected floating point'),
])
def test_configs_and_weights_that_cannot_be_are_refused(tmp_path, config, weights, says):
    with raises_one_line(says):
        DriftingGenerator.from_pretrained(saved(tmp_path, config, **weights))

@pytest.mark.parametrize('layers', [(10 ** 9, 1, 1, 1), (1, 1), 4, ('1', 1, 1, 1)])
def test_encoders_whose_layers_cannot_be_are_refused(tmp_path, layers):
    tiny_mae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(dict(config, layers = layers)))
    with raises_one_line('is not a LatentMAE: '):
        LatentMAE.from_pretrained(tmp_path)

@pytest.mark.parametrize('config', ['[]', '{"model_config": [1]}', '{"model_config": {"use_qknorm": 1}}', '{', '\x00'])
def test_configs_of_the_release_that_cannot_be_are_refused(tmp_path, config):
    folder, _ = copied(tmp_path)
    (folder / 'metadata.json').write_text(config)
    with raises_one_line('is not a DriftingGenerator'):
        DriftingGenerator.from_pretrained(folder)

class Squared(DriftingGenerator):
    """With arguments of its own in front of all others."""

    def __init__(self, side = 8, **kwargs):
        super().__init__(image_size = side, **kwargs)

def test_subclasses_may_pass_arguments_on(tmp_path):
    torch.manual_seed(0)
    model = Squared(channels = 2, patch_size = 2, dim = 16, depth = 1, heads = 2, num_classes = 5)
    model.save_pretrained(tmp_path)
    again = Squared.from_pretrained(tmp_path)
    assert type(again) is Squared
    assert torch.equal(model.eval().sample([1, 2], seed = 0), again.sample([1, 2], seed = 0))

# architecture

def test_output_is_zero_at_initialisation_and_every_parameter_learns():
    model = tiny()
    noise, labels = torch.randn(3, 2, 8, 8), torch.tensor([0, 4, 2])
    assert torch.equal(model(noise, labels), torch.zeros_like(noise))

    model = awake(model)
    model(noise, labels).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name

def test_output_convolutions_start_as_the_identity():
    noise, labels, styles = torch.randn(2, 2, 8, 8), torch.tensor([1, 3]), torch.zeros(2, 4, dtype = torch.long)
    plain, smooth = tiny(), tiny(output_conv_dim = 6)
    assert plain.state_dict().keys() == smooth.state_dict().keys() - {
        'output_convs.0.weight', 'output_convs.0.bias', 'output_convs.2.weight'
    }

    smooth.load_state_dict(awake(plain).state_dict(), strict = False)
    samples = plain(noise, labels, styles = styles)
    assert torch.equal(smooth(noise, labels, styles = styles), samples)

    # afterwards they reach over the seams

    smooth = awake(smooth)
    noise.requires_grad_()
    smooth(noise, labels, styles = styles).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in smooth.parameters())

    picture = torch.zeros(1, 2, 8, 8, requires_grad = True)
    smooth.output_convs(picture)[..., 4, 4].sum().backward()
    assert (picture.grad[0, 0] != 0).nonzero().aminmax(dim = 0).min.tolist() == [2, 2]

@pytest.mark.parametrize('given', [-1, 1.5, 0., False])
def test_widths_of_output_convolutions_that_cannot_be_are_refused(given):
    with raises_one_line('output_conv_dim must be a whole number from 0 on'):
        tiny(output_conv_dim = given)

def test_outer_slope_brings_samples_outside_the_range_nearer(tmp_path):
    noise, labels, styles = torch.randn(2, 2, 8, 8), torch.tensor([1, 3]), torch.zeros(2, 4, dtype = torch.long)
    plain, bent = awake(tiny()), tiny(outer_slope = 0.1)
    bent.load_state_dict(plain.state_dict())
    bent.save_pretrained(tmp_path)
    x = plain(noise, labels, styles = styles)
    excess = x.sign() * (x.abs() - 1)
    expected = torch.where(x.abs() <= 1, x, x.sign() + 0.1 * excess)
    assert 0.2 < (x.abs() > 1).float().mean() < 0.8                 # both happen
    for model in (bent, DriftingGenerator.from_pretrained(tmp_path)):
        torch.testing.assert_close(model(noise, labels, styles = styles), expected)

    # its gradient has the same slope, so no pixel stays where it cannot be seen

    (x * torch.where(x.abs() <= 1, 1., 0.1)).sum().backward()
    bent(noise, labels, styles = styles).sum().backward()
    torch.testing.assert_close(flat_gradients(bent), flat_gradients(plain))

@pytest.mark.parametrize('given', [0, -0.1, 1.1, float('nan'), None, 'leaky'])
def test_outer_slopes_that_cannot_be_are_refused(given):
    with raises_one_line('outer_slope must be a number in 0.001 .. 1'):
        tiny(outer_slope = given)

def test_initialisation():
    model = tiny(dim = 128, num_classes = 100, style_codebook_size = 64)
    for weight in (model.class_embed.weight, model.style_embed.weight, model.register_embed):
        assert abs(weight.std().item() - 0.02) < 0.003

    bound = math.sqrt(6 / (8 + 128))                         # xavier uniform
    assert 0.98 * bound < model.patch_embed.weight.abs().max() <= bound

    # 2d sine-cosine: [columns sin, columns cos, rows sin, rows cos]

    row, column = 2, 3
    omega = 10_000 ** (-np.arange(32) / 32)
    expected = np.concatenate([f(position * omega) for position in (column, row) for f in (np.sin, np.cos)])
    assert relative(model.pos_embed[row * 4 + column], expected) < 1e-6

@pytest.mark.parametrize('heads', [1, 4])
def test_every_condition_and_all_noise_reach_every_pixel(heads):
    model = awake(tiny(heads = heads)).eval()
    noise = torch.randn(1, 2, 8, 8)
    styles = torch.zeros(1, 4, dtype = torch.long)
    labels, alpha = torch.tensor([1]), torch.tensor([1.5])
    base = model(noise, labels, alpha, styles)

    other_noise, other_styles = noise.clone(), styles.clone()
    other_noise[..., 7, 7] += 1.
    other_styles[0, 3] = 5

    others = (
        model(other_noise, labels, alpha, styles),
        model(noise, labels + 1, alpha, styles),
        model(noise, labels, alpha + 1, styles),
        model(noise, labels, alpha, other_styles),
    )
    for other in others:
        assert ((other - base).abs() > 0).all()

def test_style_tables_are_separate_or_shared():
    styles = torch.tensor([[0, 1, 2, 3]])
    swapped = torch.tensor([[1, 0, 2, 3]])
    args = torch.tensor([1]), torch.tensor([1.])

    separate = awake(tiny())
    assert separate.style_embed.weight.shape == (4 * 6, 32)
    assert relative(separate.condition(*args, swapped), separate.condition(*args, styles)) > 1e-2

    shared = awake(tiny(share_style_codebook = True))
    assert shared.style_embed.weight.shape == (6, 32)
    assert relative(shared.condition(*args, swapped), shared.condition(*args, styles)) < 1e-5

def test_without_classes_and_styles():
    model = awake(tiny(num_classes = None, num_style_tokens = 0)).eval()
    noise = torch.randn(2, 2, 8, 8)
    assert torch.equal(model(noise), model(noise))
    assert model.sample(num_samples = 3, seed = 0).shape == (3, 2, 8, 8)

def test_modulation_stays_in_float32_under_autocast():
    model = awake(tiny())
    with torch.autocast('cpu', dtype = torch.bfloat16):
        modulation = model.blocks[0].modulation(torch.randn(2, 32).bfloat16())
        assert all(t.dtype == torch.float32 for t in modulation)
        assert model(torch.randn(2, 2, 8, 8), torch.tensor([0, 1])).isfinite().all()

# sampling

def test_sampling_is_reproducible_and_leaves_the_model_as_it_was():
    model = awake(tiny()).train()
    labels = [0, 1, 2, 3, 4, 0, 0]

    a, b, c = (model.sample(labels, alpha = 1.5, seed = seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert model.training
    assert not a.requires_grad
    assert relative(model.sample(labels, alpha = 1.5, seed = 0, batch_size = 3), a) < 1e-5
    assert not torch.equal(model.sample(labels), model.sample(labels))               # no seed, fresh samples
    assert relative(model.sample(labels, alpha = torch.linspace(1, 3, 7), seed = 0), a) > 1e-3

def test_a_sample_depends_on_its_seed_and_place_alone(monkeypatch):
    model = awake(tiny())
    labels = [0, 1, 2, 3, 4, 0, 0]
    samples = model.sample(labels, seed = 0)
    assert relative(model.sample(labels[:3], seed = 0), samples[:3]) < 1e-5

    drawn = []
    monkeypatch.setattr(model, 'forward', lambda noise, *rest: drawn.append((noise, *rest)) or noise)
    model.sample(labels, seed = 0)
    torch.set_default_dtype(torch.float64)
    try:
        model.sample(torch.tensor(labels), seed = 0, batch_size = 3)
    finally:
        torch.set_default_dtype(torch.float32)

    (noise, _, alpha, styles), *parts = drawn
    assert torch.equal(torch.cat([part[0] for part in parts]), noise)
    assert torch.equal(torch.cat([part[3] for part in parts]), styles)
    assert noise.dtype == alpha.dtype == parts[0][2].dtype == torch.float32
    assert [len(part[0]) for part in parts] == [3, 3, 1]        # no more noise at a time than asked for

def test_sampling_leaves_every_module_in_its_mode():
    model = awake(tiny()).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    model.sample([0], seed = 0)
    assert [module.training for module in model.modules()] == before
    assert not all(before)

def test_labels_and_alpha_may_be_lists():
    model = awake(tiny()).eval()
    noise, styles = torch.randn(2, 2, 8, 8), torch.zeros(2, 4, dtype = torch.long)
    out = model(noise, [1, 2], [1., 2.], styles)
    assert torch.equal(out, model(noise, torch.tensor([1, 2]), torch.tensor([1., 2.]), styles))

@pytest.mark.parametrize('call, says', [
    (lambda m, x, y: m(x[:, :1], y), 'noise has shape (2, 1, 8, 8), expected (batch, 2, 8, 8)'),
    (lambda m, x, y: m(x[0], y), 'noise has shape'),
    (lambda m, x, y: m(x / 0, y), 'noise must be finite'),
    (lambda m, x, y: m(x), 'labels are needed'),
    (lambda m, x, y: m(x, y[:1]), 'labels has shape (1,), expected (2,)'),
    (lambda m, x, y: m(x, y.float()), 'labels must be integers'),
    (lambda m, x, y: m(x, y + 4), 'labels must be finite and in 0 .. 4, got 4 .. 5'),
    (lambda m, x, y: m(x, y, 0.5), 'alpha must be finite and in 1 .. inf'),
    (lambda m, x, y: m(x, y, torch.tensor([1., float('inf')])), 'alpha must be finite'),
    (lambda m, x, y: m(x, y, torch.ones(3)), 'alpha has shape (3,)'),
    (lambda m, x, y: m(x, y, 1., torch.zeros(2, 3).long()), 'styles has shape'),
    (lambda m, x, y: m(x, y, 1., torch.full((2, 4), 6)), 'styles must be finite and in 0 .. 5'),
    (lambda m, x, y: m(x, torch.tensor([True, False])), 'labels must be integers, got torch.bool'),
    (lambda m, x, y: m.bfloat16()(x, y), 'the model is torch.bfloat16'),
    (lambda m, x, y: m.sample(), 'pass labels'),
    (lambda m, x, y: tiny(depth = 1.5), 'depth must be a whole number from 0 on, got 1.5'),
    (lambda m, x, y: m(x.numpy(), y), 'noise must be a tensor, got ndarray'),
    (lambda m, x, y: m(x, ['a', 'b']), "labels must be numbers or a tensor of them, got ['a', 'b']"),
    (lambda m, x, y: m(x, y, 'strong'), "alpha must be numbers or a tensor of them, got 'strong'"),
    (lambda m, x, y: m.sample(y, seed = 0.5), 'seed must be a whole number from 0 on, got 0.5'),
    (lambda m, x, y: m.sample(['a', 'b']), 'labels must be numbers'),
    (lambda m, x, y: m.sample([]), 'must be a whole number from 1 on, got 0'),
    (lambda m, x, y: m.sample(y, batch_size = 0), 'must be a whole number from 1 on'),
    (lambda m, x, y: m.sample(y, alpha = [1., 2., 3.]), 'alpha has shape (3,), expected a number or (2,)'),
    (lambda m, x, y: tiny(num_classes = None).sample([0]), 'pass num_samples, no labels'),
    (lambda m, x, y: tiny(num_style_tokens = -1), 'must be a whole number from 0 on, got -1'),
    (lambda m, x, y: m.sample([5]), 'labels must be finite and in 0 .. 4'),
    (lambda m, x, y: tiny(num_classes = None)(x, y), 'labels must be None'),
    (lambda m, x, y: tiny(patch_size = 3), 'multiple of patch_size'),
    (lambda m, x, y: tiny(heads = 3), 'twice the heads'),
    (lambda m, x, y: tiny(num_classes = 0), 'num_classes must be a whole number from 1 on'),
    (lambda m, x, y: DriftingGenerator.from_preset('XL/2'), 'unknown preset'),
])
def test_bad_input_is_one_clear_line(call, says):
    with raises_one_line(says):
        call(tiny(), torch.zeros(2, 2, 8, 8), torch.tensor([0, 1]))

def test_labels_are_checked_for_a_model_that_does_not():
    model = torch.nn.Embedding(5, 2)
    model.num_classes = 5
    model.forward = lambda noise, labels, alpha, styles: noise + model.weight[labels]
    assert drifting.sample_from(model, (2,), [4]).shape == (1, 2)

    for label in (5, -1):
        with raises_one_line('labels must be finite and in 0 .. 4'):
            drifting.sample_from(model, (2,), [label])

def test_other_dtypes_of_the_input_and_no_registers():
    model = awake(tiny(num_register_tokens = 0)).eval()
    noise = torch.randn(2, 2, 8, 8)
    styles = torch.zeros(2, 4, dtype = torch.long)
    out = model(noise, torch.tensor([1, 2]), styles = styles)

    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        labels = torch.tensor([1, 2], dtype = dtype)
        assert torch.equal(model(noise.double(), labels, styles = styles), out)

    assert relative(model.double()(noise, torch.tensor([1, 2]), styles = styles), out) < 1e-5

def test_complex_labels_are_refused():
    with raises_one_line('labels must be integers, got torch.complex64'):
        tiny()(torch.randn(1, 2, 8, 8), torch.tensor([2 + 5j]))

def test_preset_arguments_can_be_overridden():
    with torch.device('meta'):
        assert len(DriftingGenerator.from_preset('B/2', depth = 1).blocks) == 1

def test_checkpointing_changes_nothing():
    noise, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 3])
    styles = torch.zeros(2, 4, dtype = torch.long)
    results = []

    for checkpointing in (False, True):
        model = awake(tiny(checkpointing = checkpointing))
        out = model(noise, labels, 1.5, styles)
        out.square().sum().backward()
        results.append((out, flat_gradients(model)))

    (out, gradients), (checkpointed_out, checkpointed_gradients) = results
    assert torch.equal(out, checkpointed_out)
    assert torch.equal(gradients, checkpointed_gradients)
