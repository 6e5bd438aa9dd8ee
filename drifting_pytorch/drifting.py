"""Drifting models: one-step generators trained by a drifting field.

Generative Modeling via Drifting, Deng, Li, Li, Du, He, https://arxiv.org/abs/2602.04770

The file reads top to bottom like the paper: the field (Eq. 8-12, Algorithm 2), the loss (Eq. 6, 13, 14, A.5-A.7), the generator
(A.2), the sample queue (A.8), the trainer (A.9) and the reader of the authors' published weights. Where the paper and the
authors' release differ, the release is the default and the line says so (`# release`); a decision that both leave open is
tagged `# open`.
"""

import os
import json
import math
import random
import shutil
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, cat, stack, Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.utils.data import DataLoader, Sampler

import einx
import jaxtyping
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import reduce as reduce_over_processes
from beartype import beartype
from einops import rearrange, reduce, repeat
from ema_pytorch import EMA
from PIL import Image
from rotary_embedding_torch import RotaryEmbedding
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from x_transformers.x_transformers import Attention, FeedForward, RMSNorm

# ───────────────────────────────────────────────────────────────────────────────
# 1. helpers
# ───────────────────────────────────────────────────────────────────────────────

# dimension letters, everywhere in this file
#
# b - batch                          n m - points
# c - class groups in a step (N_c)   f - feature locations (pixels, tokens) of one feature map
# g - generated per group (N_neg)    d - feature dimension
# p - positives per group (N_pos)    s - style tokens
# u - unconditional per group        ch h w - channels, height and width of an image
# y - every sample that acts on the generated ones: [positives | generated | unconditional]

def exists(val):
    return val is not None

def default(val, d):
    return val if exists(val) else d

# shapes in signatures are checked by jaxtyping + beartype (@typecheck) when DRIFTING_TYPECHECK=1 is set before the import.
# the public functions are checked by hand instead, always, with errors of one line that say what to do

class Shaped:
    def __init__(self, dtype):
        self.dtype = dtype

    def __getitem__(self, shape):
        return self.dtype[Tensor, shape]

Float, Int = Shaped(jaxtyping.Float), Shaped(jaxtyping.Int)

def typecheck(fn):
    enabled = os.environ.get('DRIFTING_TYPECHECK', '0') not in ('', '0')
    return jaxtyping.jaxtyped(fn, typechecker = beartype) if enabled else fn

def check(condition, message):
    if not condition:
        raise ValueError(message)

def can_read(t):
    """Whether looking at the values of t is free: on an accelerator it would stall the step, in a compiled graph it would break it."""
    return t.device.type == 'cpu' and not torch.compiler.is_compiling() and t.numel() > 0

def check_range(name, t, low, high = math.inf):
    if can_read(t) and not ((t >= low) & (t <= high) & t.isfinite()).all():
        raise ValueError(f'{name} must be finite and in {low} .. {high}, got {t.min()} .. {t.max()}')

def check_labels(labels, num_classes, batch):
    check(labels.shape == (batch,), f'labels has shape {tuple(labels.shape)}, expected ({batch},)')
    check(not labels.is_floating_point(), f'labels must be integers, got {labels.dtype}')
    check_range('labels', labels, 0, num_classes - 1)

def check_points(ndim = None, **points):
    """Point sets [... n d] by name (None is left out): floating, not empty, finite, of the same groups and feature dimension."""
    points = {name: t for name, t in points.items() if exists(t)}
    (first, ref), *_ = points.items()

    for name, t in points.items():
        given = f'{name} has shape {tuple(t.shape)}'
        mismatch = f'{given} but {first} has shape {tuple(ref.shape)}'

        check(t.is_floating_point(), f'{name} must be a floating point tensor, got {t.dtype}: convert it with .float()')
        check(t.ndim == ndim if exists(ndim) else t.ndim >= 2, f'{given}, expected {default(ndim, "at least 2")} dimensions, the last two (samples, feature dim)')
        check(t.numel() > 0, f'{given}: empty set, expected at least one sample and one feature')
        check(t.shape[:-2] == ref.shape[:-2], f'{mismatch}: the leading (group) dimensions must be equal, nothing is broadcast')
        check(t.shape[-1] == ref.shape[-1], f'{mismatch}: the feature dimension (last) must be equal')
        check(not can_read(t) or t.isfinite().all(), f'{name} has non-finite values (nan or inf)')

