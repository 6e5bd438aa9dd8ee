"""What the ImageNet scripts share: images and latents as datasets, and the options of both trainings."""

import json
import math
import random
import sys
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import cat
from torch.utils.data import Dataset

from drifting_pytorch import ImageFolder
from drifting_pytorch.drifting import check

sys.path.insert(0, str(Path(__file__).parents[1]))      # examples/

from common import load_vae

AUGMENTS = ('center', 'flip', 'crop')

# images

def random_crop_box(width, height, scale = (0.2, 1.), ratio = (3 / 4, 4 / 3)):
    """(left, top, right, bottom) of a random share of the area at a random aspect ratio: a 'random resized crop'."""
    for _ in range(10):
        area = random.uniform(*scale) * width * height
        aspect = math.exp(random.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))

        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h

    side = min(width, height)       # none fitted, the picture is very long: its centre
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side

def check_augment(augment):
    check(augment in AUGMENTS, f'augment must be one of {", ".join(AUGMENTS)}, got {augment!r}')

class ClassFolders(ImageFolder):
    """Images [3 size size] in [-1, 1] of a folder of class folders, and their labels.

    augment: 'center', the centre crop; 'flip', the same or its mirror image; 'crop', a random resized crop (0.2 .. 1 of
        the area, bicubic) and flip.
    """

    def __init__(self, root, image_size = 256, augment = 'center'):
        check_augment(augment)
        super().__init__(root, image_size, flip = augment != 'center')
        check(self.classes, f'{root} has no class folders: expected images as {root}/<class>/<name>.JPEG')
        self.augment = augment

    def cut(self, picture):
        if self.augment != 'crop':
            return super().cut(picture)

        size = (self.image_size, self.image_size)
        return picture.resize(size, Image.Resampling.BICUBIC, box = random_crop_box(*picture.size))

# latents, as encode_latents.py writes them: shards [n flip moment ch h w], flip: as it is, mirrored; moment: mean,
# standard deviation

AGAIN = 'run encode_latents.py again'

def read_manifest(folder):
    path = Path(folder) / 'manifest.json'
    check(path.is_file(), f'{folder} has no manifest.json: expected a folder written by encode_latents.py')
    manifest = json.loads(path.read_text())
    check(
        manifest.get('shards'),
        f'the encoding of {folder} has not finished: {AGAIN} with the same arguments, it goes on where it stopped'
    )
    return manifest

def read_shard(path):
    check(
        Path(path).is_file(),
        f'{path} is missing: {AGAIN} with the same arguments, it writes the shards that are not there'
    )

    try:
        return np.load(path, mmap_mode = 'r')
    except (ValueError, EOFError) as error:
        raise ValueError(f'{path} is not a whole shard ({error}): remove it and {AGAIN}') from error

open_shard = lru_cache(maxsize = None)(read_shard)      # once in every process, and never sent to a worker

class LatentDataset(Dataset):
    """Latents [4 size/8 size/8] = scaling factor * a fresh sample of the VAE's posterior, and their labels.

    They are memory-mapped from disk.

    augment: 'center', of the image as it is; 'flip', of it or of its mirror image, which was encoded too; 'crop', also
        a random resized crop (0.2 .. 1 of the area) of the latent itself, bilinear, which stands for encoding a crop of
        the image.
    Raises ValueError for a folder that is not complete or has shards of another shape.
    """

    def __init__(self, folder, augment = 'flip'):
        check_augment(augment)
        self.augment = augment
        self.manifest = read_manifest(folder)
        self.classes = self.manifest['classes']
        self.scaling_factor = self.manifest['scaling_factor']

        self.paths = [Path(folder) / shard['file'] for shard in self.manifest['shards']]
        sizes = [shard['images'] for shard in self.manifest['shards']]
        self.ends = list(accumulate(sizes))
        self.labels = np.repeat(np.arange(len(self.classes)), self.manifest['counts'])

        for path, size in zip(self.paths, sizes, strict = True):
            shape = read_shard(path).shape
            expected = (size, 2, 2, *self.manifest['shape'])
            check(shape == expected, f'{path} has shape {shape}, the manifest says {expected}: remove it and {AGAIN}')

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        shard = bisect_right(self.ends, index)
        row = index - self.ends[shard]                                                      # from the end of the shard
        flip = int(self.augment != 'center' and random.random() < 0.5)

        moments = open_shard(self.paths[shard])[row, flip].astype(np.float32)
        mean, std = torch.from_numpy(moments)                                               # each ch h w
        latent = self.scaling_factor * (mean + std * torch.randn_like(mean))

        if self.augment == 'crop':
            h, w = latent.shape[-2:]
            left, top, right, bottom = random_crop_box(w, h)
            part = rearrange(latent[:, top:bottom, left:right], 'ch h w -> 1 ch h w')
            latent, = F.interpolate(part, size = (h, w), mode = 'bilinear', antialias = True)

        return latent, int(self.labels[index])

