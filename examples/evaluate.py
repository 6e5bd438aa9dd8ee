"""Quality of a generator over guidance scales and checkpoints: FID, Inception Score, precision, recall, neighbours.

python examples/evaluate.py latent_L_sota --reference VIRTUAL_imagenet256_labeled.npz --alphas 1 1.5 2
torchrun --nproc-per-node 8 examples/evaluate.py ...            # or accelerate launch
python examples/evaluate.py results/mnist --last-k 3 --extractor mine:judge --reference mine:held_out

Sample i is drawn from noise of (seed, i), of class i modulo the number of classes, in batches that do not depend on the
processes: any number of them gives the same features, bit by bit. Another batch size changes the last digits, as matrix
products do, and with them a few pixels by one level.

Images (--reference, --training) are an npz (arr_0, uint8 [n h w ch]), a folder of pictures, or 'module:callable' that
returns a dataset of images, float [ch h w] in [-1, 1] or uint8, with or without labels. A reference npz may hold
statistics, mu and sigma (or ref_mu, ref_sigma), instead or, for Inception, as well: another extractor reads the images.
An --extractor 'module:callable' returns a Module: uint8 images [b ch h w] -> features [b d], or (features, logits
[b c]). Its weights belong to the name of the features.

Writes into --results-folder, of this run: results.json, alphas.png (FID and Inception Score), neighbors-*.png (a row
per sample, and the training images nearest to it), and of all runs: features/ (in chunks: what is complete is not
computed again, by whatever run asks for it).
"""

import importlib
import json
import os
import sys
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import load_file, save
from torch import cat, nn, stack
from tqdm.auto import tqdm

from common import (
    autocast,
    draws_latents,
    load_generator,
    load_vae,
    make_parser,
    positive,
    process_state,
    sha256,
    to_uint8,
    write_whole,
)
from drifting_pytorch import ImageFolder
from drifting_pytorch.drifting import check, image_grid, seeded

PICTURED = 8        # samples in the picture of neighbours
NEIGHBORS = 6       # training images next to each

def imported(path):
    """What 'module:callable' returns; modules of the working folder come first."""
    check(path.count(':') == 1, f"{path!r} is neither a file, nor a folder, nor 'module:callable'")
    module, name = path.split(':')
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), name)()

def sha256_of_weights(module):
    parts = []

    for name, t in sorted(module.state_dict().items()):
        parts += [name.encode(), t.cpu().contiguous().flatten().view(torch.uint8).numpy()]

    return sha256(parts)

# where images come from: .batch(indices) gives them as uint8 [b ch h w]

TO_ONE_SIZE = 'pass a dataset that makes them so, as a function that returns ImageFolder(root, size)'

def read_folder(root):
    """Its pictures, which have to be squares of one size, as ImageFolder reads them. Grey if all are."""
    folder, sizes, modes = ImageFolder(root, 1), set(), set()

    for name, _ in folder.files:
        path = folder.root / name

        with Image.open(path) as picture:
            sizes.add(picture.size)
            modes.add(picture.mode)

        width, height = picture.size
        message = f'{path} is {width}x{height}, squares of one size were expected: {TO_ONE_SIZE}'
        check(len(sizes) == 1 and width == height, message)

    folder.image_size, folder.channels = width, 1 if modes == {'L'} else 3                  # ImageNet has a few of grey
    return folder