def full_precision(t):
    """Half precision features are computed as they come, the field in float32 (float64 stays)."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()

def sum_over_processes(t):
    return reduce_over_processes(t, 'sum') if is_initialized() else t

def seed_for(*key):
    """A 63-bit seed from any key, for example (seed, step, 'noise'): every draw of a run is a function of its place in the run."""
    return random.Random(repr(key)).getrandbits(63)

def seeded(*key, device = 'cpu'):
    return torch.Generator(device).manual_seed(seed_for(*key))

# ───────────────────────────────────────────────────────────────────────────────
# 2. drift field - Eq. 8-12, Algorithm 2, B.2, Table 1
# ───────────────────────────────────────────────────────────────────────────────

def centered(x, y):
    """Move the origin to the mean of y: the field does not change, and the Gram trick below loses no digits to a common offset."""
    center = reduce(y, '... y d -> ... 1 d', 'mean')
    return x - center, y - center

@typecheck
def pairwise_distance(
    x: Float['... n d'],
    y: Float['... y d'],
    min_dist_sq: float = 0.
) -> Float['... n y']:
    """Euclidean distances through one matrix product, |x|^2 + |y|^2 - 2 x.y. Centre the points first."""
    x_sq, y_sq = (reduce(t ** 2, '... d -> ...', 'sum') for t in (x, y))
    dist_sq = einx.add('... n, ... y -> ... n y', x_sq, y_sq) - 2 * x @ y.mT
    return dist_sq.clamp(min = min_dist_sq).sqrt()

class DriftField(Module):
    """The drifting field V_{p,q}(x): where each point should move, towards the positives and away from the negatives (Algorithm 2).

    It is anti-symmetric, V_{p,q} = -V_{q,p} (so V = 0 when p = q), and invariant to translation.

    kernel: 'laplace', exp(-|x - y| / temperature) (paper), or 'gaussian', exp(-|x - y|^2 / (2 temperature^2)).
    normalize: what turns the kernel into affinities (Table 11). 'both', the geometric mean of the softmax over y and the softmax over x
        (paper); 'y', the softmax over y only; 'none', the kernel itself, which underflows where distances far exceed the temperature.
    attraction, repulsion: the factors a, b of a V+ - b V- (Table 1). Anything but a = b breaks the anti-symmetry, and the training.
    """

    def __init__(
        self,
        *,
        kernel = 'laplace',
        normalize = 'both',
        attraction = 1.,
        repulsion = 1.
    ):
        super().__init__()
        check(kernel in ('laplace', 'gaussian'), f"kernel must be 'laplace' or 'gaussian', got {kernel!r}")
        check(normalize in ('both', 'y', 'none'), f"normalize must be 'both', 'y' or 'none', got {normalize!r}")

        self.kernel = kernel
        self.normalize = normalize
        self.attraction = attraction
        self.repulsion = repulsion

    def extra_repr(self):
        return f'kernel = {self.kernel!r}, normalize = {self.normalize!r}, attraction = {self.attraction}, repulsion = {self.repulsion}'

    @typecheck
    def coefficients(
        self,
        dist: Float['... n y'],            # distances to [positives | negatives]
        num_pos: int,
        temperature: float,
        weight: Float['... y'] | None = None,
        affinity_floor: float = 0.
    ) -> Float['... n y']:
        """The field as coefficients W, V(x) = sum_y W(x, y) (y - x): positive on positives, negative on negatives, zero sum if a = b."""

        logits = -dist / temperature if self.kernel == 'laplace' else -0.5 * (dist / temperature) ** 2

        over_y = logits.softmax(dim = -1) if self.normalize != 'none' else logits.exp()
        over_x = logits.softmax(dim = -2) if self.normalize == 'both' else over_y

        A = (over_y * over_x).clamp(min = affinity_floor).sqrt()

        if exists(weight):
            A = einx.multiply('... n y, ... y -> ... n y', A, weight)  # release: guidance weights the normalised affinity

        A_pos, A_neg = A[..., :num_pos], A[..., num_pos:]

        W_pos = A_pos * reduce(A_neg, '... n m -> ... n 1', 'sum')
        W_neg = A_neg * reduce(A_pos, '... n p -> ... n 1', 'sum')

        return cat((self.attraction * W_pos, -self.repulsion * W_neg), dim = -1)

    @staticmethod
    def apply_coefficients(W, x, y):
        # open: with a != b the factors act on the mean-shift vectors V+ and V- (Eq. 10), so translation invariance stays
        return W @ y - reduce(W, '... n y -> ... n 1', 'sum') * x

    @torch.no_grad()
    def forward(
        self,
        x: Float['... n d'],
        y_pos: Float['... p d'],
        y_neg: Float['... m d'] | None = None,
        *,
        temperature
    ) -> Float['... n d']:
        """Algorithm 2 at one temperature.

        y_neg None: the negatives are x itself, with self pairs masked.
        temperature: in the units of the distances, above 0.
        Returns V. No gradient flows through it: train on mse(x, (x + V).detach()) (Eq. 6).
        Raises ValueError for wrong ranks, unequal leading or feature dimensions, empty sets, non-finite values, temperature <= 0.
        """
        check_points(x = x, y_pos = y_pos, y_neg = y_neg)
        check(temperature > 0, f'temperature must be above 0, got {temperature}')

        x, num_pos = full_precision(x), y_pos.shape[-2]
        x, y = centered(x, cat((y_pos, default(y_neg, x)), dim = -2).to(x.dtype))

        dist = pairwise_distance(x, y)

        if not exists(y_neg):
            dist[..., num_pos:].diagonal(dim1 = -2, dim2 = -1).add_(1e6 * temperature)   # mask self

        W = self.coefficients(dist, num_pos, temperature)
        return self.apply_coefficients(W, x, y)

# ───────────────────────────────────────────────────────────────────────────────
# 3. drift loss - Eq. 6, 13, 14, A.5-A.7
# ───────────────────────────────────────────────────────────────────────────────

class DriftStats(NamedTuple):
    scale: Tensor       # S, the mean distance: what a temperature of 1 means on this feature
    drift_rms: dict     # {temperature: lambda}, root mean square of V before it is normalised: this falls as training goes, the loss does not

class Breakdown(NamedTuple):
    losses: dict        # {feature name: loss}
    stats: dict         # {feature name: DriftStats}

def drift_loss(
    gen: Float['b g d'],
    pos: Float['b p d'],
    uncond: Float['b u d'] | None = None,
    *,
    uncond_weight: Float['b u'] | None = None,
    temperatures = (0.02, 0.05, 0.2),   # A.6, relative to the mean distance S
    field: DriftField | None = None,
    affinity_floor = 1e-6,              # release: of softmax * softmax, before the root. 0 for low-dimensional data, which it freezes
    self_distance = 100.,               # release: added to the distance of a generated sample to itself, in units of S
    min_scale = 1e-3,                   # release: of S and of S / sqrt(d)
    min_dist_sq = 1e-8,                 # release
    min_drift_sq = 1e-8                 # release: of the mean of V^2
) -> tuple[Float['b'], DriftStats]:
    """The drifting loss on one feature (A.6): mean over samples and dimensions of |x - stopgrad(x + V)|^2, features in units of S / sqrt(d).

    gen generated, pos real, uncond real samples of any class with weights uncond_weight >= 0 (None: ones).
    b counts independent problems (class group x location); the statistics, frozen, are shared by all of them and by all processes.
    field: the DriftField, by default Algorithm 2 as in the paper.

    Returns the loss of each problem and DriftStats. In value the loss is the mean of V^2, its gradient with respect to gen / (S / sqrt(d)) is -2 V / n.
    Each temperature's field is divided by its own root mean square, so the loss stays near a constant: watch stats.drift_rms.
    Raises ValueError for wrong ranks, unequal groups or dimensions, empty sets, non-finite values, negative weights, temperatures <= 0.
    """
    check_points(3, gen = gen, pos = pos, uncond = uncond)
    check(len(temperatures) > 0 and min(temperatures) > 0, f'temperatures must be one or more numbers above 0, got {temperatures}')
    check(not exists(uncond_weight) or exists(uncond), 'uncond_weight was given without uncond: pass the unconditional samples that it weights')

    field = default(field, DriftField())
    gen = full_precision(gen)

    with torch.no_grad(), torch.autocast(gen.device.type, enabled = False):
        (b, g, d), p = gen.shape, pos.shape[1]

        y = cat([t.to(gen.dtype) for t in (pos, gen, uncond) if exists(t)], dim = 1)
        x, y = centered(gen, y)

        weight = x.new_ones(y.shape[:2])

        if exists(uncond_weight):
            check(uncond_weight.shape == uncond.shape[:2], f'uncond_weight has shape {tuple(uncond_weight.shape)}, expected {tuple(uncond.shape[:2])}')
            check_range('uncond_weight', uncond_weight, 0)
            weight[:, p + g:] = uncond_weight

        # one scale for the feature: the weighted mean distance, everything below is relative to it

        dist = pairwise_distance(x, y, min_dist_sq)                                                # b g y

        weighted_dist = einx.multiply('b g y, b y -> b g y', dist, weight)
        sum_dist, sum_weight = sum_over_processes(stack((weighted_dist.sum(), weight.sum() * g)))
        scale = sum_dist / sum_weight

        dist = dist / scale.clamp(min = min_scale)
        dist[:, :, p:p + g].diagonal(dim1 = -2, dim2 = -1).add_(self_distance)                     # mask self

        feature_scale = (scale / d ** 0.5).clamp(min = min_scale)
        x, y = x / feature_scale, y / feature_scale

        # the fields of all temperatures, each normalised to unit root mean square, add up

        drift, drift_rms = torch.zeros_like(x), {}

        for temperature in temperatures:
            W = field.coefficients(dist, p, temperature, weight, affinity_floor)
            V = field.apply_coefficients(W, x, y)                                                  # b g d

            sum_sq, count = sum_over_processes(stack(((V ** 2).sum(), V.new_tensor(V.numel()))))
            mean_sq = sum_sq / count

            drift += V / mean_sq.clamp(min = min_drift_sq).sqrt()
            drift_rms[temperature] = mean_sq.sqrt()

    # Eq. 6, x - stopgrad(x + V), with x - stopgrad(x) taken first: it is an exact zero that carries the gradient

    residual = (gen - gen.detach()) / feature_scale - drift
    return reduce(residual ** 2, 'b g d -> b', 'mean'), DriftStats(scale, drift_rms)

class FeatureDriftLoss(Module):
    """The drifting loss summed over features (Eq. 13, 14, A.5), with classifier-free guidance by unconditional negatives (A.7).

    encoder: None (raw samples), a Module with .features(x), or a callable; both give {name: [b f d]} for x [b ...]. A Module is frozen here.
    raw: add the flattened sample itself as feature 'global' (release: always).
    Everything else goes to `drift_loss`: temperatures, field, affinity_floor and the other clamps.
    """

    def __init__(self, encoder = None, *, raw = True, **drift_loss_kwargs):
        super().__init__()
        check(raw or exists(encoder), 'raw = False needs an encoder: there would be no feature at all')
        check(encoder is None or callable(encoder) or hasattr(encoder, 'features'), f'encoder must be None, a Module with .features(x) or a callable, got {type(encoder).__name__}')

        self.encoder = encoder.eval().requires_grad_(False) if isinstance(encoder, Module) else encoder
        self.raw = raw
        self.drift_loss_kwargs = drift_loss_kwargs

    def train(self, mode = True):
        return super().train(False)    # a frozen encoder stays in eval mode

    def features(self, x):
        """{name: [b f d]} of samples x [b ...]."""
        encode = getattr(self.encoder, 'features', self.encoder)
        features = encode(x) if exists(encode) else {}

        check(isinstance(features, dict), f'the encoder must return a dict {{name: [b f d]}}, got {type(features).__name__}')
        return {**features, **({'global': rearrange(x, 'b ... -> b 1 (...)')} if self.raw else {})}

    def forward(
        self,
        gen: Float['c g ...'],
        pos: Float['c p ...'],
        uncond: Float['c u ...'] | None = None,
        alpha: Float['c'] | None = None         # guidance scale of each group, >= 1
    ) -> tuple[Float[''], Breakdown]:
        """The loss of a step: c class groups, generated against real samples, and unconditional ones to be guided away from.

        Gradients flow to gen, through the encoder. Returns the loss and its Breakdown per feature.
        Raises ValueError for mismatched groups or sample shapes, alpha below 1, guidance without unconditional samples, and all that drift_loss refuses.
        """
        for name, t in dict(gen = gen, pos = pos, uncond = uncond).items():
            if exists(t):
                given = f'{name} has shape {tuple(t.shape)}'
                check(t.ndim >= 3 and t.numel() > 0, f'{given}, expected [groups, samples per group, ...sample shape], at least one of each')
                check(t.shape[0] == gen.shape[0] and t.shape[2:] == gen.shape[2:], f'{given} but gen has shape {tuple(gen.shape)}: groups and sample shape must be equal')

        c, g = gen.shape[:2]
        check(exists(alpha) or not exists(uncond), 'uncond was given without alpha: pass the guidance scale [groups], 1 is no guidance')

        if exists(alpha):
            check(alpha.shape == (c,), f'alpha has shape {tuple(alpha.shape)}, expected ({c},), one guidance scale per group')
            check_range('alpha', alpha, 1, math.inf if exists(uncond) else 1)     # no guidance without unconditional samples

        if exists(uncond):
            u = uncond.shape[1]
            uncond_weight = repeat((alpha - 1) * (g - 1) / u, 'c -> c u', u = u)    # A.7

        gen_features = self.features(rearrange(gen, 'c g ... -> (c g) ...'))

        with torch.no_grad():
            real = pos if not exists(uncond) else cat((pos, uncond), dim = 1)
            real_features = self.features(rearrange(real, 'c r ... -> (c r) ...'))

        losses, stats = {}, {}

        for name, gen_feature in gen_features.items():
            check(gen_feature.ndim == 3, f'feature {name!r} has shape {tuple(gen_feature.shape)}, expected [batch, locations, feature dim]')

            # every location of every group is a problem of its own

            f = gen_feature.shape[1]
            gen_points, real_points = (rearrange(t, '(c n) f d -> (c f) n d', c = c) for t in (gen_feature, real_features[name]))
            pos_points, uncond_points = real_points.split((pos.shape[1], real.shape[1] - pos.shape[1]), dim = 1)

            loss, stats[name] = drift_loss(
                gen_points,
                pos_points,
                uncond_points if exists(uncond) else None,
                uncond_weight = repeat(uncond_weight, 'c u -> (c f) u', f = f) if exists(uncond) else None,
                **self.drift_loss_kwargs
            )

            losses[name] = loss.mean()

        return sum(losses.values()), Breakdown(losses, stats)

# ───────────────────────────────────────────────────────────────────────────────
# 5. generator - A.2, Table 8
# ───────────────────────────────────────────────────────────────────────────────

def modulate(x, shift, scale):
    return einx.multiply('b n d, b d -> b n d', x, 1 + scale) + rearrange(shift, 'b d -> b 1 d')

class Modulation(Module):
    """adaLN-zero: shifts, scales and gates from the condition, zero at initialisation, computed in float32 under any autocast."""

    def __init__(self, dim, num):
        super().__init__()
        self.num = num
        self.linear = nn.Linear(dim, dim * num)

    def forward(self, cond):                                                        # b d
        with torch.autocast(cond.device.type, enabled = False):
            return self.linear(F.silu(cond.float())).chunk(self.num, dim = -1)      # num times b d

class Block(Module):
    """Attention and SwiGLU of x-transformers inside adaLN-zero. The release has a bias in every linear, so they are added around the attention."""

    def __init__(self, dim, heads, dim_head, dim_ff):
        super().__init__()
        self.modulation = Modulation(dim, 6)

        self.attn_norm = RMSNorm(dim)
        self.attn = Attention(dim, heads = heads, dim_head = dim_head, qk_rmsnorm = True, flash = True, project_out = True)

        self.q_bias, self.k_bias, self.v_bias = (Parameter(torch.zeros(heads * dim_head)) for _ in range(3))
        self.out_bias = Parameter(torch.zeros(dim))

        self.ff_norm = RMSNorm(dim)
        self.ff = FeedForward(dim, mult = (dim_ff + 0.5) / dim, glu = True, swish = True)    # inner width is int(dim * mult)

    @typecheck
    def forward(self, x: Float['b n d'], cond: Float['b d'], rotary: Float['1 n dh']) -> Float['b n d']:
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = self.modulation(cond)

        h = modulate(self.attn_norm(x), attn_shift, attn_scale)                                        # b n d
        h = self.attn(h, rotary_pos_emb = (rotary, None), q_delta = self.q_bias, k_delta = self.k_bias, v_delta = self.v_bias)
        x = x + einx.multiply('b n d, b d -> b n d', h + self.out_bias, attn_gate)

        h = modulate(self.ff_norm(x), ff_shift, ff_scale)
        return x + einx.multiply('b n d, b d -> b n d', self.ff(h), ff_gate)

def sinusoidal(t, dim):
    """[...] -> [... dim], cosines first, geometric frequencies 1 .. 1/10000."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device = t.device) / (dim // 2))
    angles = einx.multiply('..., f -> ... f', t.float(), freqs)
    return cat((angles.cos(), angles.sin()), dim = -1)

