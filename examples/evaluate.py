"""Quality of a generator over guidance scales and checkpoints: FID, Inception Score, precision and recall, nearest training images.

python examples/evaluate.py latent_L_sota --reference VIRTUAL_imagenet256_labeled.npz --alphas 1 1.5 2
torchrun --nproc-per-node 8 examples/evaluate.py ...            # or accelerate launch
python examples/evaluate.py results/mnist --last-k 3 --extractor mine:judge --reference mine:held_out

Sample i is drawn from noise of (seed, i), of class i modulo the number of classes, in batches that do not depend on the processes: any number of them
gives the same features, bit by bit. Another batch size changes the last digits, as matrix products do, and with them a few pixels by one level.

Images (--reference, --training) are an npz (arr_0, uint8 [n h w ch]), a folder of pictures, or 'module:callable' that returns a dataset of images, float [ch h w]
in [-1, 1] or uint8, with or without labels. A reference npz may hold statistics, mu and sigma (or ref_mu, ref_sigma), instead or as well. An --extractor
'module:callable' returns a Module: uint8 images [b ch h w] -> features [b d], or (features, logits [b c]). Its weights belong to the name of the features.

Writes into --results-folder, of this run: results.json, alphas.png (FID and Inception Score), neighbors-*.png (a row per sample, and the training images nearest to it),
and of all runs: features/ (in chunks: what is complete is not computed again, by whatever run asks for it).
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import cat, nn, stack
from tqdm.auto import tqdm

from drifting_pytorch import DriftingGenerator
from drifting_pytorch.drifting import check, image_grid, load_checked, seeded
from sample_imagenet import LATENT_CHANNELS, autocast, load_generator, load_vae, to_uint8

PICTURED, NEIGHBORS = 8, 6      # samples in the picture of neighbours, training images next to each

def imported(path):
    """What 'module:callable' returns; modules of the working folder come first."""
    check(path.count(':') == 1, f"{path!r} is neither a file, nor a folder, nor 'module:callable'")
    module, name = path.split(':')
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), name)()

def sha256(parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

def sha256_of_weights(module):
    return sha256(part for name, t in sorted(module.state_dict().items()) for part in (name.encode(), t.cpu().contiguous().flatten().view(torch.uint8).numpy()))

# where images come from: .batch(indices) gives them as uint8 [b ch h w]

class Images:
    """Those of an npz, of a folder, or of a dataset."""

    def __init__(self, source):
        if source.endswith('.npz'):
            with np.load(source) as file:
                check('arr_0' in file, f'{source} has no images: expected arr_0, uint8 [n h w ch]')
                self.items = file['arr_0']
        elif Path(source).is_dir():
            self.items = sorted(path for path in Path(source).rglob('*') if path.suffix.lower() in ('.png', '.jpg', '.jpeg', '.webp'))
            check(len(self.items) > 0, f'{source} has no png, jpg or webp in it')
            self.mode = 'L' if all(Image.open(path).mode == 'L' for path in self.items) else 'RGB'      # ImageNet has a few grey pictures
        else:
            self.items = imported(source)

    def __len__(self):
        return len(self.items)

    def image(self, i):
        item = self.items[i]

        if isinstance(item, Path):
            with Image.open(item) as picture:
                item = np.array(picture.convert(self.mode))

        if isinstance(item, np.ndarray):
            return rearrange(torch.from_numpy(item).view(*item.shape[:2], -1), 'h w ch -> ch h w')

        image = item[0] if isinstance(item, (tuple, list)) else item
        return image if image.dtype == torch.uint8 else to_uint8(image[None], rounding = 'round')[0]       # it was uint8 before

    def batch(self, indices):
        images = [self.image(i) for i in indices]
        check(len({image.shape for image in images}) == 1, f'images of one size were expected, got {sorted({tuple(image.shape) for image in images})}: resize and crop them first')
        return stack(images)

    @cached_property
    def sha256(self):
        return sha256(self.image(i).numpy().tobytes() for i in range(len(self)))

class Generated:
    """Those of a generator, each from noise and styles of its own seed."""

    def __init__(self, model, alpha, args, vae, device):
        self.model, self.alpha, self.args, self.vae, self.device = model, alpha, args, vae, device

    @torch.no_grad()
    def batch(self, indices):
        model, args, device = self.model, self.args, self.device
        labels = torch.tensor([i % model.num_classes for i in indices], device = device) if model.num_classes else None
        generators = [seeded(args.seed, 'evaluate', i) for i in indices]

        noise = cat([torch.randn(1, *model.noise_shape, generator = generator) for generator in generators])
        styles = cat([model.draw_styles(1, generator) for generator in generators])

        with autocast(device, args.precision):
            samples = model(noise.to(device), labels, self.alpha, styles.to(device))

        return to_uint8(samples, self.vae, rounding = args.rounding, batch_size = args.batch_size)

# features

class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow network, with its resize: the one whose numbers are near those of papers."""

    def __init__(self, weights = None):
        super().__init__()
        self.net = fidelity('feature_extractor_inceptionv3').FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'], weights)

    def forward(self, images):
        return self.net(images if images.shape[1] == 3 else repeat(images, 'b 1 h w -> b ch h w', ch = 3))