def latent_decoder(name, scaling_factor, batch_size = 8):
    """latents [b 4 h w] -> images [b 3 8h 8w] in [0, 1]; batch_size bounds the memory."""
    vae = load_vae(name)

    def to_image(latents):
        vae.to(latents.device)
        images = [vae.decode(part / scaling_factor).sample for part in latents.split(batch_size)]
        return (cat(images) + 1) / 2

    return to_image

# what both trainings share

def load_dataset(args, space, augment, decodes):
    """The dataset, and what turns its samples into images in [0, 1]: None if they are images, or not decodes."""
    if space == 'pixel':
        return ClassFolders(args.data, args.image_size, augment), None

    dataset = LatentDataset(args.data, augment)

    if not decodes:
        return dataset, None

    vae = args.vae if args.vae is not None else dataset.manifest['vae']
    return dataset, latent_decoder(vae, dataset.scaling_factor)

def add_run_options(parser, results_folder):
    parser.add_argument(
        '--image-size', type = int, default = 256,
        help = 'of the pixels; latents are as they were encoded'
    )
    parser.add_argument(
        '--vae', default = None,
        help = 'name or folder of the VAE that decodes latents for the sample grids, None for the one that encoded them'
    )
    parser.add_argument('--results-folder', default = results_folder, help = 'where everything is written')
    parser.add_argument('--seed', type = int, default = 0, help = 'of the whole run')
    parser.add_argument('--num-workers', type = int, default = 8, help = 'data loading processes for each GPU')
    parser.add_argument('--gradient-accumulation-steps', type = int, default = 1, help = 'batches per optimiser step')
    parser.add_argument(
        '--mixed-precision', choices = ('no', 'bf16'), default = None,
        help = 'None for that of accelerate launch (which sets one, no, unless it is told otherwise), '
               'or else bf16 where the GPU has it'
    )
    parser.add_argument('--compile', action = 'store_true', help = 'compile the model with torch.compile')
    parser.add_argument(
        '--sample-every', type = int, default = 1_000,
        help = 'steps between sample grids in samples/, 0 for none (the VAE is not needed then)'
    )
    parser.add_argument(
        '--save-every', type = int, default = 1_000,
        help = 'steps between checkpoints in checkpoints/, 0 for none'
    )
    parser.add_argument(
        '--keep-checkpoints', type = int, default = 3,
        help = 'the newest that stay; one of a pixel preset has the queues of all processes, 51 GB each'
    )
    parser.add_argument(
        '--resume', default = None,
        help = "a checkpoint folder to go on from, or 'latest' (from the beginning if there is none)"
    )
    parser.add_argument('--cpu', action = 'store_true', help = 'run on the cpu even where there is a GPU')

def run_settings(args):
    """The options above as arguments of a trainer; what is None stays the trainer's own."""
    names = (
        'results_folder', 'seed', 'num_workers', 'gradient_accumulation_steps', 'mixed_precision', 'compile',
        'sample_every', 'save_every', 'keep_checkpoints', 'cpu'
    )
    return given(args, names) | dict(resume_from_checkpoint = args.resume)

def given(args, names):
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
