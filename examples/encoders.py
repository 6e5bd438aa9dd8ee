"""Encoders for train_images.py: a small classifier that is trained on the images themselves, and large ones by name."""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import cat, nn, stack
from tqdm import tqdm

from drifting_pytorch import BackboneFeatures, ConvNeXtFeatures
from drifting_pytorch.drifting import map_features, seeded

def details(x):
    """How much there is of fine and of less fine detail in images x, and where, {name: [b f d]}.

    Samples are blurred without: to a distance, detail in the wrong place is worse than none.
    """
    blurred = [F.interpolate(F.avg_pool2d(x, k), x.shape[-2:], mode = 'bilinear') for k in (2, 4)]
    features = {}

    for i, (sharper, softer) in enumerate(pairwise([x, *blurred])):
        features |= map_features(f'detail{i}', sharper - softer, ('mean_std', '4x4'))
        del features[f'detail{i}_mean']                                 # it is zero

    return features

class Classifier(nn.Module):
    """Of classes and quarter turns, so that there is something to learn without classes too.

    It has no norms, so a picture without contrast does no harm. Next to details, features of single locations of its
    maps made samples worse.
    """

    def __init__(self, image_size, channels, num_classes, dim = 32, with_locations = True):
        super().__init__()
        self.sets = ('locations', 'mean_std', '2x2') if with_locations else ('mean_std', '2x2')
        self.num_classes = num_classes or 1
        self.convs = nn.ModuleList()
        dim_in, side = channels * 4, image_size // 2

        while side > 4 or not self.convs:
            self.convs.append(nn.Conv2d(dim_in, dim, 3, 2, 1))
            dim_in, dim, side = dim, dim * 2, (side + 1) // 2

        self.to_vector = nn.Sequential(nn.Flatten(), nn.Linear(dim_in * side ** 2, 64), nn.ReLU())
        self.head = nn.Linear(64, self.num_classes * 4)

    def maps(self, x):
        x, maps = F.pixel_unshuffle(x, 2), []

        for conv in self.convs:
            x = F.relu(conv(x))
            maps.append(x)

        return maps

    def forward(self, x):
        """Vectors [b 64]: what the judge compares."""
        return self.to_vector(self.maps(x)[-1])

    def features(self, x):
        """The last layer, and mean and deviation of maps and of their parts: textures, {name: [b f d]}."""
        maps = self.maps(x)
        features = dict(vector = rearrange(self.to_vector(maps[-1]), 'b d -> b 1 d'))

        for i, feature_map in enumerate(maps):
            features |= map_features(f'map{i}', feature_map, self.sets)

        return features

    @torch.no_grad()
    def accuracy(self, images, labels):
        """The share of upright images in which it sees their classes."""
        logits = cat([self.head(self(x.to(self.head.weight.device))) for x in images.split(250)])
        return (logits[:, ::4].argmax(dim = -1).cpu() == labels).double().mean().item()

    def train_on(self, pictures, num_steps, seed, progress_bar, batch_size = 64):
        generator = seeded(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr = 2e-3, weight_decay = 0.05)

        for step in tqdm(range(num_steps), desc = seed, disable = not progress_bar):
            index = torch.randint(len(pictures), (batch_size,), generator = generator)
            turns = torch.randint(4, (batch_size,), generator = generator)
            shift = torch.randint(-2, 3, (2,), generator = generator).tolist()
            images = pictures.batch(index).roll(shift, dims = (2, 3))
            images = stack([image.rot90(turn, (1, 2)) for image, turn in zip(images, turns.tolist(), strict = True)])
            labels = pictures.labels[index] * 4 + turns
            images, labels = (t.to(self.head.weight.device) for t in (images, labels))
            optimizer.param_groups[0]['lr'] = 2e-3 * min(1, 2 - 2 * step / num_steps)
            optimizer.zero_grad()
            F.cross_entropy(self.head(self(images)), labels).backward()
            optimizer.step()

class PatchTokens(nn.Module):
    """Of a transformer of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state

def dinov2():
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError('DINOv2 needs transformers: pip install "drifting-pytorch[convnext]"') from error

    return BackboneFeatures(PatchTokens(AutoModel.from_pretrained('facebook/dinov2-small')), num_prefix_tokens = 1)

PRETRAINED = dict(convnext = cache(ConvNeXtFeatures.from_pretrained), dinov2 = cache(dinov2))