def sincos_2d(size, dim):
    """[size * size, dim]: the fixed sine-cosine embedding of a grid, half of the dimensions for each axis, that initialises the learned one."""
    grid = torch.arange(size).float()
    axis = sinusoidal(grid, dim // 2)
    sin_first = cat(axis.chunk(2, dim = -1)[::-1], dim = -1)
    rows, cols = repeat(sin_first, 'h d -> (h w) d', w = size), repeat(sin_first, 'w d -> (h w) d', h = size)
    return cat((cols, rows), dim = -1)

class DriftingGenerator(Module):
    """The one-step generator: a DiT that maps noise to samples in a single forward pass, given class, guidance scale and style (A.2).

    image_size, channels, patch_size: samples are [b channels image_size image_size], cut into patches of patch_size x patch_size.
    num_classes: None for an unconditional generator.
    num_register_tokens: in-context tokens in front of the patches, made from the condition.
    num_style_tokens, style_codebook_size: random style embeddings, the sum of one entry of each table (0 tokens: none).
    share_style_codebook: one table for all style tokens (paper) instead of one each (release).
    """

    def __init__(
        self,
        *,
        image_size,
        channels,
        patch_size,
        dim,
        depth,
        heads,
        num_classes = None,
        num_register_tokens = 16,
        num_style_tokens = 32,
        style_codebook_size = 64,
        share_style_codebook = False,
        ff_mult = 4.
    ):
        super().__init__()
        check(image_size % patch_size == 0, f'image_size {image_size} must be a multiple of patch_size {patch_size}')
        check(dim % (2 * heads) == 0 and dim % 4 == 0, f'dim {dim} must be a multiple of 4 and of twice the heads {heads}: rotary embeddings turn pairs')
        check(num_classes is None or num_classes > 0, f'num_classes must be above 0, or None for an unconditional generator, got {num_classes}')

        self.noise_shape = (channels, image_size, image_size)
        self.num_classes, self.patch_size, self.num_style_tokens = num_classes, patch_size, num_style_tokens

        size, dim_patch, dim_head = image_size // patch_size, channels * patch_size ** 2, dim // heads
        dim_ff = math.ceil(int(2 / 3 * ff_mult * dim) / 32) * 32                                      # release

        # condition. All style tables are rows of one embedding, each token looks into its own (paper: all into the same)

        self.class_embed = nn.Embedding(num_classes, dim) if exists(num_classes) else None
        self.style_embed = nn.Embedding(style_codebook_size * (1 if share_style_codebook else num_style_tokens), dim)
        self.style_codebook_size, self.style_stride = style_codebook_size, 0 if share_style_codebook else style_codebook_size
        self.alpha_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), RMSNorm(dim))

        # tokens: [registers | patches], rotary positions over both (release: 1d)

        self.patch_embed = nn.Linear(dim_patch, dim)
        self.pos_embed = Parameter(sincos_2d(size, dim))
        self.register_proj = nn.Linear(dim, dim)
        self.register_embed = Parameter(torch.empty(num_register_tokens, dim))

        rotary = RotaryEmbedding(dim_head, cache_if_possible = False)(torch.arange(num_register_tokens + size ** 2)).detach()
        self.register_buffer('rotary', rearrange(rotary, 'n d -> 1 n d'), persistent = False)

        # transformer

        self.blocks = ModuleList([Block(dim, heads, dim_head, dim_ff) for _ in range(depth)])
        self.final_modulation = Modulation(dim, 2)
        self.final_norm = RMSNorm(dim)
        self.to_patch = nn.Linear(dim, dim_patch)

        self.init_weights()

    @classmethod
    def from_preset(cls, name, **kwargs):
        """One of Table 8's sizes by name, see PRESETS; keyword arguments override it."""
        check(name in PRESETS, f'unknown preset {name!r}, expected one of {", ".join(PRESETS)}')
        return cls(**{**PRESETS[name], **kwargs})

    @classmethod
    def from_pretrained(cls, folder):
        """The published generator in a local artifact folder of the release (metadata.json and ema_params.msgpack), section 8 below."""
        kwargs, state_dict = generator_from_release(*read_release_artifact(folder))
        model = cls(**kwargs)
        load_checked(model, state_dict)
        return model.eval()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if exists(module.bias):
                    nn.init.zeros_(module.bias)

        for embedding in (self.class_embed, self.style_embed):
            if exists(embedding):
                nn.init.normal_(embedding.weight, std = 0.02)

        nn.init.normal_(self.register_embed, std = 0.02)

        # every block starts as the identity, and the output as 0

        for linear in (self.to_patch, *(m.linear for m in self.modules() if isinstance(m, Modulation))):
            nn.init.zeros_(linear.weight)

    def draw_styles(self, num, generator = None):
        """Random style indices [num s], uniform over the codebook."""
        device = generator.device if exists(generator) else self.pos_embed.device
        return torch.randint(self.style_codebook_size, (num, self.num_style_tokens), generator = generator, device = device)

    def condition(self, labels, alpha, styles):
        """The condition vector [b d]: class + styles + guidance scale."""
        tables = self.style_stride * torch.arange(self.num_style_tokens, device = styles.device)
        cond = reduce(self.style_embed(styles + tables), 'b s d -> b d', 'sum')
        cond = cond + 0.02 * self.alpha_embed(sinusoidal(alpha, 256))
        return cond + self.class_embed(labels) if exists(labels) else cond

    def forward(
        self,
        noise: Float['b ch h w'],
        labels: Int['b'] | None = None,         # None when num_classes is None
        alpha: Float['b'] | float = 1.,         # guidance scale, >= 1
        styles: Int['b s'] | None = None        # None: drawn
    ) -> Float['b ch h w']:
        """Noise to samples, one network evaluation. Raises ValueError for wrong shapes, labels or styles out of range, alpha below 1, non-finite values."""
        (b, *shape), p, size = noise.shape, self.patch_size, self.noise_shape[-1] // self.patch_size

        check(tuple(shape) == self.noise_shape, f'noise has shape {tuple(noise.shape)}, expected (batch, {", ".join(map(str, self.noise_shape))})')
        check_range('noise', noise, -math.inf)

        check(exists(labels) == exists(self.num_classes), f'num_classes is {self.num_classes}, so labels {"are needed" if exists(self.num_classes) else "must be None"}')
        if exists(labels):
            check_labels(labels, self.num_classes, b)

        alpha = alpha if torch.is_tensor(alpha) else torch.full((b,), float(alpha), device = noise.device)
        check(alpha.shape == (b,), f'alpha has shape {tuple(alpha.shape)}, expected a number or ({b},)')
        check_range('alpha', alpha, 1)

        styles = styles if exists(styles) else self.draw_styles(b)
        check(styles.shape == (b, self.num_style_tokens), f'styles has shape {tuple(styles.shape)}, expected ({b}, {self.num_style_tokens})')
        check_range('styles', styles, 0, self.style_codebook_size - 1)

        cond = self.condition(labels, alpha, styles)                                                   # b d

        patches = rearrange(noise, 'b ch (h p1) (w p2) -> b (h w) (p1 p2 ch)', p1 = p, p2 = p)
        x = self.patch_embed(patches) + self.pos_embed                                                 # b n d

        registers = einx.add('b d, r d -> b r d', self.register_proj(cond), self.register_embed)
        x = cat((registers, x), dim = 1)                                                               # b (r + n) d

        for block in self.blocks:
            x = block(x, cond, self.rotary)

        x = x[:, registers.shape[1]:]                                                                  # b n d

        patches = self.to_patch(modulate(self.final_norm(x), *self.final_modulation(cond)))            # b n (p1 p2 ch)
        return rearrange(patches, 'b (h w) (p1 p2 ch) -> b ch (h p1) (w p2)', h = size, w = size, p1 = p, p2 = p)

    def sample(self, labels = None, **kwargs):
        """Samples [b ch h w] for labels [b], see sample_from."""
        return sample_from(self, self.noise_shape, labels, **kwargs)

