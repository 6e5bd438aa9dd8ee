"""The encoders and their features: the release's, pretraining, any backbone, and what the loss does with them."""

import json
import os
import re
import sys
from itertools import combinations, product

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn
from transformers import ConvNextV2Config, ConvNextV2Model

from drifting_pytorch import BackboneFeatures, ConvNeXtFeatures, FeatureDriftLoss, LatentMAE, drift_loss
from drifting_pytorch.drifting import FEATURE_SETS, map_features
from helpers import (
    REFERENCE,
    awake,
    by_the_rule,
    digest,
    flat_gradients,
    nchw,
    raises_one_line,
    relative,
    run,
    tiny_mae as tiny,
    write_artifact,
)

# the release

@pytest.fixture(scope = 'module')
def mae(tmp_path_factory):
    """The reference's encoder, through a published artifact's layout."""
    description = json.loads((REFERENCE / 'mae_latent.json').read_text())
    params = {path: by_the_rule(path, shape).astype(np.float32) for path, shape in description['params'].items()}
    folder = tmp_path_factory.mktemp('artifacts') / 'mae'
    return LatentMAE.from_pretrained(write_artifact(folder, description['config'], params))

def test_features_equal_the_release(mae):
    arrays = np.load(REFERENCE / 'mae_latent.npz')
    with torch.no_grad():
        features = mae.features(nchw(arrays['x']))

    names = {key[4:] for key in arrays.files if key.startswith('act/')}
    assert features.keys() == names
    assert len(names) == 64

    for name in names:
        assert features[name].shape == tuple(arrays[f'shape/{name}']), name
        assert relative(digest(features[name]), arrays[f'act/{name}']) < 1e-4, name

def test_pretraining_loss_equals_the_release(mae):
    arrays = np.load(REFERENCE / 'mae_latent.npz')
    x = nchw(arrays['x'])
    labels = torch.from_numpy(arrays['labels']).long()
    mask = torch.from_numpy(arrays['mask'])

    with torch.no_grad():
        loss, breakdown = mae(x, labels, cls_weight = 0.1, mask = mask)
        single = [mae(x[i:i + 1], labels[i:i + 1], mask = mask[i:i + 1])[1] for i in range(2)]

    assert relative(loss, arrays['loss'].mean()) < 1e-5
    assert relative(torch.stack([s.reconstruction for s in single]), arrays['recon_loss']) < 1e-5
    assert relative(torch.stack([s.classification for s in single]), arrays['cls_loss']) < 1e-5
    assert relative(breakdown.reconstruction, arrays['recon_loss'].mean()) < 1e-5

# with 32 channels in 32 groups, stage 1's normalised map has the same mean and deviation for every sample: distances
# of zero, in which the release's float32 sees its own rounding. Three more features of that stage and of the stem are
# small against their offset, where the same rounding shows in the third digit. Ours are judged by float64 there

ROUNDING_ALONE = {'layer1_mean', 'layer1_std'}
ROUNDING_SHOWS = {'conv1_mean', 'conv1_std', 'layer1_blk2_mean'}

def test_training_loss_through_the_encoder_equals_the_release(mae):
    arrays = np.load(REFERENCE / 'mae_latent_step.npz')
    gen, pos, uncond = (nchw(arrays[name]) for name in ('gen', 'pos', 'neg'))
    alpha = torch.from_numpy(arrays['alpha'])

    loss, breakdown = FeatureDriftLoss(mae)(gen.requires_grad_(), pos, uncond, alpha)
    loss.backward()

    expected = {key[5:]: arrays[key] for key in arrays.files if key.startswith('loss/')}
    assert breakdown.losses.keys() == expected.keys()

    exact = expected.keys() - ROUNDING_ALONE - ROUNDING_SHOWS

    for name in exact:
        assert relative(breakdown.losses[name], expected[name]) < 1e-4, name
    for name in ROUNDING_SHOWS:
        assert relative(breakdown.losses[name], expected[name]) < 2e-3, name

    ours, theirs = (sum(losses[name].item() for name in exact) for losses in (breakdown.losses, expected))
    assert abs(ours - theirs) < 1e-5 * theirs
    assert relative(rearrange(gen.grad, 'c g ch h w -> c g h w ch'), arrays['grad']) < 2e-3

    # our float32 against our float64, on the features as they come out of the encoder

    with torch.no_grad():
        features = [mae.features(t.detach().flatten(0, 1)) for t in (gen, pos, uncond)]

    for name in ROUNDING_SHOWS:
        points = [rearrange(feature[name], '(c n) f d -> (c f) n d', c = 2) for feature in features]
        weight = ((alpha - 1) * 4 / 3)[:, None].expand(2, 3)
        in_float64, _ = drift_loss(*(t.double() for t in points), uncond_weight = weight.double())
        assert relative(breakdown.losses[name], in_float64.mean()) < 2e-5, name

