"""The ImageNet scripts end to end, on generated images with tiny models of random weights."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from drifting_pytorch import DriftingGenerator, ImageFolder, LatentMAE
from helpers import ROOT

sys.path.insert(0, str(ROOT / 'examples' / 'imagenet'))

import encode_latents
import train_generator
import train_mae
from common import load_vae, process_state, write_whole
from data import ClassFolders, LatentDataset, random_crop_box

CLASSES = ('n01', 'n02', 'n03')

def paint(root, classes = CLASSES, num = 12):
    """A folder of class folders: a disc on noise, its colour tells the class; a few sizes, modes and formats."""
    rng = np.random.default_rng(0)

    for label, name in enumerate(classes):
        (root / name).mkdir(parents = True)

        for i in range(num):
            h, w = rng.integers(64, 140, 2)
            pixels = rng.integers(0, 80, (h, w, 3), dtype = np.uint8)
            rows, cols = np.mgrid[:h, :w]
            pixels[(rows - h / 2) ** 2 + (cols - w / 3) ** 2 < 400, label] = 255
            picture = Image.fromarray(pixels)
            ending = 'png' if i == 5 else 'JPEG'

            if i == 3:
                picture = picture.convert('L')

            picture.save(root / name / f'{i:02d}.{ending}')

    return root

@pytest.fixture(scope = 'module')
def images(tmp_path_factory):
    return paint(tmp_path_factory.mktemp('imagenet') / 'train')

@pytest.fixture(scope = 'module')
def vae(tmp_path_factory):
    diffusers = pytest.importorskip('diffusers')
    folder = tmp_path_factory.mktemp('vae')
    torch.manual_seed(0)

    vae = diffusers.AutoencoderKL(
        block_out_channels = (4, 4, 4, 4),
        down_block_types = ('DownEncoderBlock2D',) * 4,
        up_block_types = ('UpDecoderBlock2D',) * 4,
        norm_num_groups = 2,
        layers_per_block = 1
    )

    vae.save_pretrained(folder)
    return folder

def called(main, *args):
    return main([*map(str, args)])

def encode(images, latents, vae, *args):
    sizes = ('--image-size', 64, '--shard-size', 10, '--batch-size', 4, '--num-workers', 0)
    called(encode_latents.main, images, latents, '--vae', vae, *sizes, '--cpu', *args)
    return latents

def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

@pytest.fixture(scope = 'module')
def latents(images, vae, tmp_path_factory):
    return encode(images, tmp_path_factory.mktemp('latents'), vae)

# images

def test_center_crop_is_that_of_adm(images):
    def center_crop(picture, size):
        return ImageFolder(images, size).cut(picture)

    pixels = np.random.default_rng(0).integers(0, 256, (64, 70, 3), dtype = np.uint8)
    cropped = pixels[:, 3:67]
    assert (np.array(center_crop(Image.fromarray(pixels), 64)) == cropped).all()

    blocks = pixels.repeat(4, axis = 0).repeat(4, axis = 1)         # twice halved by the box filter, no rounding
    assert (np.array(center_crop(Image.fromarray(blocks), 64)) == cropped).all()

    for size in (50, 100):
        assert center_crop(Image.fromarray(pixels), size).size == (size, size)

def test_random_crop_box_is_inside_and_of_the_asked_area():
    boxes = np.array([random_crop_box(160, 100) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    area, aspect = (right - left) * (bottom - top) / 16_000, (right - left) / (bottom - top)

    assert (boxes >= 0).all() and right.max() <= 160 and bottom.max() <= 100 and right.max() - left.min() == 160
    assert 0.19 < area.min() < 0.22 and 0.75 < area.max() <= 1
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.38
    assert random_crop_box(1000, 10) == (495, 0, 505, 10)                   # nothing fits

def both_ways_round(drawn, image):
    """Some are the image, the others its mirror image."""
    same = [torch.equal(x, image) for x in drawn]
    mirrored = [torch.equal(x.flip(-1), image) for x in drawn]
    return set(same) == {True, False} and all(a or b for a, b in zip(same, mirrored, strict = True))

def test_class_folders(images, tmp_path):
    dataset = ClassFolders(images, 64)
    assert dataset.classes == list(CLASSES) and len(dataset) == 36
    assert [dataset[i][1] for i in (0, 11, 12, 35)] == [0, 0, 1, 2]

    image = dataset[0][0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert -1 <= image.min() < -0.8 and image.max() > 0.9
    assert torch.equal(*dataset[3][0][:2])                                  # the grey one

    torch.manual_seed(0)
    assert both_ways_round([ClassFolders(images, 64, 'flip')[0][0] for _ in range(20)], image)
    assert ClassFolders(images, 64, 'crop')[0][0].shape == (3, 64, 64)

    refused = {
        tmp_path / 'none': 'not a folder',
        tmp_path: 'has no images',
        images / CLASSES[0]: 'no class folders'
    }

    for root, message in refused.items():
        with pytest.raises(ValueError, match = message):
            ClassFolders(root)

    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match = 'empty has no images'):
        ClassFolders(tmp_path)
    with pytest.raises(ValueError, match = "got 'mirror'"):
        ClassFolders(images, 64, 'mirror')

def test_image_folder_with_and_without_classes(images, tmp_path):
    with_classes, without = ImageFolder(images, 32), ImageFolder(images / CLASSES[1], 32, channels = 1, flip = True)
    assert with_classes.num_classes == 3 and without.num_classes is None and len(without) == 12
    assert with_classes[12][0].shape == (3, 32, 32) and {without[i][1] for i in range(12)} == {0}

    picture = np.array(without.cut(Image.open(without.root / without.files[0][0]).convert('L')))
    grey = torch.from_numpy(picture).float()[None] / 127.5 - 1
    assert both_ways_round([without[0][0] for _ in range(20)], grey)

    (tmp_path / 'class').mkdir()
    for path in (tmp_path / 'class' / 'a.png', tmp_path / 'class' / '._a.png', tmp_path / 'b.png'):
        Image.new('RGB', (8, 8)).save(path)
    with pytest.raises(ValueError, match = 'both class folders and images'):
        ImageFolder(tmp_path, 8)

    (tmp_path / 'b.png').unlink()
    assert len(ImageFolder(tmp_path, 8)) == 1
    (tmp_path / 'class' / 'c.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match = r'c\.png cannot be read as an image'):
        ImageFolder(tmp_path, 8)[1]
    Image.fromarray(np.full((8, 8), 40_000, dtype = np.uint16)).save(tmp_path / 'class' / 'd.png')

    deep = r'd\.png cannot be read as an image \(its mode is I;16, convert it to 8 bits\)'
    with pytest.raises(ValueError, match = deep):
        ImageFolder(tmp_path, 8)[2]
    with pytest.raises(ValueError, match = 'channels must be 1 or 3, got 4'):
        ImageFolder(tmp_path, 8, channels = 4)

# latents

def test_encoding_is_the_vae_s(images, vae, latents):
    manifest = json.loads((latents / 'manifest.json').read_text())
    assert manifest['classes'] == list(CLASSES) and manifest['counts'] == [12, 12, 12] and manifest['images'] == 36
    assert manifest['shape'] == [4, 8, 8] and manifest['scaling_factor'] == 0.18215
    assert manifest['dtype'] == 'float16' and manifest['vae'] == str(vae)
    assert [shard['images'] for shard in manifest['shards']] == [10, 10, 10, 6]
    assert sorted(files(latents)) == ['manifest.json', *(f'shard-{i:05d}.npy' for i in range(4))]

    image, shard = ClassFolders(images, 64)[13][0], np.load(latents / 'shard-00001.npy')
    assert shard.dtype == np.float16 and shard.shape == (10, 2, 2, 4, 8, 8)

    for flip, pixels in enumerate((image, image.flip(-1))):
        with torch.no_grad():
            posterior = load_vae(str(vae)).encode(pixels[None]).latent_dist

        mean, std = shard[3, flip]
        assert np.allclose(mean, posterior.mean[0], atol = 2e-3)
        assert np.allclose(std, posterior.std[0], rtol = 2e-3)

def test_latents_are_fresh_samples_of_the_posterior(latents):
    dataset = LatentDataset(latents, 'center')
    assert len(dataset) == 36 and [dataset[i][1] for i in (0, 11, 12, 35)] == [0, 0, 1, 2]

    last = torch.from_numpy(np.load(latents / 'shard-00003.npy')[5].astype(np.float32)) * 0.18215
    (mean, std), (flipped, _) = last
    draws = torch.stack([dataset[35][0] for _ in range(4000)])
    assert draws.shape == (4000, 4, 8, 8) and draws.dtype == torch.float32
    assert ((draws.mean(dim = 0) - mean).abs() < 5 * std / 4000 ** 0.5).all()
    assert torch.allclose(draws.std(dim = 0), std, rtol = 0.08)

    torch.manual_seed(1)
    a = dataset[20][0]
    torch.manual_seed(1)
    assert torch.equal(dataset[20][0], a) and not torch.equal(dataset[20][0], a)

    with_flips = torch.stack([LatentDataset(latents, 'flip')[35][0] for _ in range(400)]).mean(dim = 0)
    assert (with_flips - (mean + flipped) / 2).abs().mean() < (with_flips - mean).abs().mean()

    crops = [LatentDataset(latents, 'crop')[35][0] for _ in range(20)]
    assert all(crop.shape == (4, 8, 8) and crop.isfinite().all() for crop in crops)

def test_interrupted_encoding_goes_on(images, vae, latents, tmp_path, monkeypatch):
    whole = encode_latents.posterior_moments
    calls = []

    def interrupted(*args):
        calls.append(0)

        if len(calls) == 6:                                 # in the middle of the second shard
            raise KeyboardInterrupt

        return whole(*args)

    monkeypatch.setattr(encode_latents, 'posterior_moments', interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(images, tmp_path, vae)

    assert sorted(files(tmp_path)) == ['manifest.json', 'shard-00000.npy']
    with pytest.raises(ValueError, match = 'has not finished'):
        LatentDataset(tmp_path)

    encode(images, tmp_path, vae)
    assert len(calls) == 6 + 8                              # 3 shards of 3, 3 and 2 batches, the first was there
    assert files(tmp_path) == files(latents)

    # a shard that is lost or cut short is named, and written again

    shard = tmp_path / 'shard-00002.npy'
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match = 'shard-00002.npy is not a whole shard'):
        LatentDataset(tmp_path)

    shard.unlink()
    with pytest.raises(ValueError, match = 'shard-00002.npy is missing'):
        LatentDataset(tmp_path)

    encode(images, tmp_path, vae)
    assert shard.read_bytes() == (latents / shard.name).read_bytes()

    with pytest.raises(ValueError, match = 'another dtype'):
        encode(images, tmp_path, vae, '--dtype', 'float32')
    with pytest.raises(ValueError, match = 'no manifest.json'):
        LatentDataset(tmp_path / 'elsewhere')

def test_processes_share_the_shards(images, vae, latents, tmp_path, monkeypatch):
    for rank in (1, 0):
        state = SimpleNamespace(process_index = rank, num_processes = 2, is_main_process = rank == 0, device = 'cpu')
        monkeypatch.setattr(encode_latents, 'process_state', lambda cpu, state = state: state)
        encode(images, tmp_path, vae)
        assert (tmp_path / 'shard-00000.npy').exists() == (rank == 0)       # it ends last, so it completes the manifest

    assert files(tmp_path) == files(latents)

def test_processes_without_gpus_belong_together(monkeypatch):
    """accelerate would take each for a world of its own."""
    asked = []
    monkeypatch.setattr('common.PartialState', lambda cpu: asked.append(cpu))
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    monkeypatch.delenv('WORLD_SIZE', raising = False)
    process_state(False)
    monkeypatch.setenv('WORLD_SIZE', '2')
    process_state(False)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    process_state(False)
    process_state(True)
    assert asked == [False, True, False, True]

def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / 'file'
    write_whole(path, b'before')

    def fails(file):
        file.write(b'half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)

    assert path.read_bytes() == b'before' and [*tmp_path.iterdir()] == [path]
    write_whole(path, lambda file: np.save(file, np.arange(3)))
    assert np.load(path).tolist() == [0, 1, 2]

def test_latents_that_an_encoder_cannot_halve_are_not_made(images, tmp_path, vae):
    with pytest.raises(ValueError, match = '--image-size must be a multiple of 64, got 72'):
        encode(images, tmp_path, vae, '--image-size', 72)

@pytest.mark.parametrize('preset, published', [('ablation', 1024), ('L/2', 2048), ('B/16', 4096)])
def test_processes_read_as_much_as_the_published_runs(preset, published, monkeypatch):
    args = ['data', '--encoder', 'mae', '--preset', preset]

    for world in (1, 8, 3):
        monkeypatch.setenv('WORLD_SIZE', str(world))
        assert 0 <= train_generator.options(args).push_size * world - published < world

    monkeypatch.setenv('WORLD_SIZE', '2')
    assert train_generator.options([*args, '--gradient-accumulation-steps', '4']).push_size == published / 8
    assert train_generator.options([*args, '--push-size', '5']).push_size == 5

def test_unreadable_images_are_named_or_left_out(vae, tmp_path):
    root, folder = paint(tmp_path / 'images', CLASSES[:2], 6), tmp_path / 'latents'
    (root / 'n01' / '02.JPEG').write_bytes(b'no picture')
    half = root / 'n02' / '04.JPEG'
    half.write_bytes(half.read_bytes()[:300])

    named = re.escape(str(root / 'n01' / '02.JPEG'))
    with pytest.raises(ValueError, match = f'{named} cannot be read.*--skip-unreadable'):
        encode(root, folder, vae)

    encode(root, folder, vae, '--skip-unreadable')
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert manifest['unreadable'] == ['n01/02.JPEG', 'n02/04.JPEG'] and manifest['counts'] == [5, 5]
    assert (folder / 'shard-00000.unreadable.txt').read_text() == 'n01/02.JPEG'

    dataset = LatentDataset(folder)
    assert [label for _, label in (dataset[i] for i in range(10))] == [0] * 5 + [1] * 5

def test_vae_that_is_not_there(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    with pytest.raises(ImportError, match = r'drifting-pytorch\[imagenet\]'):
        encode(images, tmp_path, 'somewhere')

# trainings

RUN = ('--num-workers', 0, '--seed', 3, '--image-size', 64, '--cpu')

def pretrain(data, folder, space, *args):
    called(
        train_mae.main, data, '--space', space, '--results-folder', folder,
        '--dim', 8, '--layers', 1, 1, 2, 1, '--steps', 3, '--batch-size', 8, '--lr-warmup-steps', 2,
        '--finetune-steps', 2, '--cls-warmup-steps', 1, '--sample-every', 3, '--save-every', 2, *RUN, *args
    )
    return folder / 'encoder'

def generate(data, folder, preset, encoder, *args):
    called(
        train_generator.main, data, '--preset', preset, '--encoder', encoder, '--results-folder', folder,
        '--dim', 16, '--depth', 1, '--heads', 2, '--num-groups', 3, '--num-gen', 4, '--num-pos', 4,
        '--num-uncond', 4, '--push-size', 6, '--lr-warmup-steps', 1, '--sample-every', 0, '--save-every', 2,
        *RUN, *args
    )
    return load_file(folder / 'generator' / 'model.safetensors')

@pytest.mark.parametrize('space, preset', [('latent', 'ablation'), ('pixel', 'B/16')])
def test_training_from_encoder_to_generator(request, images, tmp_path, space, preset):
    data = request.getfixturevalue('latents') if space == 'latent' else images
    encoder = pretrain(data, tmp_path / 'mae', space)

    mae = LatentMAE.from_pretrained(encoder)
    assert mae.channels == dict(latent = 4, pixel = 3)[space] and mae.num_classes == 3
    rows = [json.loads(line) for line in (tmp_path / 'mae' / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['step'] == 3 and rows[-1]['cls_weight'] == pytest.approx(0.1) and rows[-1]['classification'] > 0
    picture = Image.open(tmp_path / 'mae' / 'samples' / 'step-00000003.png')
    assert picture.size == (66 * 10, 66 * 3)                # decoded, for latents

    extra = ('--group-chunk-size', '1')

    if space == 'pixel':
        transformers = pytest.importorskip('transformers')
        config = transformers.ConvNextV2Config(hidden_sizes = [4, 4, 4, 8], depths = [1, 1, 1, 1])
        transformers.ConvNextV2Model(config).save_pretrained(tmp_path / 'convnext')
        extra += ('--convnext', tmp_path / 'convnext')

    # resumed in the middle it ends where the straight run ends

    straight = generate(data, tmp_path / 'straight', preset, encoder, *extra, '--steps', '4', '--sample-every', '4')
    generate(data, tmp_path / 'resumed', preset, encoder, *extra, '--steps', '2')
    resumed = generate(data, tmp_path / 'resumed', preset, encoder, *extra, '--steps', '4', '--resume', 'latest')
    assert all(torch.equal(t, resumed[name]) for name, t in straight.items())

    rows = [json.loads(line) for line in (tmp_path / 'straight' / 'metrics.jsonl').read_text().splitlines()]
    features = {name.split('/')[1] for name in rows[-1] if name.startswith('feature/')}
    assert {'global', 'layer4_mean', 'norm_x'} <= features
    assert ('convenxt_stage_3_mean' in features) == (space == 'pixel')
    picture = Image.open(tmp_path / 'straight' / 'samples' / 'step-00000004.png')
    assert picture.size == (66 * 10, 66 * 3)                # a row per class

    model = DriftingGenerator.from_pretrained(tmp_path / 'straight' / 'generator')
    shape = (4, 8, 8) if space == 'latent' else (3, 64, 64)
    assert model.sample([0, 2], seed = 0).shape == (2, *shape)

    if space == 'latent':
        LatentMAE(dim = 8, channels = 3, patch_size = 8, layers = (1, 1, 1, 1)).save_pretrained(tmp_path / 'of-pixels')
        with pytest.raises(ValueError, match = 'reads samples of 3 channels, those of the preset ablation have 4'):
            generate(data, tmp_path / 'other', preset, tmp_path / 'of-pixels')

@pytest.mark.parametrize('space, features', [('latent', 'inception'), ('pixel', 'encoder')])
def test_the_best_evaluation_is_exported(request, monkeypatch, images, tmp_path, space, features):
    data, channels = (request.getfixturevalue('latents'), 4) if space == 'latent' else (images, 3)
    encoder, seen = tmp_path / 'encoder', []
    sizes = dict(channels = channels, patch_size = dict(latent = 1, pixel = 8)[space])
    LatentMAE(dim = 8, layers = (1, 1, 1, 1), **sizes).save_pretrained(encoder)

    def looks(images):
        seen.append(images)
        return images.mean(dim = (2, 3))

    monkeypatch.setattr(train_generator, 'inception_features', lambda weights: looks)
    found = generate(
        data, tmp_path / 'run', dict(latent = 'ablation', pixel = 'B/16')[space], encoder, '--steps', '2',
        '--evaluate-every', '1', '--evaluate-samples', '12', '--evaluate-features', features,
        '--keep-best', 'max:frechet', '--ema-decay', '0.5', '0.9'
    )

    assert all(x.shape == (12, 3, 64, 64) for x in seen)    # decoded
    assert len(seen) == (1 + 2 * 2 if features == 'inception' else 0)
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    values = {(row['step'], decay): row[f'eval/frechet/{decay}'] for row in rows for decay in (0.5, 0.9)}
    best, = (tmp_path / 'run' / 'checkpoints').glob('best-*')
    manifest = json.loads((best / 'manifest.json').read_text())['best']
    step, decay = max(values, key = values.get)             # of all, so not always the last one
    assert manifest == dict(value = pytest.approx(values[step, decay]), step = step, ema_decay = decay)
    averages = load_file(best / 'averages.safetensors')
    first = load_file(best / 'ema.safetensors')
    expected = first if decay == 0.5 else {name: averages[f'{name}.0'] for name in first}
    assert all(torch.equal(t, expected[name]) for name, t in found.items())

@pytest.mark.parametrize('space, preset, default', [('latent', 'B/2', 'flip'), ('pixel', 'B/16', 'crop')])
def test_real_samples_are_augmented_as_in_the_release(request, monkeypatch, tmp_path, space, preset, default):
    class Read(Exception):
        pass

    def until_read(*args):
        raise Read(load_dataset(*args)[0].augment)

    load_dataset = train_generator.load_dataset
    monkeypatch.setattr(train_generator, 'load_dataset', until_read)
    data = request.getfixturevalue('latents') if space == 'latent' else request.getfixturevalue('images')

    for args, expected in (((), default), (('--augment', 'center'), 'center'), (('--augment', 'flip'), 'flip')):
        with pytest.raises(Read, match = expected):
            generate(data, tmp_path, preset, 'encoder', *args)

@pytest.mark.parametrize('script', [encode_latents, train_mae, train_generator])
def test_help_explains_every_option(script, capsys):
    with pytest.raises(SystemExit, match = '0'):
        script.main(['--help'])

    options = re.split(r'\n  (?=-)', capsys.readouterr().out.split('options:')[1])[1:]
    assert len(options) > 4 and all(len(option.split()) > 3 for option in options)

def test_pictures_are_read_as_they_are_seen(tmp_path):
    """Of a phone on its side, transparent, of four inks, animated, below the class folder, large."""
    (tmp_path / 'deeper' / '.hidden').mkdir(parents = True)
    left_dark = np.full((40, 60, 3), 255, np.uint8)
    left_dark[:, :30] = 0
    upright = Image.fromarray(left_dark)
    side, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6                                                        # turn it by 90 degrees to the right
    side.save(tmp_path / 'a.jpg', exif = exif, quality = 100)

    alpha = Image.fromarray(255 - left_dark[..., 0])                        # dark and opaque, clear and black
    black = Image.new('RGB', (60, 40))
    black.putalpha(alpha)
    black.save(tmp_path / 'b.png')
    upright.convert('P').save(tmp_path / 'c.png', transparency = 0)         # of a palette, the first of which is clear
    upright.convert('CMYK').save(tmp_path / 'd.jpg', quality = 100)
    white = Image.new('RGB', (60, 40), 'white')
    upright.save(tmp_path / 'e.webp', save_all = True, append_images = [white], lossless = True)
    upright.resize((6_000, 4_000), Image.Resampling.NEAREST).save(tmp_path / 'deeper' / 'f.png')
    upright.save(tmp_path / 'h.TIF', save_all = True, append_images = [white])
    for path in (tmp_path / 'deeper' / '.hidden' / 'g.png', tmp_path / 'deeper' / '._f.png'):
        path.write_text('not an image')

    # all are of one class: the folder above has it as its class folder

    target = tmp_path.parent / f'{tmp_path.name}-classes'
    target.mkdir()
    tmp_path.rename(target / 'one')
    dataset = ImageFolder(target, 8)
    names = [Path(name).name for name, _ in dataset.files]
    assert sorted(names) == ['a.jpg', 'b.png', 'c.png', 'd.jpg', 'e.webp', 'f.png', 'h.TIF']

    for name, (image, label) in zip(names, dataset, strict = True):
        assert label == 0
        dark, bright = image[:, :, :3].mean(), image[:, :, -3:].mean()
        if name != 'c.png':
            assert dark < -0.9 and bright > 0.9, name
        else:
            assert dark > 0.9 or bright > 0.9, name