@torch.no_grad()
def sample_from(model, noise_shape, labels = None, *, num_samples = None, alpha = 1., seed = None, batch_size = None):
    """Samples of any generator with the call model(noise, labels, alpha, styles), in eval mode, without gradients.

    labels [b], a tensor or a list, or num_samples for an unconditional generator; alpha: a number >= 1 or [b].
    Noise and styles are drawn on the cpu, so a seed gives the same samples on every device; batch_size only bounds the memory.
    """
    check(exists(labels) != exists(num_samples), 'pass labels to a class-conditional generator, or num_samples to an unconditional one')
    device, training = next(model.parameters()).device, model.training

    labels = torch.as_tensor(labels) if exists(labels) else None
    num = len(labels) if exists(labels) else num_samples

    if exists(labels):
        check_labels(labels, model.num_classes, num)

    generator = torch.Generator()
    generator.manual_seed(seed) if exists(seed) else generator.seed()

    noise = torch.randn(num, *noise_shape, generator = generator)
    styles = model.draw_styles(num, generator) if hasattr(model, 'draw_styles') else None
    alpha = torch.as_tensor(alpha, dtype = torch.float32).expand(num)

    model.eval()

    try:
        starts = range(0, num, default(batch_size, num))
        batches = [[t[i:i + starts.step].to(device) if exists(t) else None for t in (noise, labels, alpha, styles)] for i in starts]
        return cat([model(*batch) for batch in batches])
    finally:
        model.train(training)