@pytest.mark.parametrize('dim, channels, patch_size, parameters', [
    (256, 4, 1, 431_354_348),
    (640, 4, 1, 2_687_866_604),
    (640, 3, 8, 2_689_069_992),
])
def test_parameter_counts(dim, channels, patch_size, parameters):
    with torch.device('meta'):
        model = LatentMAE(dim = dim, channels = channels, patch_size = patch_size)
        features = model.features(torch.empty(1, channels, 32 * patch_size, 32 * patch_size))

    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(features) == 85

    if patch_size == 1:
        assert sum(f.numel() for f in features.values()) == {256: 2_470_404, 640: 6_176_004}[dim]

# ConvNeXt-V2, of transformers

def convnext(sizes = (4, 8, 8, 8), depths = (1, 1, 1, 1), **kwargs):
    """Small, with random weights; some parts would start as the identity."""
    torch.manual_seed(0)
    model = ConvNextV2Model(ConvNextV2Config(hidden_sizes = sizes, depths = depths))
    return ConvNeXtFeatures(awake(model.eval()), **kwargs)

CONVNEXT_NAMES = (
    (r'^stages_(\d)/layers_(\d)/norm', r'encoder/stages/\1/layers/\2/layernorm'),
    (r'^stages_(\d)/layers_(\d)', r'encoder/stages/\1/layers/\2'),
    (r'^downsample_layers_0/layers_0', 'embeddings/patch_embeddings'),
    (r'^downsample_layers_0/layers_1', 'embeddings/layernorm'),
    (r'^downsample_layers_(\d)/layers_(\d)', r'encoder/stages/\1/downsampling_layer/\2'),
    (r'^norm', 'layernorm'),
    (r'gamma$', 'weight'),
    (r'beta$', 'bias'),
    (r'(kernel|scale)$', 'weight'),
    ('/', '.'),
)

def renamed(name, rules):
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name

def test_convnext_features_equal_the_release():
    arrays, description = np.load(REFERENCE / 'convnextv2.npz'), json.loads((REFERENCE / 'convnextv2.json').read_text())
    already_normalized = dict(mean = (0.5,) * 3, std = (0.5,) * 3)
    model = convnext(description['config']['dims'], description['config']['depths'], **already_normalized)
    state = {}

    for path, shape in description['params'].items():
        t = torch.from_numpy(by_the_rule(path, shape).astype(np.float32))
        if path.endswith('kernel'):
            t = rearrange(t, '... i o -> o i ...')
        state[renamed(path, CONVNEXT_NAMES)] = t

    model.model.load_state_dict(state)

    with torch.no_grad():
        features = model.features(nchw(arrays['x']))

    assert features.keys() == {key[4:] for key in arrays.files if key.startswith('act/')}

    for name, feature in features.items():
        assert feature.shape == tuple(arrays[f'shape/{name}']), name
        assert relative(digest(feature), arrays[f'act/{name}']) < 1e-5, name

def test_convnext_from_a_folder(tmp_path):
    encoder, x = convnext(), torch.randn(1, 3, 32, 32)
    encoder.model.save_pretrained(tmp_path)
    loaded = ConvNeXtFeatures.from_pretrained(tmp_path, image_size = 64)
    assert not loaded.training
    assert not loaded.model.training
    assert loaded.pixel_input.image_size == 64

    encoder.pixel_input.image_size = 64
    expected, found = encoder.features(x), loaded.features(x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

def test_convnext_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match = r'pip install "drifting-pytorch\[convnext\]"'):
        ConvNeXtFeatures.from_pretrained()

