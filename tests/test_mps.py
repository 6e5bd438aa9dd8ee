"""Apple's GPUs: that PyTorch has kernels there for every operation of a training, by its own list. None runs here."""

from functools import partial
from importlib.resources import files
from traceback import extract_stack

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from drifting_pytorch import (
    BackboneFeatures,
    ConvGenerator,
    DriftField,
    DriftingGenerator,
    FeatureDriftLoss,
    GradientField,
    LatentMAE,
    MAETrainer,
    SharpField,
    SinkhornField,
    drift_loss,
    drifting,
)
from helpers import trainer

FALLS_BACK = ['_upsample_bilinear2d_aa_backward']       # of images that an encoder resizes: see Troubleshooting
OTHERWISE_THERE = '_scaled_dot_product_flash_attention_for_cpu', 'profiler::'

@pytest.fixture(scope = 'module')
def kernels():
    """{operation: whether it has a kernel on mps, or is made of others}."""
    path = files('torchgen') / 'packaged' / 'ATen' / 'native' / 'native_functions.yaml'
    entries = yaml.load(path.read_text(), Loader = getattr(yaml, 'CLoader', yaml.Loader))
    by_name = {entry['func'].split('(')[0]: entry for entry in entries}

    def is_there(entry):
        entry = by_name[entry['structured_delegate']] if 'structured_delegate' in entry else entry
        return 'dispatch' not in entry or any('MPS' in key or 'Composite' in key for key in entry['dispatch'])

    found = {name: is_there(entry) for name, entry in by_name.items()}
    if not found['native_group_norm_backward']:
        pytest.skip('a version of PyTorch that has fewer kernels')
    return found

class Operations(TorchDispatchMode):
    """Their names, and where the library has numbers that mps does not know."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, func, types, args = (), kwargs = None):
        self.names.add(func.name().removeprefix('aten::').removesuffix('.default'))
        result = func(*args, **(kwargs or {}))
        found = tree_leaves((args, kwargs, result))
        if any(torch.is_tensor(t) and t.dtype in (torch.float64, torch.complex128) for t in found):
            frames = [frame for frame in extract_stack() if frame.filename == drifting.__file__]
            self.doubles.update(f'{frame.lineno}: {frame.line}' for frame in frames[-1:])
        return result

SIZES = dict(image_size = 8, channels = 1, dim = 16, output_conv_dim = 4)
PATCHES = dict(patch_size = 4, depth = 1, heads = 2, outer_slope = 0.1)

def pictures(num = 64, size = 8):
    return TensorDataset(torch.randn(num, 1, size, size).tanh(), torch.arange(num) % 3)

def with_conditions():
    model = DriftingGenerator(**SIZES, **PATCHES, dim_condition = 2, condition_channels = 1, checkpointing = True)
    rows = [(x, dict(vector = torch.randn(2), image = torch.randn(1, 4, 4))) for x, _ in pictures()]
    return dict(model = model, data = rows, num_pos = 1)

def of_field(field):
    model = ConvGenerator(**SIZES, num_classes = 3, noise_channels = 1)
    return dict(model = model, loss_fn = FeatureDriftLoss(field = field), data = pictures(), ema_decay = (0.9, 0.99))

def of_encoder(encoder):
    model = DriftingGenerator(**SIZES, **PATCHES, num_classes = 3)
    return dict(model = model, loss_fn = FeatureDriftLoss(encoder), data = pictures(), group_chunk_size = 1)

def of_mae():
    return of_encoder(LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 2), num_classes = None))

def of_backbone():
    encoder = BackboneFeatures(torch.nn.Conv2d(3, 8, 4, 4), image_size = 16)
    return of_encoder(lambda x: encoder.features(x.expand(-1, 3, -1, -1)))

FIELDS = DriftField(), DriftField(kernel = 'gaussian', normalize = 'y'), GradientField(), SharpField(), SinkhornField()

@pytest.mark.parametrize('make, falls_back', [
    *((partial(of_field, field), []) for field in FIELDS),
    (with_conditions, []),
    (of_mae, []),
    (of_backbone, FALLS_BACK),
])
def test_a_training_has_kernels(make, falls_back, kernels, tmp_path):
    with Operations() as found:
        trainer(tmp_path, **make(), num_train_steps = 2, log_every = 1).train()
    check(found, falls_back, kernels)

def test_pretraining_has_kernels(kernels, tmp_path):
    with Operations() as found:
        model = LatentMAE(dim = 8, channels = 1, layers = (1, 1, 1, 2), num_classes = 3)
        settings = dict(batch_size = 8, num_train_steps = 2, finetune_steps = 1, progress_bar = False)
        MAETrainer(model, pictures(size = 16), results_folder = tmp_path, **settings).train()
    check(found, [], kernels)

def test_large_problems_have_kernels(kernels):
    with Operations() as found:
        gen = torch.randn(2, 64, 2000, requires_grad = True)
        pos, uncond = torch.randn(2, 64, 2000), torch.randn(2, 16, 2000)
        drift_loss(gen, pos, uncond, uncond_weight = torch.ones(2, 16))[0].mean().backward()
        DriftField()(torch.randn(5, 2), torch.randn(6, 2), temperature = 0.5)
    check(found, [], kernels)

def check(found, falls_back, kernels):
    names = {name for name in found.names if not name.startswith(OTHERWISE_THERE)}
    assert len(names) > 20 and names <= kernels.keys()
    assert {name for name in names if not kernels[name]} <= set(falls_back)
    assert not found.doubles