class Images:
    """Those of an npz, of a folder, or of a dataset."""

    def __init__(self, source):
        if source.endswith('.npz'):
            with np.load(source) as file:
                check('arr_0' in file, f'{source} has no images: expected arr_0, uint8 [n h w ch]')
                self.items = file['arr_0']

            kind = f'{self.items.dtype} {list(self.items.shape)}'
            fits = self.items.dtype == np.uint8 and self.items.ndim == 4
            check(fits, f'the images of {source} are {kind}, expected uint8 [n h w ch]')
        elif Path(source).is_dir():
            self.items = read_folder(source)
        else:
            self.items = imported(source)

    def __len__(self):
        return len(self.items)

    def image(self, i):
        item = self.items[i]

        if isinstance(item, np.ndarray):
            return rearrange(torch.from_numpy(item), 'h w ch -> ch h w')

        image = item[0] if isinstance(item, (tuple, list)) else item

        if image.dtype == torch.uint8:
            return image

        return to_uint8(image[None], rounding = 'round')[0]                 # it was uint8 before

    def batch(self, indices):
        images = [self.image(i) for i in indices]
        shapes = {tuple(image.shape) for image in images}
        check(len(shapes) == 1, f'images of one size were expected, got {sorted(shapes)[:4]}: {TO_ONE_SIZE}')
        return stack(images)

    @cached_property
    def sha256(self):
        return sha256(self.image(i).numpy().tobytes() for i in range(len(self)))

class Generated:
    """Those of a generator, each from noise and styles of its own seed."""

    def __init__(self, model, alpha, args, vae, device):
        self.model = model
        self.alpha = alpha
        self.args = args
        self.vae = vae
        self.device = device

    @torch.no_grad()
    def batch(self, indices):
        model, args, device = self.model, self.args, self.device
        labels = styles = None

        if model.num_classes:
            labels = torch.tensor([i % model.num_classes for i in indices], device = device)

        generators = [seeded(args.seed, 'evaluate', i) for i in indices]

        noise = cat([torch.randn(1, *model.noise_shape, generator = generator) for generator in generators])

        if hasattr(model, 'draw_styles'):
            styles = cat([model.draw_styles(1, generator) for generator in generators]).to(device)

        with autocast(device, args.precision):
            samples = model(noise.to(device), labels, self.alpha, styles)

        return to_uint8(samples, self.vae, rounding = args.rounding, batch_size = args.batch_size)

# features

