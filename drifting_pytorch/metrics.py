"""How good samples are: the Frechet distance, precision and recall, in features of any encoder."""
import numpy as np
import torch

from drifting_pytorch.drifting import check, check_floating, exists

def frechet_distance(a, b):
    """Between the Gaussians fitted to a [n d] and b [m d]."""
    cov_a, cov_b = (np.atleast_2d(np.cov(t, rowvar = False)) for t in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min = 0))
    roots = np.sqrt(np.linalg.eigvalsh(root.T @ cov_b @ root).clip(min = 0))  # their sum: trace of the matrix root
    means = ((a.mean(axis = 0) - b.mean(axis = 0)) ** 2).sum()
    return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())

def coverage(a, b, k = 3):
    """The share of a [n d] within the k-th neighbour distance of some b [m d] (Kynkaanniemi et al.)."""
    a, b = (torch.as_tensor(t).double() for t in (a, b))
    covered = torch.zeros(len(a), dtype = torch.bool, device = a.device)
    for some in b.split(1_000):  # all at once are 80 GB of 50,000
        to_a, to_b = (torch.cdist(some, t, compute_mode = 'use_mm_for_euclid_dist') for t in (a, b))
        radius = to_b.kthvalue(k + 1, keepdim = True).values  # the nearest is itself
        covered |= (to_a <= radius).any(dim = 0)
    return float(covered.double().mean())

def inception_features(weights = None):
    """Images in [-1, 1] to [b 2048], in which the Frechet distance is the FID. weights: a file, None to download it."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError('Inception is that of torch-fidelity: pip install "drifting-pytorch[eval]"') from error
    net = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'], weights)
    return lambda x: net.to(x.device)(((x + 1) * 127.5).clamp(0, 255).byte().expand(-1, 3, -1, -1))[0]

class Evaluation:
    """Compares samples with real images, best with those that the training did not see. Call it with Trainer.sample.

    real: images [n ch h w] in [-1, 1], or a dataset of (image, label); labels [n]: None without classes.
    features: images to vectors [b d], or an encoder with .features, of which all that end in 'mean' are joined.
        A Module is put into eval mode.
    Returns frechet (0: alike), precision (are samples realistic) and recall (are there all kinds). Classes are as
    frequent as among real images. Raises ValueError for fewer than four images or samples, what does not fit, nan.
    """
    def __init__(self, real, features, *, labels = None, num_samples = 1_000, batch_size = 64, seed = 0):
        self.features, self.options = features, dict(seed = seed, batch_size = batch_size)
        self.asked, places = dict(num_samples = num_samples), torch.arange(num_samples) * len(real) // num_samples
        if exists(labels):
            check(len(labels) == len(real), f'{len(labels)} labels of {len(real)} real images')
            self.asked = dict(labels = torch.as_tensor(labels).sort().values[places])
        if not torch.is_tensor(real):
            real = torch.stack([real[i][0] for i in range(len(real))])
        self.real = self.encode(real)

    @torch.no_grad()
    def encode(self, images):
        """Their features [n d], float64."""
        check_floating('images', images, 'expected numbers in [-1, 1]')
        owner, parts = getattr(self.features, '__self__', self.features), []  # of a method
        if isinstance(owner, torch.nn.Module):
            owner.eval()
        own = next(iter(getattr(owner, 'parameters', tuple)()), images)
        for batch in images.split(self.options['batch_size']):
            found = getattr(self.features, 'features', self.features)(batch.to(own.device))
            if isinstance(found, dict):
                found = torch.cat([t.flatten(1) for name, t in found.items() if name.endswith('mean')], dim = 1)
            parts.append(found.cpu().double())
        features = torch.cat(parts).numpy()
        fits = features.ndim == 2 and len(features) == len(images) > 3 and np.isfinite(features).all()
        check(fits, f'features must be finite, [4 or more, d], a row per image: got {features.shape} of {len(images)}')
        return features

    def compare(self, images):
        """The same of any images [n ch h w]."""
        ours, real = self.encode(images), self.real
        found = dict(precision = coverage(ours, real), recall = coverage(real, ours))
        return dict(frechet = frechet_distance(ours, real), **found)

    def __call__(self, sample):
        return self.compare(sample(**self.asked, **self.options))