PRESETS = {
    'B/2': dict(image_size = 32, channels = 4, patch_size = 2, dim = 768, depth = 12, heads = 12),       # latent
    'L/2': dict(image_size = 32, channels = 4, patch_size = 2, dim = 1024, depth = 24, heads = 16),      # latent
    'B/16': dict(image_size = 256, channels = 3, patch_size = 16, dim = 768, depth = 12, heads = 12),    # pixel
    'L/16': dict(image_size = 256, channels = 3, patch_size = 16, dim = 1024, depth = 24, heads = 16),   # pixel
}

# ───────────────────────────────────────────────────────────────────────────────
# 6. data - A.7, A.8
# ───────────────────────────────────────────────────────────────────────────────

class SampleQueue:
    """The newest real samples of every class, and of all classes together: positives and unconditional samples are drawn from it.

    class_size per class, uncond_size overall (0: none); the oldest leave. Samples are kept on `device`, indices are drawn on the cpu.
    """

    def __init__(self, num_classes = 1, *, class_size = 128, uncond_size = 1000, device = 'cpu'):
        self.num_classes, self.class_size, self.uncond_size, self.device = num_classes, class_size, uncond_size, device
        self.pushed = torch.zeros(num_classes + 1, dtype = torch.long)      # ever pushed, per class and (last) overall
        self.by_class = self.uncond = None                                  # allocated at the first push, when the sample shape is known

    @property
    def filled(self):
        """How many samples each class holds [num_classes], on the cpu."""
        return self.pushed[:-1].clamp(max = self.class_size)

    def push(self, samples, labels = None):
        """samples [b ...] of labels [b] (None: one class). Raises ValueError for labels out of range, other shapes, non-finite samples."""
        b, C = len(samples), self.num_classes
        labels = labels.cpu() if exists(labels) else torch.zeros(b, dtype = torch.long)

        check_labels(labels, C, b)
        check_range('real samples', samples, -math.inf)

        if not exists(self.by_class):
            self.by_class, self.uncond = (samples.new_zeros(*size, *samples.shape[1:], device = self.device) for size in ((C, self.class_size), (self.uncond_size,)))

        check(samples.shape[1:] == self.uncond.shape[1:], f'samples of shape {tuple(samples.shape[1:])} pushed to a queue of {tuple(self.uncond.shape[1:])}')
        samples = samples.to(self.device)

        # the place of each sample among those of its class in this push; of more than fit only the newest stay

        order = labels.argsort(stable = True)
        labels, counts = labels[order], labels.bincount(minlength = C)
        place = torch.arange(b) - (counts.cumsum(dim = 0) - counts)[labels]
        fits = place >= (counts - self.class_size)[labels]

        slot = (self.pushed[labels] + place) % self.class_size
        self.by_class[labels[fits].to(self.device), slot[fits].to(self.device)] = samples[order[fits].to(self.device)]

        if self.uncond_size > 0:
            newest = torch.arange(max(0, b - self.uncond_size), b)
            self.uncond[((self.pushed[-1] + newest) % self.uncond_size).to(self.device)] = samples[newest.to(self.device)]

        self.pushed += cat((counts, counts.sum(dim = 0, keepdim = True)))

    def draw(self, filled, size, num, generator):
        """Indices [c num] without replacement, row i among the first filled[i] of size."""
        keys = torch.rand(len(filled), size, generator = generator)
        keys.masked_fill_(einx.greater_equal('size, c -> c size', torch.arange(size), filled), -1.)
        return keys.topk(num, dim = -1).indices.to(self.device)

    def positives(self, labels, num, generator = None):
        """Real samples [c num ...] of the classes labels [c], drawn without replacement within each group."""
        labels = labels.cpu()
        check_labels(labels, self.num_classes, len(labels))
        filled = self.filled[labels]
        check((filled >= num).all(), f'{num} positives were asked for, but these classes hold fewer (class: samples): {dict(zip(labels[filled < num].tolist(), filled[filled < num].tolist()))}')

        index = self.draw(filled, self.class_size, num, generator)
        return einx.get_at('[class slot] ..., c, c p -> c p ...', self.by_class, labels.to(self.device), index)

    def unconditional(self, groups, num, generator = None):
        """Real samples [groups num ...] of any class, drawn without replacement within each group."""
        filled = self.pushed[-1:].clamp(max = self.uncond_size)
        check(filled >= num, f'{num} unconditional samples were asked for, the queue holds {filled.item()}')
        return self.uncond[self.draw(filled.expand(groups), self.uncond_size, num, generator)]

    def state_dict(self):
        return dict(pushed = self.pushed, by_class = self.by_class, uncond = self.uncond)

    def load_state_dict(self, state):
        saved, own = (*state['by_class'].shape[:2], len(state['uncond'])), (self.num_classes, self.class_size, self.uncond_size)
        check(saved == own, f'the saved queue has (num_classes, class_size, uncond_size) {saved}, this one {own}')
        self.pushed = state['pushed'].cpu()
        self.by_class, self.uncond = (state[name].to(self.device) for name in ('by_class', 'uncond'))

def endless_shuffle(length, *, seed, start = 0):
    """Indices of epoch after epoch, each in an order of its own, from any position on."""
    epoch, offset = divmod(start, length)
    while True:
        yield from torch.randperm(length, generator = seeded(seed, 'epoch', epoch)).tolist()[offset:]
        epoch, offset = epoch + 1, 0

def sample_alpha(num, *, low = 1., high = 4., power = 3., no_cfg_frac = 0., generator = None):
    """Guidance scales [num] (A.7): 1 with probability no_cfg_frac, otherwise of density proportional to alpha^-power on [low, high]."""
    uniform, skip = torch.rand(2, num, generator = generator)
    k = 1 - power

    # inverse of the cumulative density

    alpha = (low ** k + uniform * (high ** k - low ** k)) ** (1 / k) if k != 0 else low * (high / low) ** uniform
    return torch.where(skip < no_cfg_frac, 1., alpha.clamp(low, high))

# ───────────────────────────────────────────────────────────────────────────────
# 7. trainer - A.9
# ───────────────────────────────────────────────────────────────────────────────

def image_grid(images, *, min_size = 48):
    """A Pillow image of images [rows cols ch h w] in [0, 1]; tiny ones are magnified to min_size pixels, without smoothing."""
    ch, h = images.shape[2:4]
    check(ch in (1, 3), f'a picture has 1 or 3 channels, got {ch}')

    pixels = F.pad(images.float().cpu(), (1, 1, 1, 1), value = 1.)
    pixels = rearrange(pixels, 'rows cols ch h w -> (rows h) (cols w) ch').clamp(0, 1).mul(255).round().byte().numpy()

    picture = Image.fromarray(pixels[..., 0] if ch == 1 else pixels)
    zoom = math.ceil(min_size / h)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)