def test_convnext_stays_in_float32_under_autocast():
    """As in the release, whatever the precision of the rest."""
    encoder, x = convnext((8, 16, 16, 16), image_size = 64), torch.randn(2, 3, 32, 32).bfloat16()
    plain = encoder.features(x.float())

    with torch.autocast('cpu', dtype = torch.bfloat16):
        features = encoder.features(x.float())
        half = encoder.features(x)

    for name in plain:
        assert features[name].dtype == torch.float32, name
        assert torch.equal(features[name], half[name]), name
        assert relative(plain[name], features[name]) < 1e-6, name

# any backbone

def test_any_backbone(rng):
    seen = []

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 8, stride = 8)

        def forward(self, x):
            seen.append(x)
            maps = self.conv(x)
            prefix = x.new_zeros(len(x), 2, 6)
            return [maps, torch.cat((prefix, maps.flatten(2).mT), dim = 1)]

    settings = dict(image_size = 32, num_prefix_tokens = 2)
    encoder = BackboneFeatures(Backbone(), **settings)
    white = torch.ones(1, 3, 64, 64)
    features = encoder.features(white)

    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert seen[0].shape == (1, 3, 32, 32)
    assert relative(seen[0].mean(dim = (0, 2, 3)), expected) < 1e-6
    assert torch.equal(features['layer1'], features['layer2'])
    assert features['layer2_mean_4'].shape == (1, 1, 6)

    locations = BackboneFeatures(Backbone(), **settings, feature_sets = ('locations',))
    assert 'layer1_mean_2' not in locations.features(white)

    gen, pos = (torch.randn(2, n, 3, 16, 16, generator = rng) for n in (3, 4))
    loss, _ = FeatureDriftLoss([encoder, convnext(image_size = 64)])(gen.requires_grad_(), pos)
    loss.backward()
    assert gen.grad.isfinite().all()
    assert gen.grad.abs().sum() > 0

# features

def test_map_features_are_means_and_deviations(rng):
    x = torch.randn(2, 3, 8, 4, generator = rng, dtype = torch.float64)
    features = map_features('a', x)
    assert list(features) == ['a', 'a_mean_2', 'a_std_2', 'a_mean_4', 'a_std_4', 'a_mean', 'a_std']

    array = x.numpy()
    for i, (row, column) in enumerate(product(range(0, 8, 2), range(0, 4, 2))):
        patch = array[:, :, row:row + 2, column:column + 2].reshape(2, 3, 4)
        assert relative(features['a_mean_2'][:, i], patch.mean(axis = -1)) < 1e-9
        assert relative(features['a_std_2'][:, i], np.sqrt(patch.var(axis = -1) + 1e-6)) < 1e-9

    assert features['a_mean_4'].shape == (2, 2, 3)
    assert relative(features['a_mean'][:, 0], array.mean(axis = (2, 3))) < 1e-9
    assert torch.equal(features['a'][1, 5], x[1, :, 1, 1])
    assert list(map_features('a', x[..., :3])) == ['a', 'a_mean', 'a_std']               # 2 and 4 do not divide 3
    assert list(map_features('a', x, ('mean_std',))) == ['a_mean', 'a_std']

def plain_map_features(x, sets):
    """(A.5) as it is written, every patch from the map itself."""
    h, w = x.shape[-2:]
    features = {'a': rearrange(x, 'b d h w -> b (h w) d')} if 'locations' in sets else {}

    for feature_set, suffix, p1, p2 in (('mean_std', '', h, w), ('2x2', '_2', 2, 2), ('4x4', '_4', 4, 4)):
        if feature_set in sets and h % p1 == 0 and w % p2 == 0:
            patches = rearrange(x, 'b d (h p1) (w p2) -> b (h w) d (p1 p2)', p1 = p1, p2 = p2)
            features[f'a_mean{suffix}'] = patches.mean(dim = -1)
            features[f'a_std{suffix}'] = (patches.var(dim = -1, correction = 0) + 1e-6).sqrt()

    return features