def fidelity(module):
    try:
        return importlib.import_module(f'torch_fidelity.{module}')
    except ImportError as error:
        raise ImportError("the metrics are those of torch-fidelity: pip install 'drifting-pytorch[eval]'") from error

def features_of(source, num, extractor, folder, state, args):
    """Compute features (and logits) of images 0 .. num - 1, a file per chunk. Returns a function that reads all of them, {name: [num d]}."""
    chunks = [range(start, min(start + args.chunk_size, num)) for start in range(0, num, args.chunk_size)]
    paths = [folder / f'{chunk.start:08d}-{chunk.stop:08d}.safetensors' for chunk in chunks]
    folder.mkdir(parents = True, exist_ok = True)

    mine = list(zip(paths, chunks))[state.process_index::state.num_processes]

    for path, indices in tqdm(mine, desc = folder.name, disable = not state.is_main_process):
        if path.exists():
            continue

        parts = []

        for start in range(0, len(indices), args.batch_size):
            images = source.batch(indices[start:start + args.batch_size]).to(state.device)

            with torch.no_grad():
                output = extractor(images)

            features, logits = output if isinstance(output, (tuple, list)) else (output, images.new_zeros(len(images), 0))
            check(features.ndim == 2 and len(features) == len(images), f'the extractor must return features [{len(images)} d], got {tuple(features.shape)}')
            parts.append(dict(features = features.float().cpu(), logits = logits.float().cpu(), images = images.cpu()))

        tensors = {name: cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        tensors['images'] = tensors['images'][:PICTURED].clone()            # the first few, for pictures

        unfinished = path.with_suffix('.unfinished')
        save_file(tensors, unfinished)
        unfinished.replace(path)                                            # a chunk is complete or absent

    state.wait_for_everyone()

    def read():
        files = [load_file(path) for path in paths]
        return {name: cat([file[name] for file in files]) for name in ('features', 'logits')} | dict(images = files[0]['images'])

    return read

# metrics

def read_statistics(path):
    """mu [d], sigma [d d] of an npz, or None where it has only images."""
    with np.load(path) as file:
        for prefix in ('', 'ref_'):
            if f'{prefix}mu' in file and f'{prefix}sigma' in file:
                return dict(mu = file[f'{prefix}mu'].astype(np.float64), sigma = file[f'{prefix}sigma'].astype(np.float64))

        check('arr_0' in file, f'{path} has the arrays {sorted(file)}, expected mu and sigma, ref_mu and ref_sigma, or images arr_0')

def statistics_of(features):
    return fidelity('metric_fid').fid_features_to_statistics(features.double())     # in float32 its mean would lose digits

def frechet_distance(a, b):
    check(a['mu'].shape == b['mu'].shape, f'the statistics of the reference are of {len(b["mu"])} features, those of the samples of {len(a["mu"])}: they come from another extractor')
    return fidelity('metric_fid').fid_statistics_to_metric(a, b, verbose = False)['frechet_inception_distance']

def inception_score(logits, splits = 10):
    check(len(logits) >= splits, f'the Inception Score of {splits} splits needs as many samples, got {len(logits)}')
    score = fidelity('metric_isc').isc_features_to_metric(logits, splits, shuffle = True, rng_seed = 2020)
    return dict(inception_score = score['inception_score_mean'], inception_score_std = score['inception_score_std'])

def precision_recall(features, real, device = 'cpu', k = 3, max_real = 10_000):
    real = real[torch.randperm(len(real), generator = seeded('references'))[:max_real]]
    check(min(len(features), len(real)) > k, f'precision and recall with k = {k} need more samples and references than that, got {len(features)} and {len(real)}')
    score = fidelity('metric_prc').prc_features_to_metric(features.to(device), real.to(device), prc_neighborhood = k, save_cpu_ram = True, verbose = False)
    return dict(precision = score['precision'], recall = score['recall'], num_precision_recall_references = len(real))

def nearest(a, b, k, device = 'cpu'):
    """Distances [n k] of each a [n d] to the nearest of b [m d], and which they are. In float64: the copy of an image is at distance 0."""
    b = b.double().to(device)
    found = [torch.cdist(chunk.double().to(device), b).topk(min(k, len(b)), largest = False) for chunk in a.split(1_000)]
    return cat([t.values for t in found]).cpu(), cat([t.indices for t in found]).cpu()

def summary(distance):
    return dict(mean = distance.mean().item(), percentile_5 = distance.quantile(0.05).item())

def plot_alphas(results, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names = [name for name in ('fid', 'inception_score') if name in results[0]]
    figure, axes = plt.subplots(1, len(names), figsize = (4.5 * len(names), 3.2), squeeze = False)

    for axis, name in zip(axes[0], names):
        for checkpoint in dict.fromkeys(row['checkpoint'] for row in results):
            points = sorted((row['alpha'], row[name]) for row in results if row['checkpoint'] == checkpoint)
            axis.plot(*zip(*points), marker = 'o', linewidth = 1, label = checkpoint)
        axis.set(title = dict(fid = 'FID', inception_score = 'Inception Score')[name], xlabel = 'guidance scale')
        axis.legend(fontsize = 8)

    figure.tight_layout()
    figure.savefig(path, dpi = 90)

# models

def find_models(args):
    """{name: a function that loads it}: the checkpoints of a trainer's results folder, one checkpoint, or pretrained weights."""
    folder = Path(args.model)
    checkpoints = sorted((folder / 'checkpoints').glob('step-*'))[-args.last_k:] or ([folder] if (folder / 'ema.safetensors').is_file() else [])

    if not checkpoints:
        return {folder.name: lambda: load_generator(args.model, args.revision)}

    def load(checkpoint):
        config = checkpoint / 'config.json'
        check(config.is_file() and json.loads(config.read_text()), f'{checkpoint} does not say which DriftingGenerator it is of: it has no config.json')
        model = DriftingGenerator(**json.loads(config.read_text()))
        load_checked(model, load_file(checkpoint / 'ema.safetensors'))
        return model.eval()

    return {checkpoint.name: lambda checkpoint = checkpoint: load(checkpoint) for checkpoint in checkpoints}

def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None

def main(argv = None):
    parser = argparse.ArgumentParser(description = __doc__.split('\n')[0], formatter_class = argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('model', help = "a published generator by name, a local folder of one, a trainer's results folder, or one of its checkpoints")
    parser.add_argument('--revision', default = None, help = 'of the published weights, None for the default')
    parser.add_argument('--last-k', type = int, default = 1, help = "how many of a results folder's newest checkpoints")
    parser.add_argument('--num-samples', type = int, default = 50_000, help = 'per checkpoint and guidance scale')
    parser.add_argument('--alphas', type = float, nargs = '+', default = [1.], help = 'guidance scales, all from the same noise')
    parser.add_argument('--seed', type = int, default = 0, help = 'of noise and styles')
    parser.add_argument('--rounding', choices = ('truncate', 'round'), default = 'truncate', help = 'how images become uint8; papers truncate')
    parser.add_argument('--precision', choices = ('fp32', 'bf16'), default = 'fp32', help = 'of the generator')
    parser.add_argument('--vae', default = 'stabilityai/sd-vae-ft-mse', help = 'decoder of latents, a name or a local folder of diffusers')
    parser.add_argument('--extractor', default = 'inception', help = "'inception', or module:callable")
    parser.add_argument('--inception-weights', default = None, help = 'a local file, None to download them as torch-fidelity does')
    parser.add_argument('--reference', default = None, help = 'real images or statistics; None: no FID, precision, recall')
    parser.add_argument('--training', default = None, help = 'training images, among which the neighbours of samples are looked for; None: no neighbours')
    parser.add_argument('--batch-size', type = int, default = 50, help = 'images at a time, per process')
    parser.add_argument('--chunk-size', type = int, default = 1_000, help = 'images per file of features, what an interrupted run loses at most')
    parser.add_argument('--cpu', action = 'store_true', help = 'even where there is a GPU')
    parser.add_argument('--results-folder', default = 'results/evaluate', help = 'where everything is written')
    args = parser.parse_args(argv)

    for name in ('last_k', 'num_samples', 'batch_size', 'chunk_size'):
        check(getattr(args, name) > 0, f'--{name.replace("_", "-")} must be above 0, got {getattr(args, name)}')

    state, folder = PartialState(cpu = args.cpu), Path(args.results_folder)

    # a folder of features has the name of all that they depend on

    extractor = Inception(args.inception_weights) if args.extractor == 'inception' else imported(args.extractor)
    extractor = extractor.eval().to(state.device)
    extractor_key = dict(extractor = args.extractor, extractor_sha256 = sha256_of_weights(extractor))

    def features(name, source, num, **key):
        key = {**key, **extractor_key}
        digest = sha256([json.dumps(key, sort_keys = True).encode()])[:12]
        return features_of(source, num, extractor, folder / 'features' / f'{name}-{digest}', state, args), key

    # all processes compute features: of real images, of samples

    real, statistics, reference_key = None, None, dict(reference = args.reference)

    if args.reference:
        is_npz = args.reference.endswith('.npz')
        statistics = read_statistics(args.reference) if is_npz else None
        reference_key['reference_sha256'] = sha256([Path(args.reference).read_bytes()]) if is_npz else None
        has_images = not is_npz or 'arr_0' in np.load(args.reference)

        if has_images:
            images = Images(args.reference)
            reference_key['reference_sha256'] = reference_key['reference_sha256'] or images.sha256
            real, _ = features('reference', images, len(images), sha256 = images.sha256)

    if args.training:
        training = Images(args.training)
        training_features, _ = features('training', training, len(training), sha256 = training.sha256)

    vae, samples = None, []

    for checkpoint, load in find_models(args).items():
        model = load().to(state.device)

        if model.noise_shape[0] == LATENT_CHANNELS and vae is None:
            vae = load_vae(args.vae).to(state.device)

        settings = dict(checkpoint = checkpoint, weights_sha256 = sha256_of_weights(model), seed = args.seed, rounding = args.rounding, autocast = args.precision, vae_sha256 = sha256_of_weights(vae) if vae else None)

        for alpha in args.alphas:
            samples.append(features(f'{checkpoint}-alpha-{alpha:g}', Generated(model, alpha, args, vae, state.device), args.num_samples, alpha = alpha, **settings))

    # the main process compares them, nobody waits for it

    if state.num_processes > 1:
        state.destroy_process_group()

    if not state.is_main_process:
        return

    versions = {package: installed(package) for package in ('torch', 'torch-fidelity', 'drifting-pytorch', 'diffusers')}
    real = real()['features'] if real else None
    statistics = statistics or (statistics_of(real) if real is not None else None)
    results = []

    if args.training:
        train = training_features()['features']
        distance_of_training = summary(nearest(train[torch.randperm(len(train), generator = seeded('training'))[:10_000]], train, 2, state.device)[0][:, -1])

    for read, key in samples:
        tensors = read()
        row = dict(model = args.model, **key, num_samples = args.num_samples, vae = args.vae if vae else None, **reference_key, versions = versions)

        if statistics:
            row['fid'] = frechet_distance(statistics_of(tensors['features']), statistics)
            row['num_references'] = len(real) if real is not None else None
        if tensors['logits'].shape[1] > 0:
            row |= inception_score(tensors['logits'])
        if real is not None:
            row |= precision_recall(tensors['features'], real, state.device)
        if args.training:
            distance, index = nearest(tensors['features'], train, NEIGHBORS, state.device)
            row['nearest_training'] = dict(samples = summary(distance[:, 0]), training_images = distance_of_training, training = args.training, training_sha256 = training.sha256)

            rows = [cat((image[None], training.batch(i.tolist()))) for image, i in zip(tensors['images'], index)]
            image_grid(stack(rows) / 255).save(folder / f'neighbors-{key["checkpoint"]}-alpha-{key["alpha"]:g}.png')

        results.append(row)
        print(f'{key["checkpoint"]}, alpha {key["alpha"]:g}:', *(f'{name} {row[name]:.4g}' for name in ('fid', 'inception_score', 'precision', 'recall') if name in row))

    unfinished = folder / 'results.unfinished'
    unfinished.write_text(json.dumps(results, indent = 1))
    unfinished.replace(folder / 'results.json')

    if len(args.alphas) > 1 and results[0].keys() & {'fid', 'inception_score'}:
        plot_alphas(results, folder / 'alphas.png')

if __name__ == '__main__':
    main()