class Trainer:
    """Trains a generator on a map-style dataset of (sample, label), through accelerate (A.8, A.9). The defaults are the paper's ablation setting.

    model: any module with the call model(noise, labels, alpha, styles), an attribute num_classes (None: unconditional, labels are ignored)
        and, if noise does not have the shape of a sample, noise_shape.
    loss_fn: any callable (gen, pos, uncond, alpha) -> (loss, Breakdown), see FeatureDriftLoss; None compares raw samples.

    num_groups, num_gen, num_pos, num_uncond: class groups per step, and generated, positive and unconditional samples per group.
    alpha_range, alpha_power, no_cfg_frac: the distribution of the guidance scale, see sample_alpha; (1, 1) trains without guidance.
    push_size: real samples read per step; class_queue_size, uncond_queue_size: how many stay, see SampleQueue.
    to_image: maps samples to images [b 1|3 h w] in [0, 1] for the grids. None: samples with 1 or 3 channels are in [-1, 1], others give no grid.
    log_every, sample_every, save_every: in steps, 0 for never. All goes into results_folder: metrics.jsonl, samples/, checkpoints/.
    resume_from_checkpoint: a checkpoint folder, or 'latest' (from the beginning if there is none).

    Raises ValueError, before the first step, for settings that contradict each other, a dataset that does not fit them, classes with too few samples.
    """

    def __init__(
        self,
        model,
        loss_fn,
        dataset,
        *,
        num_train_steps = 30_000,
        num_groups = 64,
        num_gen = 64,
        num_pos = 64,
        num_uncond = 16,
        alpha_range = (1., 4.),
        alpha_power = 3.,
        no_cfg_frac = 0.,
        push_size = 64,
        class_queue_size = 128,
        uncond_queue_size = 1000,
        learning_rate = 2e-4,
        lr_warmup_steps = 5_000,
        betas = (0.9, 0.95),
        weight_decay = 0.01,
        max_grad_norm = 2.,
        ema_decay = 0.999,
        gradient_accumulation_steps = 1,
        mixed_precision = None,
        cpu = False,
        num_workers = 0,
        seed = 0,
        log_with = None,
        log_every = 10,
        sample_every = 1_000,
        save_every = 1_000,
        keep_checkpoints = 3,
        results_folder = './results',
        resume_from_checkpoint = None,
        to_image = None,
        progress_bar = True
    ):
        self.config = {name: value for name, value in locals().items() if isinstance(value, (int, float, str, tuple, type(None)))}

        for name in ('num_train_steps', 'num_groups', 'num_gen', 'num_pos', 'push_size', 'gradient_accumulation_steps', 'keep_checkpoints'):
            check(self.config[name] > 0, f'{name} must be above 0, got {self.config[name]}')

        self.accelerator = accelerator = Accelerator(
            gradient_accumulation_steps = gradient_accumulation_steps,
            mixed_precision = mixed_precision,
            cpu = cpu,
            log_with = log_with,
            project_dir = results_folder
        )

        # without classes, or at alpha = 1 throughout, there is nothing to guide away from

        self.num_classes = getattr(model, 'num_classes', None)
        check(1 <= alpha_range[0] <= alpha_range[1], f'alpha_range must be 1 <= low <= high, got {alpha_range}')
        guided = exists(self.num_classes) and alpha_range[1] > 1 and num_uncond > 0

        self.num_uncond = num_uncond if guided else 0
        low, high = alpha_range if guided else (1., 1.)
        self.alpha_kwargs = dict(low = low, high = high, power = alpha_power, no_cfg_frac = no_cfg_frac)

        # data

        world = accelerator.num_processes
        check(num_groups % world == 0 and push_size % world == 0, f'num_groups {num_groups} and push_size {push_size} must be multiples of the {world} processes')
        check(len(dataset) >= push_size, f'the dataset has {len(dataset)} samples, fewer than push_size = {push_size}: lower push_size')
        check(num_pos <= class_queue_size, f'num_pos = {num_pos} does not fit into class_queue_size = {class_queue_size}')
        check(self.num_uncond <= uncond_queue_size, f'num_uncond = {num_uncond} does not fit into uncond_queue_size = {uncond_queue_size}')

        sample, _ = dataset[0]
        is_float = torch.is_tensor(sample) and sample.is_floating_point()
        check(is_float, f'the dataset must yield (floating point tensor, label), its first sample is {getattr(sample, "dtype", type(sample).__name__)}')

        self.sample_shape = tuple(sample.shape)
        self.noise_shape = tuple(getattr(model, 'noise_shape', self.sample_shape))
        self.dataset, self.num_workers = dataset, num_workers
        self.queue = SampleQueue(default(self.num_classes, 1), class_size = class_queue_size, uncond_size = uncond_queue_size if guided else 0, device = accelerator.device)

        # release: AdamW on all parameters, and the plain average of the weights from the start and at every step (the library would warm it up)

        loss_fn = loss_fn if exists(loss_fn) else FeatureDriftLoss()
        self.loss_fn = loss_fn.to(accelerator.device) if isinstance(loss_fn, Module) else loss_fn

        optimizer = torch.optim.AdamW(model.parameters(), lr = learning_rate, betas = betas, weight_decay = weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

        self.ema = EMA(self.generator, beta = ema_decay, min_value = ema_decay, update_after_step = -1, update_every = 1, include_online_model = False, use_foreach = True)
        self.ema.update()

        self.num_train_steps, self.gradient_accumulation_steps, self.seed = num_train_steps, gradient_accumulation_steps, seed
        self.num_groups, self.num_gen, self.num_pos, self.push_size = num_groups, num_gen, num_pos, push_size
        self.learning_rate, self.lr_warmup_steps, self.max_grad_norm = learning_rate, lr_warmup_steps, max_grad_norm
        self.log_every, self.sample_every, self.save_every, self.keep_checkpoints = log_every, sample_every, save_every, keep_checkpoints
        self.to_image, self.hide_bar = to_image, not (progress_bar and accelerator.is_main_process)

        self.results_folder = Path(results_folder)
        self.results_folder.mkdir(parents = True, exist_ok = True)
        self.step = self.samples_read = 0

        if exists(log_with):
            accelerator.init_trackers('drifting-pytorch', config = {name: str(value) for name, value in self.config.items()})

        if exists(resume_from_checkpoint):
            self.load(resume_from_checkpoint)

    @property
    def generator(self):
        return self.accelerator.unwrap_model(self.model)

    # data: every random number is drawn from a seed made of its place in the run, so a resumed run repeats what it would have been

    def batches(self):
        """Real batches (samples, labels) of this process, endlessly, from where the run stands."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        indices = islice(endless_shuffle(len(self.dataset), seed = self.seed, start = self.samples_read), rank, None, world)

        class Indices(Sampler):
            def __iter__(self):
                return indices

        pin_memory = self.accelerator.device.type == 'cuda'
        return iter(DataLoader(self.dataset, self.push_size // world, sampler = Indices(), num_workers = self.num_workers, pin_memory = pin_memory))

    def read(self, batches):
        """The next real samples go into the queue. Returns their labels, of all processes."""
        samples, labels = next(batches)
        labels = torch.as_tensor(labels) if exists(self.num_classes) else torch.zeros(len(samples), dtype = torch.long)

        self.queue.push(samples, labels)
        self.samples_read += self.push_size
        return self.accelerator.gather(labels.to(self.accelerator.device)).cpu()

    def fill_queue(self, batches):
        """Before the first step, read until every class has enough positives, at most once through the data."""
        total = math.ceil(len(self.dataset) / self.push_size)

        for _ in tqdm(range(total), desc = 'filling the queue', leave = False, disable = self.hide_bar):
            self.read(batches)
            short = {label: num for label, num in enumerate(self.queue.filled.tolist()) if num < self.num_pos}

            if not short and self.queue.pushed[-1] >= self.num_uncond:
                return

        raise ValueError(f'one pass over the data left classes with fewer than num_pos = {self.num_pos} samples (class: samples): {short}. Lower num_pos, or leave them out')

    def draw(self, newest_labels, micro_step):
        """labels [c], alpha [c], noise [c g ...], styles [c g s] or None, pos [c p ...], uncond [c u ...] or None of this process's groups."""
        c, g, device, world = self.num_groups, self.num_gen, self.accelerator.device, self.accelerator.num_processes
        key = (self.seed, self.step, micro_step)
        generator, noise_generator = seeded(*key), seeded(*key, 'noise', device = device)

        # release: labels of the newest real samples, without replacement (in turns, where more groups than samples are asked for)

        turns = math.ceil(c / len(newest_labels))
        order = cat([torch.randperm(len(newest_labels), generator = generator) for _ in range(turns)])[:c]

        labels, alpha = newest_labels[order], sample_alpha(c, generator = generator, **self.alpha_kwargs)
        noise = torch.randn(c, g, *self.noise_shape, generator = noise_generator, device = device)
        styles = rearrange(self.generator.draw_styles(c * g, noise_generator), '(c g) s -> c g s', c = c) if hasattr(self.generator, 'draw_styles') else None

        # the groups of this process

        rank = self.accelerator.process_index
        labels, alpha, noise, styles = (t.chunk(world)[rank] if exists(t) else None for t in (labels, alpha, noise, styles))

        generator = seeded(*key, 'queue', rank)
        pos = self.queue.positives(labels, self.num_pos, generator)
        uncond = self.queue.unconditional(len(labels), self.num_uncond, generator) if self.num_uncond > 0 else None

        return labels.to(device), alpha.to(device), noise, styles, pos, uncond

    # training

    def train_step(self, batches):
        """One optimiser step. Returns the loss, its Breakdown, the gradient norm and the guidance scales, of this process."""
        accelerator, g = self.accelerator, self.num_gen
        self.model.train()

        # release: linear warmup from 1e-6, then constant

        warmup = min(1., self.step / max(1, self.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group['lr'] = 1e-6 + (self.learning_rate - 1e-6) * warmup

        for micro_step in range(self.gradient_accumulation_steps):
            torch.manual_seed(seed_for(self.seed, self.step, micro_step, accelerator.process_index))    # for a model with dropout

            labels, alpha, noise, styles, pos, uncond = self.draw(self.read(batches), micro_step)

            with accelerator.accumulate(self.model):
                gen = self.model(
                    rearrange(noise, 'c g ... -> (c g) ...'),
                    repeat(labels, 'c -> (c g)', g = g) if exists(self.num_classes) else None,
                    repeat(alpha, 'c -> (c g)', g = g),
                    rearrange(styles, 'c g s -> (c g) s') if exists(styles) else None
                )

                check(gen.shape[1:] == self.sample_shape, f'the generator returns samples of shape {tuple(gen.shape[1:])}, those of the dataset have {self.sample_shape}')

                with accelerator.autocast():
                    loss, breakdown = self.loss_fn(rearrange(gen, '(c g) ... -> c g ...', g = g), pos, uncond, alpha)

                accelerator.backward(loss)

                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

                self.optimizer.step()
                self.optimizer.zero_grad()

        self.ema.update()
        self.step += 1
        return loss, breakdown, grad_norm, alpha

    def train(self):
        """Train up to num_train_steps, from the step that was resumed if any. Writes metrics, sample grids and checkpoints on the way."""
        batches = self.batches()

        if self.samples_read == 0:
            self.fill_queue(batches)

        def due(every):
            return every > 0 and (self.step % every == 0 or self.step == self.num_train_steps)

        with tqdm(initial = self.step, total = self.num_train_steps, disable = self.hide_bar) as bar:
            while self.step < self.num_train_steps:
                result = self.train_step(batches)
                bar.update()

                if due(self.log_every):
                    self.log(bar, *result)

                if due(self.sample_every):
                    self.save_samples()

                if due(self.save_every):
                    self.save()

        for tracker in self.accelerator.trackers:
            tracker.finish()

    def log(self, bar, loss, breakdown, grad_norm, alpha):
        """A line of metrics.jsonl, the trackers, and on the progress bar the number that tells progress: the drift before normalisation."""
        metrics = dict(loss = loss, grad_norm = grad_norm, alpha_mean = alpha.mean())

        for name, stats in breakdown.stats.items():
            metrics |= {f'feature/{name}/loss': breakdown.losses[name], f'feature/{name}/scale': stats.scale}
            metrics |= {f'feature/{name}/drift/{temperature}': rms for temperature, rms in stats.drift_rms.items()}

        for temperature in stats.drift_rms:
            metrics[f'drift/{temperature}'] = stack([stats.drift_rms[temperature] for stats in breakdown.stats.values()]).mean()

        values = self.accelerator.reduce(stack([value.detach().float() for value in metrics.values()]), 'mean').tolist()    # the only look at the device
        metrics = dict(step = self.step, **dict(zip(metrics, values)), learning_rate = self.optimizer.param_groups[0]['lr'])

        self.accelerator.log(metrics, step = self.step)

        if self.accelerator.is_main_process:
            with open(self.results_folder / 'metrics.jsonl', 'a') as file:
                file.write(json.dumps(metrics) + '\n')

            drift = ' '.join(f'{metrics[f"drift/{temperature}"]:.4f} (t {temperature})' for temperature in stats.drift_rms)
            bar.set_postfix_str(f'drift {drift} loss {metrics["loss"]:.2f}')

    def sample(self, labels = None, **kwargs):
        """Samples of the averaged model, see sample_from."""
        return sample_from(self.ema.ema_model, self.noise_shape, labels, **kwargs)

    def save_samples(self, columns = 10):
        """A grid of samples of the averaged model, always from the same noise: a row per class (the first ten)."""
        is_image = len(self.sample_shape) == 3 and self.sample_shape[0] in (1, 3)

        if not self.accelerator.is_main_process or not (is_image or exists(self.to_image)):
            return

        rows = min(10, default(self.num_classes, 10))
        which = dict(labels = torch.arange(rows).repeat_interleave(columns)) if exists(self.num_classes) else dict(num_samples = rows * columns)
        samples = self.sample(**which, seed = self.seed)
        images = self.to_image(samples) if exists(self.to_image) else (samples + 1) / 2

        path = self.results_folder / 'samples' / f'step-{self.step:08d}.png'
        path.parent.mkdir(exist_ok = True)
        image_grid(rearrange(images, '(rows cols) ... -> rows cols ...', cols = columns)).save(path)

    # checkpoints: a folder of safetensors and json, complete or absent

    def save(self):
        """Write results_folder/checkpoints/step-..., and keep the newest keep_checkpoints."""
        accelerator, root = self.accelerator, self.results_folder / 'checkpoints'
        folder, unfinished = root / f'step-{self.step:08d}', root / f'unfinished-{self.step:08d}'

        unfinished.mkdir(parents = True, exist_ok = True)
        save_tensors(self.queue.state_dict(), unfinished / f'queue-{accelerator.process_index}.safetensors')

        if accelerator.is_main_process:
            moments = self.optimizer.state_dict()['state']

            save_tensors(self.generator.state_dict(), unfinished / 'model.safetensors')
            save_tensors(self.ema.ema_model.state_dict(), unfinished / 'ema.safetensors')
            save_tensors({f'{i}.{name}': t for i, state in moments.items() for name, t in state.items()}, unfinished / 'optimizer.safetensors')

            state = dict(step = self.step, samples_read = self.samples_read, num_processes = accelerator.num_processes, version = version('drifting-pytorch'), config = self.config)
            (unfinished / 'state.json').write_text(json.dumps(state, indent = 1))

        accelerator.wait_for_everyone()

        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors = True)
            unfinished.rename(folder)

            for old in sorted(root.glob('step-*'))[:-self.keep_checkpoints]:
                shutil.rmtree(old)

    def load(self, checkpoint):
        """Go on from a checkpoint folder, or from the newest one in results_folder ('latest')."""
        if checkpoint == 'latest':
            *_, checkpoint = (None, *sorted((self.results_folder / 'checkpoints').glob('step-*')))
            if not exists(checkpoint):
                return

        folder, accelerator = Path(checkpoint), self.accelerator
        check((folder / 'state.json').is_file(), f'{folder} is not a checkpoint: it has no state.json')

        state = json.loads((folder / 'state.json').read_text())
        check(state['num_processes'] == accelerator.num_processes, f'the checkpoint is of {state["num_processes"]} processes, these are {accelerator.num_processes}: each has a queue of its own')

        load_checked(self.generator, load_file(folder / 'model.safetensors'))
        load_checked(self.ema.ema_model, load_file(folder / 'ema.safetensors'))
        self.queue.load_state_dict(load_file(folder / f'queue-{accelerator.process_index}.safetensors'))

        optimizer = {**self.optimizer.state_dict(), 'state': {}}

        for key, t in load_file(folder / 'optimizer.safetensors').items():
            index, name = key.split('.', 1)
            optimizer['state'].setdefault(int(index), {})[name] = t

        self.optimizer.load_state_dict(optimizer)
        self.step, self.samples_read = state['step'], state['samples_read']

def save_tensors(state_dict, path):
    save_file({name: t.detach().contiguous().clone() for name, t in state_dict.items()}, path)

def load_checked(module, state_dict):
    """load_state_dict, strict, with an error that fits on one line."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    wrong = [f'{name} {tuple(t.shape)} instead of {tuple(own[name].shape)}' for name, t in state_dict.items() if name in own and t.shape != own[name].shape]

    check(not (missing or unknown or wrong), f'the weights do not fit the model: missing {missing}, unknown {unknown}, wrong shape {wrong}')
    module.load_state_dict(state_dict)

# ───────────────────────────────────────────────────────────────────────────────
# 8. published weights - reading the release's artifacts
# ───────────────────────────────────────────────────────────────────────────────

def read_release_artifact(folder):
    """The model config and the parameters, {'a/b/c': tensor}, of a published artifact: metadata.json and ema_params.msgpack."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("the release's weights are msgpack files: pip install 'drifting-pytorch[pretrained]'") from error

    metadata, weights = (Path(folder) / name for name in ('metadata.json', 'ema_params.msgpack'))
    check(metadata.is_file() and weights.is_file(), f'{folder} is not an artifact of the release: expected a local folder with metadata.json and ema_params.msgpack')

    def to_tensor(code, data):      # extension type 1 is an array: (shape, dtype name, bytes)
        shape, dtype, raw = msgpack.unpackb(data)
        check(code == 1 and isinstance(getattr(torch, dtype, None), torch.dtype), f'unknown array type {code}, {dtype!r}')
        return torch.frombuffer(bytearray(raw), dtype = getattr(torch, dtype)).reshape(shape)

    def flatten(tree, *path):
        name = '/'.join(path)

        if torch.is_tensor(tree):
            return {name: tree}

        check(isinstance(tree, dict), f'expected nested maps of arrays, found {type(tree).__name__} at {name or "the top"}')

        if '__msgpack_chunked_array__' in tree:     # arrays above 1 GiB come in pieces; lists may come as maps {'0': ..., '1': ...}
            shape, chunks = (value if isinstance(value, list) else [value[str(i)] for i in range(len(value))] for value in (tree['shape'], tree['chunks']))
            return {name: cat([chunk.flatten() for chunk in chunks]).reshape(shape)}

        return {name: t for key, branch in tree.items() for name, t in flatten(branch, *path, key).items()}

    try:
        params = flatten(msgpack.unpackb(weights.read_bytes(), ext_hook = to_tensor))
    except (ValueError, TypeError, RuntimeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f'{weights} is not a msgpack file of arrays: {error}') from error

    return json.loads(metadata.read_text())['model_config'], params

def generator_from_release(config, params):
    """The arguments and the state dict of a DriftingGenerator from the release's config and parameters."""
    for option in ('use_qknorm', 'use_swiglu', 'use_rope', 'use_rmsnorm'):
        check(config.get(option, True), f'the published generator has {option} = False, which this generator does not offer')

    heads, params, state = config['num_heads'], dict(params), {}

    def take(name):
        check(name in params, f'the published weights lack {name}')
        return params.pop(name).float()

    def linear(name):           # kernels are (in, out)
        return take(f'{name}/Dense_0/kernel').T, take(f'{name}/Dense_0/bias')

    def put(ours, theirs):
        state[f'{ours}.weight'], state[f'{ours}.bias'] = linear(theirs)

    def interleave(t, heads):   # the release rotates the first half of a head with the second, x-transformers neighbours
        return rearrange(t, '(h two d) ... -> (h d two) ...', h = heads, two = 2)

    state['class_embed.weight'] = take('Embed_0/embedding')
    state['style_embed.weight'] = cat([take(f'noise_embeds_{i}/embedding') for i in range(config['noise_coords'])])

    put('alpha_embed.0', 'TimestepEmbedder_0/TorchLinear_0')
    put('alpha_embed.2', 'TimestepEmbedder_0/TorchLinear_1')
    state['alpha_embed.3.g'] = take('RMSNorm_0/weight')

    dit = 'LightningDiT_0'
    put('patch_embed', f'{dit}/TorchLinear_0')
    put('register_proj', f'{dit}/TorchLinear_1')
    state['pos_embed'], state['register_embed'] = (rearrange(take(f'{dit}/{name}'), '1 n d -> n d') for name in ('pos_embed', 'cls_embed'))

    for i in range(config['depth']):
        ours, theirs = f'blocks.{i}', f'{dit}/blocks_{i}'

        put(f'{ours}.modulation.linear', f'{theirs}/TorchLinear_0')
        state[f'{ours}.attn_norm.g'], state[f'{ours}.ff_norm.g'] = (take(f'{theirs}/RMSNorm_{j}/weight') for j in range(2))

        weights, biases = (t.chunk(3) for t in linear(f'{theirs}/Attention_0/TorchLinear_0'))

        for name, weight, bias in zip('qkv', weights, biases):
            state[f'{ours}.attn.to_{name}.weight'], state[f'{ours}.{name}_bias'] = (t if name == 'v' else interleave(t, heads) for t in (weight, bias))

        for name in 'qk':       # one gain for all heads there, here one per head and stored as gain - 1
            gain = interleave(take(f'{theirs}/Attention_0/{name}_norm/weight'), 1)
            state[f'{ours}.attn.{name}_rmsnorm.gamma'] = repeat(gain - 1, 'd -> h 1 d', h = heads)

        state[f'{ours}.attn.to_out.weight'], state[f'{ours}.out_bias'] = linear(f'{theirs}/Attention_0/TorchLinear_1')

        gate, up = (linear(f'{theirs}/SwiGLUFFN_0/TorchLinear_{j}') for j in range(2))
        state[f'{ours}.ff.ff.0.proj.weight'], state[f'{ours}.ff.ff.0.proj.bias'] = (cat(pair) for pair in zip(up, gate))
        put(f'{ours}.ff.ff.2', f'{theirs}/SwiGLUFFN_0/TorchLinear_2')

    put('final_modulation.linear', f'{dit}/FinalLayer_0/TorchLinear_0')
    state['final_norm.g'] = take(f'{dit}/FinalLayer_0/RMSNorm_0/weight')
    put('to_patch', f'{dit}/FinalLayer_0/TorchLinear_1')

    check(not params, f'the published weights hold unknown parameters {sorted(params)}')

    names = dict(
        image_size = 'input_size', channels = 'in_channels', patch_size = 'patch_size', dim = 'hidden_size', depth = 'depth', heads = 'num_heads',
        num_classes = 'num_classes', num_register_tokens = 'n_cls_tokens', num_style_tokens = 'noise_coords', style_codebook_size = 'noise_classes', ff_mult = 'mlp_ratio'
    )
    return {ours: config[theirs] for ours, theirs in names.items()}, state