@pytest.mark.parametrize('sets', [sets for n in range(1, 5) for sets in combinations(FEATURE_SETS, n)], ids = '+'.join)
@pytest.mark.parametrize('sides', [(8, 8), (12, 4), (6, 10), (7, 7), (4, 1), (16, 2)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_map_features_and_their_gradients_are_those_of_the_formula(sets, sides, memory_format, rng):
    x = torch.randn(2, 3, *sides, generator = rng, dtype = torch.float64) + 3
    x = x.contiguous(memory_format = memory_format).requires_grad_()
    features, expected = map_features('a', x, sets), plain_map_features(x, sets)
    assert features.keys() == expected.keys()

    for name, t in expected.items():
        assert torch.allclose(features[name], t, rtol = 1e-12, atol = 1e-14), name

    if expected:
        weights = {name: torch.randn(t.shape, generator = rng, dtype = t.dtype) for name, t in expected.items()}
        grads = [sum((t * weights[name]).sin().sum() for name, t in those.items()) for those in (features, expected)]
        grads = [torch.autograd.grad(loss, x, create_graph = True)[0] for loss in grads]
        assert torch.allclose(*grads, rtol = 1e-9, atol = 1e-12)

        second = [torch.autograd.grad(grad.square().sum(), x)[0] for grad in grads]         # as of a gradient penalty
        assert torch.allclose(*second, rtol = 1e-8, atol = 1e-10)

@pytest.mark.parametrize('sets', [('mean_std',), FEATURE_SETS])
def test_map_features_of_a_constant_map_keep_their_digits(sets):
    x = torch.full((1, 2, 224, 224), 2.64, requires_grad = True)
    features = map_features('a', x, sets)
    assert relative(features['a_std'], torch.full((1, 1, 2), 1e-3)) < 1e-5
    assert torch.autograd.grad(features['a_std'].sum(), x)[0].abs().max() < 1e-6

def test_feature_names_and_sets():
    x = torch.randn(2, 2, 32, 32)
    names = {name for name in tiny().features(x) if '_mean' not in name and '_std' not in name}
    assert names == {
        'norm_x', 'conv1', 'layer1_blk2', 'layer1', 'layer2', 'layer3_blk2', 'layer3',
        'layer4_blk2', 'layer4_blk4', 'layer4'
    }
    assert set(tiny(feature_sets = ('norm_x',)).features(x)) == {'norm_x'}
    expected = (x ** 2).mean(dim = (2, 3)).add(1e-6).sqrt()
    assert relative(tiny().features(x)['norm_x'][:, 0], expected) < 1e-6

def test_pixels_are_folded_into_channels():
    model = tiny(patch_size = 4, channels = 3)
    x = torch.arange(3 * 32 * 32.).view(1, 3, 32, 32)
    folded = model.fold(x)
    assert folded.shape == (1, 48, 8, 8)
    patch = x[0, :, 4:8, 8:12]
    assert torch.equal(folded[0, :, 1, 2], rearrange(patch, 'ch h w -> (h w ch)'))

# pretraining

def test_only_dropped_positions_count():
    model = tiny(patch_size = 2).eval()
    x = torch.randn(2, 2, 32, 32)
    mask = model.draw_mask(x, torch.Generator().manual_seed(0))
    assert mask.shape == (2, 8, 8)
    assert set(mask.flatten().tolist()) == {0., 1.}

    with torch.no_grad():
        loss, _ = model(x, mask = mask)
        picture, _ = model.reconstruct(x, mask)

        dropped = mask.repeat_interleave(4, dim = 1).repeat_interleave(4, dim = 2)[:, None]
        positions = mask.sum(dim = (1, 2)) * 4                          # of the folded map
        per_sample = ((picture - x) ** 2 * dropped).sum(dim = (1, 2, 3)) / positions
        assert relative(loss, per_sample.mean()) < 1e-5

        # what is dropped cannot be seen

        assert torch.equal(model.reconstruct(x + 5 * dropped, mask)[0], picture)
        assert model(x, mask = torch.zeros_like(mask))[0] == 0

def test_mask_ratio():
    model = tiny(mask_ratio = 0.75)
    mask = model.draw_mask(torch.zeros(64, 2, 64, 64))
    assert abs(mask.mean().item() - 0.75) < 0.01

def test_checkpointing_changes_nothing():
    x, labels = torch.randn(2, 2, 16, 16), torch.tensor([0, 4])
    gradients = []

    for checkpointing in (False, True):
        model = tiny(checkpointing = checkpointing)
        mask = model.draw_mask(x, torch.Generator().manual_seed(0))
        model(x, labels, cls_weight = 0.5, mask = mask)[0].backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append(flat_gradients(model))

    assert relative(*gradients) < 1e-5

def test_narrow_encoders_do_not_crash():
    """Where a cpu has no AVX512, oneDNN's gradient of strided 1x1 convolutions of few channels corrupts memory."""
    script = '''
import torch
from drifting_pytorch import LatentMAE
model = LatentMAE(dim = 4, channels = 1, layers = (1, 1, 1, 1), num_classes = None)
for _ in range(20):
    model(torch.randn(2, 1, 16, 16))[0].backward()
'''
    run(sys.executable, '-c', script, env = {**os.environ, 'ONEDNN_MAX_CPU_ISA': 'AVX2'})

def test_half_precision_features_are_computed_as_they_come():
    model = tiny()
    gen, pos = torch.randn(2, 2, 3, 2, 16, 16)

    with torch.autocast('cpu', dtype = torch.bfloat16):
        features = model.features(torch.randn(2, 2, 16, 16))
        loss, breakdown = FeatureDriftLoss(model)(gen, pos)

    assert loss.isfinite()
    assert all(stats.scale.dtype == torch.float32 for stats in breakdown.stats.values())
    assert features['layer4_std'].dtype == torch.float32

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_floating_samples_are_cast_to_the_model_s_dtype(dtype):
    x = torch.randn(2, 2, 16, 16).to(dtype)
    images = torch.randn(1, 3, 16, 16).to(dtype)
    backbone = nn.Conv2d(3, 4, 4, stride = 4)
    encoders = (tiny(), x), (BackboneFeatures(backbone, image_size = 16), images), (convnext(image_size = 32), images)

    for encoder, samples in encoders:
        found, expected = encoder.features(samples), encoder.features(samples.float())
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    found = encoders[1][0].double().features(images)
    assert found['layer1'].dtype == torch.float64

    model, labels = tiny(), torch.tensor([0, 4])
    mask = model.draw_mask(x.float(), torch.Generator().manual_seed(0))
    expected = model(x.float(), labels, cls_weight = 0.5, mask = mask)[0]

    for same in (mask, mask.bool(), mask.double(), mask.long()):
        loss, _ = model(x, labels.tolist(), cls_weight = 0.5, mask = same)
        assert torch.equal(loss, expected)
        assert loss.dtype == torch.float32

# encoders in the loss

def test_several_encoders_and_a_decoder(rng):
    calls = []

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose2d(1, 2, 8, 8)

        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return self.conv(x)

    def pooled(x):
        return dict(pooled = x.mean(dim = (2, 3))[:, None])

    decoder, encoder = Decoder(), tiny(feature_sets = ('mean_std',))
    loss_fn = FeatureDriftLoss([encoder, pooled], decoder = decoder)
    gen, pos = (torch.randn(2, n, 1, 2, 2, generator = rng) for n in (4, 5))

    loss, breakdown = loss_fn(gen.requires_grad_(), pos)
    loss.backward()

    assert {'global', 'pooled', 'layer4_mean'} <= breakdown.losses.keys()
    assert breakdown.stats['global'].scale < 10
    assert gen.grad.abs().sum() > 0
    assert calls == [True, False]
    for p in (*decoder.parameters(), *encoder.parameters()):
        assert not p.requires_grad
        assert p.grad is None
    assert not loss_fn.train().frozen[0].training

    points = [pooled(decoder(t.flatten(0, 1)))['pooled'].view(2, -1, 2) for t in (gen, pos)]
    expected, _ = drift_loss(*points)
    assert relative(breakdown.losses['pooled'], expected.mean()) < 1e-5

X = torch.zeros(2, 2, 16, 16)
RGB = torch.zeros(2, 3, 16, 16)

def unchanged(x):
    return dict(a = x)

def features_of(output, **kwargs):
    return BackboneFeatures(lambda x: output, **kwargs).features(RGB)

def with_backbone(**kwargs):
    return BackboneFeatures(lambda x: x, **kwargs)

@pytest.mark.parametrize('call, says', [
    (
        lambda: tiny().features(X[:, :1]),
        'x has shape (2, 1, 16, 16), expected (batch, 2, height, width)'
    ),
    (lambda: tiny().features(X[..., :12]), 'expected sides that are multiples of 8'),
    (lambda: tiny()(X[0]), 'x has shape (2, 16, 16), expected (batch, 2, height, width)'),
    (lambda: tiny()(X[0], mask = torch.ones(2, 8, 8)), 'x has shape (2, 16, 16), expected (batch, 2, height, width)'),
    (lambda: tiny()(X, mask = torch.ones(2, 4, 4)), 'mask has shape (2, 4, 4), expected (2, 8, 8)'),
    (lambda: tiny()(X, mask = torch.full((2, 8, 8), 5.)), 'mask must be finite and in 0 .. 1, got 5.0 .. 5.0'),
    (lambda: tiny()(X, cls_weight = 0.1), 'needs labels'),
    (lambda: tiny()(X, torch.tensor([0, 5]), cls_weight = 0.1), 'labels must be finite and in 0 .. 4'),
    (lambda: tiny()(X, torch.tensor([0, 1]), cls_weight = 2.), 'cls_weight must be a number in 0 .. 1, got 2.0'),
    (lambda: tiny(num_classes = None)(X, torch.tensor([0, 1])), 'labels need a classifier'),
    (lambda: tiny(dim = 0), 'dim must be a whole number from 1 on, got 0'),
    (lambda: tiny(dim = None), 'dim must be a whole number from 1 on, got None'),
    (lambda: tiny(dim = 8.), 'dim must be a whole number from 1 on, got 8.0'),
    (lambda: tiny(channels = -1), 'channels must be a whole number'),
    (lambda: tiny(patch_size = 0), 'patch_size must be a whole number'),
    (lambda: tiny(mask_patch_size = 0), 'mask_patch_size must be a whole number'),
    (lambda: tiny(mask_patch_size = '2'), "mask_patch_size must be a whole number from 1 on, got '2'"),
    (lambda: tiny(num_classes = 0), 'num_classes must be a whole number'),
    (lambda: tiny(num_classes = True), 'num_classes must be a whole number'),
    (lambda: tiny(layers = (1, 1)), 'layers must be'),
    (lambda: tiny(layers = 4), 'layers must be four numbers of blocks from 1 on, got 4'),
    (lambda: tiny(layers = (1, 1, 0, 1)), 'layers must be four numbers of blocks from 1 on, got (1, 1, 0, 1)'),
    (lambda: tiny(layers = (1, 1.5, 1, 1)), 'layers must be four numbers of blocks from 1 on'),
    (lambda: tiny(mask_ratio = 1.5), 'mask_ratio must be'),
    (lambda: tiny(feature_sets = {'locations'}), 'feature_sets must be among'),     # json keeps no sets
    (lambda: tiny(layers = (np.int64(1), 1, 1, 1)), 'layers must be four numbers of blocks'),
    (lambda: tiny(feature_sets = ('8x8',)), 'feature_sets must be among'),
    (lambda: with_backbone(feature_sets = ('8x8',)), "must be among ('locations', 'mean_std', '2x2', '4x4'), got"),
    (lambda: with_backbone(feature_sets = ('norm_x',)), 'feature_sets must be among'),
    (lambda: with_backbone(feature_sets = '2x2'), "got '2x2'"),
    (lambda: with_backbone(num_prefix_tokens = -1), 'num_prefix_tokens must be a whole number from 0 on, got -1'),
    (lambda: with_backbone(num_prefix_tokens = 1.5), 'num_prefix_tokens must be a whole number'),
    (lambda: with_backbone(image_size = 0), 'image_size must be a whole number from 1 on, got 0'),
    (lambda: with_backbone(image_size = (32, 32)), 'image_size must be a whole number'),
    (lambda: with_backbone(std = (0.2, 0., 0.2)), 'std must be finite and in 1e-06 .. inf, got 0.0 .. 0.2'),
    (lambda: with_backbone(mean = (0.5, float('nan'), 0.5)), 'mean must be finite'),
    (lambda: with_backbone(std = (0.2, 0.2)), 'mean has 3 channels, std has 2'),
    (lambda: with_backbone(mean = 0.5), 'mean has shape ()'),
    (lambda: with_backbone(mean = (0.5, 'a', 0.5)), 'mean must be numbers'),
    (
        lambda: convnext().features(X),
        'expected (batch, 3, height, width), images in [-1, 1]'
    ),
    (
        lambda: BackboneFeatures(lambda x: torch.zeros(2, 5, 3)).features(RGB),
        '5 tokens of patches, expected a square number'
    ),
    (lambda: features_of(torch.zeros(2, 5)), 'layer1 has shape (2, 5)'),
    (lambda: features_of(torch.tensor(1.)), 'layer1 has shape ()'),
    (lambda: features_of(None), 'layer1 must be a tensor, got NoneType'),
    (lambda: features_of(1.), 'layer1 must be a tensor, got float'),
    (lambda: features_of([[1.], [2.]]), 'layer1 must be a tensor, got list'),
    (lambda: features_of(dict(a = None)), 'a must be a tensor, got NoneType'),
    (lambda: features_of(torch.zeros(2, 5, 3), num_prefix_tokens = 5), '0 tokens of patches, expected a square number'),
    (lambda: tiny().features(X.numpy()), 'x must be a tensor, got ndarray'),
    (lambda: tiny()(X.tolist()), 'x must be a tensor, got list'),
    (lambda: tiny().features(X.byte()), 'x must be floating point, got torch.uint8: convert it to float in [-1, 1]'),
    (lambda: tiny()(X.long()), 'x must be floating point, got torch.int64'),
    (lambda: tiny().draw_mask(X.int()), 'x must be floating point, got torch.int32'),
    (lambda: with_backbone().features(RGB.byte()), 'x must be floating point, got torch.uint8'),
    (lambda: with_backbone().features(RGB.tolist()), 'x must be a tensor, got list'),
    (lambda: convnext().features(RGB.numpy()), 'x must be a tensor, got ndarray'),
    (lambda: convnext().features(RGB.bool()), 'x must be floating point, got torch.bool'),
    (lambda: tiny()(X, 'ab', cls_weight = 0.1), "labels must be numbers or a tensor of them, got 'ab'"),
    (lambda: tiny()(X, torch.ones(2), cls_weight = 0.1), 'labels must be integers, got torch.float32'),
    (lambda: tiny()(X, [1., 0.]), 'labels must be integers, got torch.float32'),
    (lambda: tiny()(X, 1), 'labels has shape (), expected (2,)'),
    (lambda: tiny()(X, mask = np.ones((2, 8, 8))), 'mask must be a tensor, got ndarray'),
    (lambda: tiny().reconstruct(X, [[1]]), 'mask must be a tensor, got list'),
    (lambda: FeatureDriftLoss([unchanged, unchanged])(X[None], X[None]), "features of the same name: ['a']"),
    (lambda: FeatureDriftLoss(lambda x: x)(X[None], X[None]), 'an encoder must return a dict'),
    (lambda: FeatureDriftLoss([None]), 'encoder and decoder must be callable'),
])
def test_bad_input_is_one_clear_line(call, says):
    with raises_one_line(says):
        call()