class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow network, with its resize: its numbers are near those of papers."""

    def __init__(self, weights = None):
        super().__init__()
        network = fidelity('feature_extractor_inceptionv3').FeatureExtractorInceptionV3
        self.net = network('inception-v3-compat', ['2048', 'logits_unbiased'], weights)

    def forward(self, images):
        if images.shape[1] == 1:
            images = repeat(images, 'b 1 h w -> b ch h w', ch = 3)

        return self.net(images)

def fidelity(module):
    try:
        return importlib.import_module(f'torch_fidelity.{module}')
    except ImportError as error:
        raise ImportError('the metrics are those of torch-fidelity: pip install "drifting-pytorch[eval]"') from error

def chunk_of_features(source, indices, extractor, device, batch_size):
    """{features [n d], logits [n c], images [8 ch h w]: the first few, for pictures} of these images."""
    parts = []

    for start in range(0, len(indices), batch_size):
        images = source.batch(indices[start:start + batch_size]).to(device)

        with torch.no_grad():
            output = extractor(images)

        features, logits = output if isinstance(output, (tuple, list)) else (output, images.new_zeros(len(images), 0))

        check(
            features.ndim == 2 and len(features) == len(images),
            f'the extractor must return features [{len(images)} d], got {tuple(features.shape)}'
        )
        parts.append(dict(features = features.float().cpu(), logits = logits.float().cpu(), images = images.cpu()))

    tensors = {name: cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    tensors['images'] = tensors['images'][:PICTURED].clone()
    return tensors

def features_of(source, num, extractor, folder, state, args):
    """Compute features (and logits) of images 0 .. num - 1, a file per chunk.

    Returns a function that reads all of them, {name: [num d]}.
    """
    chunks = [range(start, min(start + args.chunk_size, num)) for start in range(0, num, args.chunk_size)]
    paths = [folder / f'{chunk.start:08d}-{chunk.stop:08d}.safetensors' for chunk in chunks]
    folder.mkdir(parents = True, exist_ok = True)

    of_this_process = slice(state.process_index, None, state.num_processes)
    mine = list(zip(paths, chunks, strict = True))[of_this_process]

    for path, indices in tqdm(mine, desc = folder.name, disable = not state.is_main_process):
        if path.exists():
            continue

        tensors = chunk_of_features(source, indices, extractor, state.device, args.batch_size)
        write_whole(path, save(tensors))

    state.wait_for_everyone()

    def read():
        files = [load_file(path) for path in paths]
        features, logits = (cat([file[name] for file in files]) for name in ('features', 'logits'))
        return dict(features = features, logits = logits, images = files[0]['images'])

    return read

# metrics

def read_statistics(path):
    """mu [d], sigma [d d] of an npz, or None where it has only images."""
    with np.load(path) as file:
        for prefix in ('', 'ref_'):
            mu, sigma = f'{prefix}mu', f'{prefix}sigma'

            if mu in file and sigma in file:
                return dict(mu = file[mu].astype(np.float64), sigma = file[sigma].astype(np.float64))

        arrays = f'{path} has the arrays {sorted(file)}'
        check('arr_0' in file, f'{arrays}, expected mu and sigma, ref_mu and ref_sigma, or images arr_0')

def statistics_of(features):
    features = features.double()                                            # in float32 the mean would lose digits
    return fidelity('metric_fid').fid_features_to_statistics(features)

def fid(a, b):
    """Of the statistics of samples and of the reference."""
    check(
        a['mu'].shape == b['mu'].shape,
        f'the statistics of the reference are of {len(b["mu"])} features, those of the samples of {len(a["mu"])}: '
        'they come from another extractor'
    )
    score = fidelity('metric_fid').fid_statistics_to_metric(a, b, verbose = False)
    return score['frechet_inception_distance']

def inception_score(logits, splits = 10):
    check(
        len(logits) >= splits,
        f'the Inception Score of {splits} splits needs as many samples, got {len(logits)}'
    )
    score = fidelity('metric_isc').isc_features_to_metric(logits, splits, shuffle = True, rng_seed = 2020)
    return dict(inception_score = score['inception_score_mean'], inception_score_std = score['inception_score_std'])

def precision_recall(features, real, device = 'cpu', k = 3, max_real = 10_000):
    real = real[torch.randperm(len(real), generator = seeded('references'))[:max_real]]
    check(
        min(len(features), len(real)) > k,
        f'precision and recall with k = {k} need more samples and references than that, '
        f'got {len(features)} and {len(real)}'
    )
    score = fidelity('metric_prc').prc_features_to_metric(
        features.to(device), real.to(device), prc_neighborhood = k, save_cpu_ram = True, verbose = False
    )
    return dict(precision = score['precision'], recall = score['recall'], num_precision_recall_references = len(real))

def nearest(a, b, k, device = 'cpu'):
    """Distances [n k] of each a [n d] to the nearest of b [m d], and which they are.

    In float64: the copy of an image is at distance 0.
    """
    b = b.double().to(device)
    k = min(k, len(b))
    found = []

    for chunk in a.split(1_000):
        distances = torch.cdist(chunk.double().to(device), b)
        found.append(distances.topk(k, largest = False))

    return cat([t.values for t in found]).cpu(), cat([t.indices for t in found]).cpu()

def nearest_others(features, device = 'cpu', max_num = 10_000):
    """Distances of up to so many to the nearest other one."""
    some = features[torch.randperm(len(features), generator = seeded('training'))[:max_num]]
    distances, _ = nearest(some, features, 2, device)                       # the first is itself
    return distances[:, -1]

def summary(distance):
    return dict(mean = distance.mean().item(), percentile_5 = distance.quantile(0.05).item())

def plot_alphas(results, path):
    from matplotlib.figure import Figure

    titles = dict(fid = 'FID', inception_score = 'Inception Score')
    titles = {name: title for name, title in titles.items() if name in results[0]}
    figure = Figure(figsize = (4.5 * len(titles), 3.2))
    axes = figure.subplots(1, len(titles), squeeze = False)

    for axis, (name, title) in zip(axes[0], titles.items(), strict = True):
        for checkpoint in dict.fromkeys(row['checkpoint'] for row in results):
            points = sorted((row['alpha'], row[name]) for row in results if row['checkpoint'] == checkpoint)
            alphas, values = zip(*points, strict = True)
            axis.plot(alphas, values, marker = 'o', linewidth = 1, label = checkpoint)

        axis.set(title = title, xlabel = 'guidance scale')
        axis.legend(fontsize = 8)

    figure.tight_layout()
    figure.savefig(path, dpi = 90)

# models

def find_models(args):
    """{name: a function that loads it}: checkpoints of a results folder, one checkpoint, or pretrained weights."""
    checkpoints = sorted((Path(args.model) / 'checkpoints').glob('step-*'))[-args.last_k:]
    names = checkpoints or [args.model]
    return {Path(name).name: partial(load_generator, name, args.revision) for name in names}

def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None

class Features:
    """Those of images, in folders that have the name of all that they depend on."""

    def __init__(self, args, state):
        self.args = args
        self.state = state
        self.folder = Path(args.results_folder) / 'features'

        extractor = Inception(args.inception_weights) if args.extractor == 'inception' else imported(args.extractor)
        self.extractor = extractor.eval().to(state.device)
        self.key = dict(extractor = args.extractor, extractor_sha256 = sha256_of_weights(self.extractor))

    def __call__(self, name, source, num, **key):
        """A function that reads them, computed by all processes, and what they depend on."""
        key = {**key, **self.key}
        digest = sha256([json.dumps(key, sort_keys = True).encode()])[:12]
        folder = self.folder / f'{name}-{digest}'
        return features_of(source, num, self.extractor, folder, self.state, self.args), key

def read_reference(args, features):
    """(a function that reads the features of its images, or None), (its statistics, or None), what it is."""
    if not args.reference:
        return None, None, dict(reference = None)

    real = statistics = digest = None
    has_images = True

    if args.reference.endswith('.npz'):
        statistics = read_statistics(args.reference)
        digest = sha256([Path(args.reference).read_bytes()])
        has_images = 'arr_0' in np.load(args.reference)

        if has_images and args.extractor != 'inception':
            statistics = None                                               # they are of other features

    if has_images:
        images = Images(args.reference)
        digest = digest or images.sha256
        real, _ = features('reference', images, len(images), sha256 = images.sha256)

    return real, statistics, dict(reference = args.reference, reference_sha256 = digest)

def read_samples(args, features, state):
    """[(a function that reads the features of samples, what they depend on)] of checkpoints and guidance scales."""
    vae = vae_digest = None
    samples = []

    for checkpoint, load in find_models(args).items():
        model = load().to(state.device)

        if draws_latents(model) and vae is None:
            vae = load_vae(args.vae).to(state.device)
            vae_digest = sha256_of_weights(vae)

        key = dict(
            checkpoint = checkpoint,
            weights_sha256 = sha256_of_weights(model),
            seed = args.seed,
            rounding = args.rounding,
            autocast = args.precision,
            vae_sha256 = vae_digest,
            vae_scaling_factor = vae and vae.config.scaling_factor
        )

        for alpha in args.alphas:
            source = Generated(model, alpha, args, vae, state.device)
            name = f'{checkpoint}-alpha-{alpha:g}'
            samples.append(features(name, source, args.num_samples, alpha = alpha, **key))

    return samples

def save_neighbors(path, images, training, index):
    """A row per image: it, and the training images at its places [n k]."""
    rows = [cat((image[None], training.batch(places.tolist()))) for image, places in zip(images, index, strict = False)]
    image_grid(stack(rows) / 255).save(path)

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument(
        'model',
        help = "a published generator by name, a local folder of one, a trainer's results folder, "
               "or one of its checkpoints"
    )
    parser.add_argument('--revision', default = None, help = 'of the published weights, None for the default')
    parser.add_argument(
        '--last-k', type = positive, default = 1,
        help = "how many of a results folder's newest checkpoints"
    )
    parser.add_argument('--num-samples', type = positive, default = 50_000, help = 'per checkpoint and guidance scale')
    parser.add_argument(
        '--alphas', type = float, nargs = '+', default = [1.],
        help = 'guidance scales, all from the same noise'
    )
    parser.add_argument('--seed', type = int, default = 0, help = 'of noise and styles')
    parser.add_argument(
        '--rounding', choices = ('truncate', 'round'), default = 'truncate',
        help = 'how images become uint8; papers truncate'
    )
    parser.add_argument('--precision', choices = ('fp32', 'bf16'), default = 'fp32', help = 'of the generator')
    parser.add_argument(
        '--vae', default = 'stabilityai/sd-vae-ft-mse',
        help = 'decoder of latents, a name or a local folder of diffusers'
    )
    parser.add_argument('--extractor', default = 'inception', help = "'inception', or module:callable")
    parser.add_argument(
        '--inception-weights', default = None,
        help = 'a local file, None to download them as torch-fidelity does'
    )
    parser.add_argument(
        '--reference', default = None,
        help = 'real images or statistics; None: no FID, precision, recall'
    )
    parser.add_argument(
        '--training', default = None,
        help = 'training images, among which the neighbours of samples are looked for; None: no neighbours'
    )
    parser.add_argument('--batch-size', type = positive, default = 50, help = 'images at a time, per process')
    parser.add_argument(
        '--chunk-size', type = positive, default = 1_000,
        help = 'images per file of features, what an interrupted run loses at most'
    )
    parser.add_argument('--cpu', action = 'store_true', help = 'even where there is a GPU')
    parser.add_argument('--results-folder', default = 'results/evaluate', help = 'where everything is written')
    args = parser.parse_args(argv)

    for name in ('last_k', 'num_samples', 'batch_size', 'chunk_size'):
        value = getattr(args, name)
        check(value > 0, f'--{name.replace("_", "-")} must be above 0, got {value}')

    return args

def main(argv = None):
    args = options(argv)
    state = process_state(args.cpu)
    device = state.device
    folder = Path(args.results_folder)

    # all processes compute features: of real images, of samples

    features = Features(args, state)
    real, statistics, reference_key = read_reference(args, features)

    if args.training:
        training = Images(args.training)
        read_training, _ = features('training', training, len(training), sha256 = training.sha256)

    samples = read_samples(args, features, state)

    # the main process compares them, nobody waits for it

    if state.num_processes > 1:
        state.destroy_process_group()

    if not state.is_main_process:
        return

    versions = {name: installed(name) for name in ('torch', 'torch-fidelity', 'drifting-pytorch', 'diffusers')}
    num_references = None

    if real is not None:
        real = real()['features']

        if statistics is None:
            statistics, num_references = statistics_of(real), len(real)

    if args.training:
        train = read_training()['features']
        distance_of_training = summary(nearest_others(train, device))

    results = []

    for read, key in samples:
        tensors = read()
        checkpoint, alpha = key['checkpoint'], key['alpha']
        vae = args.vae if key['vae_sha256'] else None

        row = dict(model = args.model, **key, num_samples = args.num_samples, vae = vae)
        row |= dict(**reference_key, versions = versions)

        if statistics:
            row['fid'] = fid(statistics_of(tensors['features']), statistics)
            row['num_references'] = num_references

        if tensors['logits'].shape[1] > 0:
            row |= inception_score(tensors['logits'])

        if real is not None:
            row |= precision_recall(tensors['features'], real, device)

        if args.training:
            distance, index = nearest(tensors['features'], train, NEIGHBORS, device)
            row['nearest_training'] = dict(
                samples = summary(distance[:, 0]),
                training_images = distance_of_training,
                training = args.training,
                training_sha256 = training.sha256
            )
            picture = folder / f'neighbors-{checkpoint}-alpha-{alpha:g}.png'
            save_neighbors(picture, tensors['images'], training, index)

        results.append(row)

        found = [name for name in ('fid', 'inception_score', 'precision', 'recall') if name in row]
        print(f'{checkpoint}, alpha {alpha:g}:', *(f'{name} {row[name]:.4g}' for name in found))

    write_whole(folder / 'results.json', json.dumps(results, indent = 1).encode())

    if len(args.alphas) > 1 and results[0].keys() & {'fid', 'inception_score'}:
        plot_alphas(results, folder / 'alphas.png')

if __name__ == '__main__':
    main()
