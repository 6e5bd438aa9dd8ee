"""Drifting models: one-step generators trained by a drifting field.

Generative Modeling via Drifting, Deng, Li, Li, Du, He, https://arxiv.org/abs/2602.04770

Read it from top to bottom: a section uses only what stands above it, and 1 to 4 are the core of the paper.
Where paper and release differ, the release is the default, tagged `# release`. What both leave open: `# open`.
"""

import dataclasses
import dis
import hashlib
import inspect
import json
import math
import multiprocessing
import operator
import os
import random
import re
import shutil
import signal
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import einx
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, convert_outputs_to_fp32, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from beartype import beartype
from einops import rearrange, reduce, repeat
from ema_pytorch import EMA
from filelock import FileLock
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Float, Int, jaxtyped
from PIL import Image, ImageOps
from rotary_embedding_torch import RotaryEmbedding
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, cat, nn, stack
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn import Module, ModuleDict, ModuleList, Parameter
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from tqdm.auto import tqdm
from x_transformers.x_transformers import Attention, FeedForward

# ── 1. helpers ───

# dimension letters, everywhere in this file
#
# b - batch; in the loss the problems (c f)    f - feature locations (pixels, tokens) of one feature map
# c - class groups in a step (N_c)             d - feature dimension
# g - generated per group (N_neg)              n m - points; in the loss m negatives
# p - positives per group (N_pos)              t - temperatures
# u - unconditional per group (N_unc)          s - style tokens
# o - positives and unconditional (p u)        ch h w - channels, height and width of an image
# y - what acts on the generated samples: [positives | unconditional | negatives]

def exists(val):
    return val is not None

def default(val, d):
    return val if exists(val) else d

def existing(**values):
    return {name: value for name, value in values.items() if exists(value)}

def typecheck(fn):
    """Checks shapes if DRIFTING_TYPECHECK=1 at import; do not compile then."""
    is_on = os.environ.get('DRIFTING_TYPECHECK', '') not in ('', '0')
    return jaxtyped(fn, typechecker = beartype) if is_on else fn

# input is always checked; errors are one line that says what to do
def check(condition, message):
    if not condition:
        raise ValueError(message)

def check_whole(low, **values):
    for name, value in values.items():
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        check(is_whole and value >= low, f'{name} must be a whole number from {low} on, got {value!r}')

def check_number(low, high, **values):
    for name, value in values.items():
        if not isinstance(value, (int, float, np.number)) or not low <= value <= high:  # check would break graphs
            raise ValueError(f'{name} must be a number in {low} .. {high}, got {value!r}')

def check_shape(name, t, expected, hint = ''):
    """A word in expected, as 'batch', stands for any size."""
    check(torch.is_tensor(t), f'{name} must be a tensor, got {type(t).__name__}')
    sizes = zip(t.shape, expected, strict = False)
    same = t.ndim == len(expected) and all(size == want or isinstance(want, str) for size, want in sizes)
    wanted = '' if same else str(tuple(expected)).replace("'", '')
    check(same, f'{name} has shape {tuple(t.shape)}, expected {wanted}{hint}')

def can_read(t):
    """Looking at values stalls an accelerator, and breaks a compiled graph."""
    return t.device.type == 'cpu' and not torch.compiler.is_compiling() and t.numel() > 0

def check_range(name, t, low = -math.inf, high = math.inf):
    check(not t.is_complex(), f'{name} must be real numbers, got {t.dtype}')
    if can_read(t):
        found = t.aminmax()  # nan if any is
        fits = all(low <= bound <= high and bound.isfinite() for bound in found)
        check(fits, f'{name} must be finite and in {low} .. {high}, got {found.min} .. {found.max}')

def as_tensor(name, values):
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'{name} must be numbers or a tensor of them, got {values!r}') from error

def checked_labels(labels, num_classes, *shape, name = 'labels'):
    """As int64, also of a list or another integer type."""
    labels = as_tensor(name, labels)
    check_shape(name, labels, shape)
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    check(is_integer, f'{name} must be integers, got {labels.dtype}')
    labels = labels.long()
    check_range(name, labels, 0, num_classes - 1)
    return labels

def full_precision(t):
    """Half precision in float32; float32 and float64 as they are."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()

def check_floating(name, t, hint = 'convert it with .float()'):
    check(torch.is_tensor(t), f'{name} must be a tensor, got {type(t).__name__}')
    check(t.is_floating_point(), f'{name} must be floating point, got {t.dtype}: {hint}')

def check_samples(axis, **sets):
    """Floating point, not empty, of one shape but for the number of samples along axis."""
    (first, reference), *_ = sets.items()
    for name, t in sets.items():
        check_floating(name, t)
        fits = t.ndim > (2 if axis == 1 else 1) and t.numel() > 0
        check(fits, f'{name} has shape {tuple(t.shape)}, expected [groups, samples, ...] or points, and no empty set')
        expected = list(reference.shape)
        expected[axis] = 'samples'
        check_shape(name, t, expected, f' like {first}: nothing is broadcast')

def check_values(result, **points):
    if can_read(result) and not math.isfinite(result.sum()):
        for name, t in points.items():
            largest = t.abs().max()
            check(largest.isfinite(), f'{name} has non-finite values (nan or inf)')
            check(largest < 1e15, f'{name} has values up to {largest:.2g}, whose squares overflow')
        raise ValueError('the field is not finite: extreme temperatures, or other chunks or processes')

def each(fn, value):
    """fn of a tensor, or of every tensor of a dict. None stays None."""
    if isinstance(value, dict):
        return {name: fn(t) for name, t in value.items()}
    return fn(value) if exists(value) else None

# ── 2. drift field - Eq. 8-12, Algorithm 2, B.2, Table 1 ───

def geometric_mean_of_softmaxes(logits):
    """sqrt(softmax over y * softmax over x) of logits [... n y]."""
    if can_read(logits):
        # one exponential for both, at most e^32, unless a sum vanishes
        kernel = (logits - (logits.amax(dim = (-2, -1), keepdim = True) - 32)).exp_()
        over_y, over_x = (kernel.sum(dim = dim, keepdim = True) for dim in (-1, -2))
        if min(over_y.min(), over_x.min()) > 1e-28:
            return kernel.mul_(over_y.rsqrt_()).mul_(over_x.rsqrt_())
    return logits.softmax(dim = -1).sqrt_().mul_(logits.softmax(dim = -2).sqrt_())

class DriftField(Module):
    """The drifting field V_{p,q}(x): where points should move, to positives, from negatives (Algorithm 2).

    It is anti-symmetric, V_{p,q} = -V_{q,p}, so V = 0 when p = q, and invariant to translation.
    kernel: 'laplace', exp(-|x - y| / temperature) (paper), or 'gaussian', exp(-|x - y|^2 / (2 temperature^2)).
    normalize: to an affinity (Table 11). 'both', the geometric mean of softmaxes over y and x (paper); 'y', the one
        over y; 'none' (open), the kernel itself: far above the temperature it underflows, to affinity_floor.
    attraction, repulsion: a and b of a V+ - b V- (Table 1). Unless a = b it is not anti-symmetric.
    """
    # fields of later work (section 7) differ in these
    scale_power = 1  # S is mean(distance ** scale_power) ** (1 / scale_power)
    needs_neg = False  # whether negatives are a second generated batch

    def __init__(self, *, kernel = 'laplace', normalize = 'both', attraction = 1., repulsion = 1.):
        super().__init__()
        wanted = "'both', 'y' or 'none' (see GradientField, SharpField and SinkhornField)"
        check(normalize in ('both', 'y', 'none'), f'normalize must be {wanted}, got {normalize!r}')
        check(kernel in ('laplace', 'gaussian'), f"kernel must be 'laplace' or 'gaussian', got {kernel!r}")
        check_number(0, 10 ** 6, attraction = attraction, repulsion = repulsion)
        self.kernel, self.normalize = kernel, normalize
        self.attraction, self.repulsion = attraction, repulsion
        self.zero_sum = attraction == repulsion  # then W sums to 0

    def logits(self, dist, temperature):
        """log k(x, y)."""
        return dist / -temperature if self.kernel == 'laplace' else -0.5 * (dist / temperature) ** 2

    def affinity(self, logits):
        """The kernel, normalised."""
        if self.normalize == 'both':
            return geometric_mean_of_softmaxes(logits)
        return logits.softmax(dim = -1) if self.normalize == 'y' else logits.exp()

    @typecheck
    def coefficients(
        self,
        dist: Float[Tensor, '... n y'],  # distances to [positives | unconditional | negatives]
        num_pos: int,
        num_neg: int,
        temperature: float | Tensor,  # a tensor is broadcast against dist
        weight: Float[Tensor, '... y'] | None = None,  # of each y, the guidance (A.7)
        affinity_floor: float = 0.  # its root bounds A (release)
    ) -> Float[Tensor, '... n y']:
        """W of V(x) = sum_y W(x, y) (y - x): positive on positives, negative on the others."""
        A = self.affinity(self.logits(dist, temperature)).clamp_(min = affinity_floor ** 0.5)
        if exists(weight):
            A *= rearrange(weight, '... y -> ... 1 y')  # release: after the softmax
        A_pos, A_neg = A.tensor_split((num_pos,), dim = -1)
        sum_pos, sum_neg = (t.sum(dim = -1, keepdim = True) for t in (A_pos, A_neg))

        # cross weights: positives act together with negatives: anti-symmetry
        A_pos *= self.attraction * sum_neg
        A_neg *= -self.repulsion * sum_pos
        return A

    def apply_coefficients(self, W, x, y):
        """V [... t n d] = sum_y W (y - x) of W [... t n y], x [... n d] and y [... y d]."""
        V = rearrange(W, '... t n y -> ... (t n) y') @ y
        V = rearrange(V, '... (t n) d -> ... t n d', n = W.shape[-2])

        # open: a != b act on V+ and V- (Eq. 10), so that translation invariance stays
        if not self.zero_sum:
            W_sum = reduce(W, '... t n y -> ... t n 1', 'sum')
            V.addcmul_(W_sum, rearrange(x, '... n d -> ... 1 n d'), value = -1)
        return V

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, '... n d'], y_pos: Float[Tensor, '... p d'],
        y_neg: Float[Tensor, '... m d'] | None = None, *, temperature: float
    ) -> Float[Tensor, '... n d']:
        """Algorithm 2 at one temperature, in the units of the distances.

        y_neg None: the negatives are x itself, with self pairs masked.
        Returns V, without a gradient: train on mse(x, (x + V).detach()) (Eq. 6).
        Raises ValueError for empty sets, unfit shapes, non-finite values, temperatures not above 0.
        """
        negatives = default(y_neg, x)
        check_samples(-2, x = x, y_pos = y_pos, y_neg = negatives)
        check_number(1e-30, 1e30, temperature = temperature)
        x = full_precision(x)
        y = cat((y_pos, negatives), dim = -2).to(x.dtype)
        num_pos, num_neg = y_pos.shape[-2], negatives.shape[-2]
        with torch.autocast(x.device.type, enabled = False):
            center = reduce(y, '... y d -> ... 1 d', 'mean')
            x_centered, y = x - center, y - center
            dist = torch.cdist(x_centered, y, compute_mode = 'donot_use_mm_for_euclid_dist')  # exact
            if not exists(y_neg) and not self.needs_neg:
                dist[..., num_pos:].diagonal(dim1 = -2, dim2 = -1).add_(1e6 * temperature)  # mask self
            W = self.coefficients(dist, num_pos, num_neg, float(temperature))
            V = self.apply_coefficients(rearrange(W, '... n y -> ... 1 n y'), x_centered, y).squeeze(-3)
        check_values(V, x = x, y_pos = y_pos, y_neg = negatives)
        return V

DRIFT_FIELD = DriftField()

# ── 3. the loss on one feature as the paper writes it - A.6 ───

@typecheck
def plain_drift_loss(
    gen: Float[Tensor, 'b g d'],
    pos: Float[Tensor, 'b p d'],
    uncond: Float[Tensor, 'b u d'],
    uncond_weight: Float[Tensor, 'b u'],
    *, temperatures = (0.02, 0.05, 0.2), field = DRIFT_FIELD, affinity_floor = 1e-6
) -> Float[Tensor, 'b']:
    """The drifting loss on one feature, line by line as in A.6, with the release's clamps.

    gen: generated, pos: real, uncond: real of any class, with weights (alpha - 1) (g - 1) / u (A.7).
    Returns the loss [b]. Without checks: `drift_loss` (section 6) is fast.
    """
    (_, g, d), p = gen.shape, pos.shape[1]

    with torch.no_grad():
        y = cat((pos, uncond, gen), dim = 1)  # b y d
        weight = F.pad(uncond_weight, (p, g), value = 1.)  # b y

        # distances, and temperatures, are relative to one scale. Eq. 21 has S_j = S / sqrt(d)
        dist = torch.cdist(gen, y).clamp(min = 1e-4)  # b g y
        S = (dist * weight[:, None]).mean() / weight.mean()
        unit = (S / d ** 0.5).clamp(min = 1e-3)
        dist = dist / S.clamp(min = 1e-3)
        dist[:, :, -g:] += 100 * torch.eye(g).to(dist)  # mask self (release)

        # each field is divided by lambda (Eq. 25), then they add up: one loss (Table 8: three)
        V = 0.
        for temperature in temperatures:
            W = field.coefficients(dist, p, g, temperature, weight, affinity_floor)  # b g y
            V_t = (W @ y - W.sum(dim = -1, keepdim = True) * gen) / unit  # b g d
            V = V + V_t / V_t.square().mean().clamp(min = 1e-8).sqrt()
        target = gen / unit + V
    return (gen / unit - target).square().mean(dim = (1, 2))

# ── 4. generator - A.2, Table 8 ───

PRESETS = {
    'B/2': dict(image_size = 32, channels = 4, patch_size = 2, dim = 768, depth = 12, heads = 12),  # latent
    'L/2': dict(image_size = 32, channels = 4, patch_size = 2, dim = 1024, depth = 24, heads = 16),
    'L/2-512': dict(image_size = 64, channels = 4, patch_size = 4, dim = 1024, depth = 24, heads = 16),  # open
    'B/16': dict(image_size = 256, channels = 3, patch_size = 16, dim = 768, depth = 12, heads = 12),  # pixel
    'L/16': dict(image_size = 256, channels = 3, patch_size = 16, dim = 1024, depth = 24, heads = 16),
}

def from_preset(cls, name, *args, **kwargs):
    """One of cls.presets (Table 8). Keywords override it."""
    check(name in cls.presets, f'unknown preset {name!r}, expected one of {", ".join(cls.presets)}')
    return cls(*args, **{**cls.presets[name], **kwargs})

def run_block(block, *args, checkpointing):
    recompute = checkpointing and torch.is_grad_enabled()
    return checkpoint(block, *args, use_reentrant = False) if recompute else block(*args)

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + 1e-6) times a gain (release), never in half precision."""
    def __init__(self, dim):
        super().__init__(dim, eps = 1e-6)

    def forward(self, x):
        return super().forward(full_precision(x))

class Modulation(Module):
    """adaLN-zero: shifts, scales and gates, 0 at first, never in half precision."""
    def __init__(self, dim, num):
        super().__init__()
        self.num = num
        self.linear = nn.Linear(dim, dim * num)

    def forward(self, cond):  # b d
        with torch.autocast(cond.device.type, enabled = False):
            out = self.linear(F.silu(cond.to(self.linear.weight.dtype)))
            return rearrange(out, 'b (num d) -> num b 1 d', num = self.num)

class Block(Module):
    """Attention and SwiGLU of x-transformers inside adaLN-zero.

    Release: every linear has a bias (the attention's are added), heads share gains of queries and keys.
    """
    def __init__(self, dim, heads, dim_ff):
        super().__init__()
        dim_head = dim // heads
        self.modulation = Modulation(dim, 6)
        self.attn_norm = RMSNorm(dim)
        self.attn = Attention(dim, heads = heads, dim_head = dim_head, flash = True, project_out = True)
        self.attn.q_rmsnorm, self.attn.k_rmsnorm = RMSNorm(dim_head), RMSNorm(dim_head)
        for linear in (self.attn.to_q, self.attn.to_k, self.attn.to_v, self.attn.to_out):
            linear.bias = Parameter(torch.zeros(dim))
        self.attn.attend.scale = None  # the default
        self.attn.attend.sdp_context_manager = nullcontext  # to pickle it
        self.ff_norm = RMSNorm(dim)
        self.ff = FeedForward(dim, mult = (dim_ff + 0.5) / dim, glu = True, swish = True)  # int(dim * mult) wide

    def forward(self, x, cond, rotary):  # b n d, b d, 1 n dh
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = self.modulation(cond)  # b 1 d
        h = self.attn_norm(x) * (1 + attn_scale) + attn_shift  # b n d
        x = x + self.attn(h, rotary_pos_emb = (rotary, None)) * attn_gate

        h = self.ff_norm(x) * (1 + ff_scale) + ff_shift
        return x + self.ff(h) * ff_gate

def sinusoidal(t, dim):
    """[...] -> [... dim], cosines first, geometric frequencies 1 .. 1/10000."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device = t.device) / (dim // 2))
    angles = rearrange(t.float(), '... -> ... 1') * freqs
    return cat((angles.cos(), angles.sin()), dim = -1)

def sincos_2d(size, dim):
    """[size * size, dim]: the sine-cosine embedding of a grid, columns then rows."""
    steps = torch.arange(size)
    places = torch.cartesian_prod(steps, steps).flip(-1)  # column, row
    sin_first = sinusoidal(places, dim // 2).roll(dim // 4, dims = -1)  # of cosines first
    return rearrange(sin_first, 'n two d -> n (two d)')

def channels_last(x):
    """Pixel by pixel in memory, which is faster on a cpu."""
    return x.to(memory_format = torch.channels_last) if x.device.type == 'cpu' else x

class OutputConvs(nn.Sequential):
    """Added to a picture, nothing at first."""
    def __init__(self, channels, dim):
        last = nn.Conv2d(dim, channels, 3, padding = 1, bias = False)
        nn.init.zeros_(last.weight)
        super().__init__(nn.Conv2d(channels, dim, 3, padding = 1), nn.SiLU(), last)

    def forward(self, x):
        return x + super().forward(channels_last(x))

CODERS = {np.integer: (int, int), np.floating: (float, float), np.bool_: (bool, bool)}  # of config.json

class Generator(Module, PyTorchModelHubMixin):
    """What generators share: their conditions, and checks of what they get."""
    def __init__(self, image_size, channels, dim, num_classes, dim_condition, condition_channels, output_conv_dim):
        super().__init__()
        check_whole(1, image_size = image_size, channels = channels, dim = dim)
        sizes = dict(num_classes = num_classes, dim_condition = dim_condition, condition_channels = condition_channels)
        check_whole(1, **existing(**sizes))
        check_whole(0, output_conv_dim = output_conv_dim)
        self.image_size, self.num_classes = image_size, num_classes
        self.noise_shape = channels, image_size, image_size
        shapes = dict(vector = (dim_condition,), image = (condition_channels, 'height', 'width'))
        self.condition_shapes = {name: shape for name, shape in shapes.items() if exists(shape[0])}
        self.class_embed = nn.Embedding(num_classes, dim) if exists(num_classes) else None
        self.vector_embed = nn.Linear(dim_condition, dim) if exists(dim_condition) else None
        self.output_convs = OutputConvs(channels, output_conv_dim) if output_conv_dim > 0 else nn.Identity()

    def checked_condition(self, labels, b):
        """Its conditions, of {'labels': [b], 'vector': [b k], 'image': [b ch h w]}."""
        names = [*existing(labels = self.num_classes), *self.condition_shapes]
        bare = names[0] if names else 'labels'  # what a tensor alone is
        given = dict(labels) if isinstance(labels, dict) else existing(**{bare: labels})
        wanted = f'are needed: {" and ".join(names)}' if names else 'must be None'
        check(given.keys() == set(names), f'num_classes is {self.num_classes}, so labels {wanted}, got {list(given)}')
        for name, shape in self.condition_shapes.items():
            check_shape(name, given[name], (b, *shape))
            check_range(name, given[name])
        if 'labels' in given:
            given['labels'] = checked_labels(given['labels'], self.num_classes, b)
        return given

    def checked_inputs(self, noise, labels, alpha):
        """noise, {name: condition}, alpha [b]"""
        check_shape('noise', noise, ('batch', *self.noise_shape))
        check_floating('noise', noise)
        check_range('noise', noise)
        b, like = noise.shape[0], next(self.parameters())
        check(like.dtype.itemsize >= 4, f'the model is {like.dtype}: keep it in float32, under torch.autocast')
        alpha = as_tensor('alpha', alpha).to(noise.device)
        alpha = alpha.expand(b) if alpha.ndim == 0 else alpha
        check_shape('alpha', alpha, (b,), ', or a number')
        check_range('alpha', alpha, 1)
        given = each(lambda t: t.to(noise.device), self.checked_condition(labels, b))
        given |= {name: given[name].to(like.dtype) for name in self.condition_shapes}
        if 'image' in given:
            given['image'] = F.interpolate(given['image'], self.image_size, mode = 'bilinear', antialias = True)
        return noise.to(like.dtype), given, alpha

    def embedded(self, cond, labels, vector):
        """cond [b d], plus labels and vectors."""
        for embed, value in (self.class_embed, labels), (self.vector_embed, vector):
            cond = cond + embed(value) if exists(value) else cond
        return cond

class DriftingGenerator(Generator, coders = CODERS):
    """The one-step generator: a DiT from noise to samples, given class, guidance scale and style (A.2).

    image_size, channels, patch_size: samples [b channels image_size image_size] in square patches.
    num_classes, dim_condition, condition_channels: of labels, vectors, pictures as a condition; None: without.
    num_register_tokens: tokens in front of the patches, made from the condition.
    num_style_tokens, style_codebook_size: random style embeddings, one of each table (0: none).
    share_style_codebook: one table for all style tokens (paper) instead of one each (release).
    output_conv_dim: width of two convolutions on the picture, against seams. 0: none (paper).
    outer_slope: share that stays of what exceeds [-1, 1]: 0.1 for pixels, cut off there anyway. 1: all (paper).
    bf16_rotary: rotary positions rounded to bfloat16, as some published weights want.
    checkpointing: compute blocks again in the backward pass, in less memory.
    save_pretrained and push_to_hub write it, from_pretrained (section 11) reads it.
    """
    presets, from_preset = PRESETS, classmethod(from_preset)

    def __init__(
        self, *, image_size, channels, patch_size, dim, depth, heads, ff_mult = 4., num_classes = None,
        dim_condition = None, condition_channels = None,
        num_register_tokens = 16, num_style_tokens = 32, style_codebook_size = 64, share_style_codebook = False,
        output_conv_dim = 0, outer_slope = 1., bf16_rotary = False, checkpointing = False
    ):
        super().__init__(image_size, channels, dim, num_classes, dim_condition, condition_channels, output_conv_dim)
        check_whole(1, patch_size = patch_size, heads = heads, style_codebook_size = style_codebook_size)
        check_number(1e-3, 1e3, ff_mult = ff_mult)
        check_number(1e-3, 1, outer_slope = outer_slope)
        check_whole(0, depth = depth, num_register_tokens = num_register_tokens, num_style_tokens = num_style_tokens)
        check(image_size % patch_size == 0, f'image_size {image_size} must be a multiple of patch_size {patch_size}')
        fits = dim % math.lcm(4, 2 * heads) == 0
        check(fits, f'dim {dim} must be a multiple of 4 and of twice the heads {heads}')
        self.patch_size, self.checkpointing, self.bf16_rotary = patch_size, checkpointing, bf16_rotary
        self.outer_slope = float(outer_slope)
        size, dim_patch = image_size // patch_size, channels * patch_size ** 2
        dim_ff = math.ceil(int(2 / 3 * ff_mult * dim) / 32) * 32  # release

        # condition; style tables are rows of one embedding
        num_tables = 1 if share_style_codebook else num_style_tokens
        self.num_style_tokens, self.style_codebook_size = num_style_tokens, style_codebook_size
        self.style_stride = 0 if share_style_codebook else style_codebook_size
        self.style_embed = nn.Embedding(style_codebook_size * num_tables, dim)
        self.alpha_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), RMSNorm(dim))

        # tokens [registers | patches]
        self.patch_embed = nn.Linear(dim_patch, dim)
        dim_image = default(condition_channels, 0) * patch_size ** 2
        self.image_embed = nn.Linear(dim_image, dim) if exists(condition_channels) else None
        self.pos_embed = Parameter(sincos_2d(size, dim))
        self.register_proj = nn.Linear(dim, dim)
        self.register_embed = Parameter(torch.empty(num_register_tokens, dim))

        # rotary positions (release: 1d), also for weights on meta
        with torch.device('cpu'):
            rotary = RotaryEmbedding(dim // heads, cache_if_possible = False)
            rotary = rotary.to(torch.bfloat16 if bf16_rotary else torch.float32)
            angles = rotary(torch.arange(num_register_tokens + size ** 2)).detach().float()
        angles = angles if self.pos_embed.is_meta else angles.to(self.pos_embed.device)
        self.register_buffer('rotary', rearrange(angles, 'n dh -> 1 n dh'), persistent = False)
        self.blocks = ModuleList([Block(dim, heads, dim_ff) for _ in range(depth)])
        self.final_norm = RMSNorm(dim)
        self.final_modulation = Modulation(dim, 2)
        self.to_patch = nn.Linear(dim, dim_patch)
        self.init_weights()

    def init_weights(self):
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            if exists(linear.bias):
                nn.init.zeros_(linear.bias)

        # release: q, k and v are one xavier matrix, each half of SwiGLU's input is one
        for block in self.blocks:
            nn.init.zeros_(block.modulation.linear.weight)
            for linear in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                nn.init.xavier_uniform_(linear.weight, gain = 0.5 ** 0.5)
            for half in block.ff.ff[0].proj.weight.detach().chunk(2):
                nn.init.xavier_uniform_(half)
        embeddings = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        for weight in (*embeddings, self.register_embed, self.alpha_embed[0].weight, self.alpha_embed[2].weight):
            nn.init.normal_(weight, std = 0.02)

        # the output starts as 0, every block as the identity
        for linear in (self.final_modulation.linear, self.to_patch):
            nn.init.zeros_(linear.weight)

    def draw_styles(self, num, generator = None):
        """Random style indices [num s], uniform over the codebook."""
        device = getattr(generator, 'device', self.pos_embed.device)
        shape = (num, self.num_style_tokens)
        return torch.randint(self.style_codebook_size, shape, generator = generator, device = device)

    def condition(self, labels, alpha, styles, vector = None):
        """The condition vector [b d]: styles + guidance scale + class + vector."""
        tables = self.style_stride * torch.arange(self.num_style_tokens, device = styles.device)
        cond = reduce(self.style_embed(styles + tables), 'b s d -> b d', 'sum')
        cond = cond + 0.02 * self.alpha_embed(sinusoidal(alpha, 256).to(cond.dtype))
        return self.embedded(cond, labels, vector)

    def cut(self, x):
        p = self.patch_size
        return rearrange(x, 'b ch (h p1) (w p2) -> b (h w) (p1 p2 ch)', p1 = p, p2 = p)

    def forward(
        self, noise: Float[Tensor, 'b ch h w'], labels: Tensor | dict | None = None,
        alpha: Float[Tensor, 'b'] | float = 1., styles: Int[Tensor, 'b s'] | None = None
    ) -> Float[Tensor, 'b ch h w']:
        """Noise to samples, one network evaluation.

        labels: [b], vectors [b dim_condition], images [b condition_channels h w] of any size, or None;
            several are a dict {labels, vector, image}.
        alpha: the guidance scale, >= 1. styles: drawn if None.
        Raises ValueError for wrong shapes, values out of range, and non-finite ones.
        """
        noise, given, alpha = self.checked_inputs(noise, labels, alpha)
        b = noise.shape[0]
        styles = styles if exists(styles) else self.draw_styles(b)
        styles = checked_labels(styles, self.style_codebook_size, b, self.num_style_tokens, name = 'styles')
        cond = self.condition(given.get('labels'), alpha, styles.to(noise.device), given.get('vector'))  # b d
        p, h = self.patch_size, self.image_size // self.patch_size
        x = self.patch_embed(self.cut(noise)) + self.pos_embed  # b n d
        if 'image' in given:
            x = x + self.image_embed(self.cut(given['image']))
        registers = rearrange(self.register_proj(cond), 'b d -> b 1 d') + self.register_embed
        x = cat((registers, x), dim = 1)  # b (r n) d
        for block in self.blocks:
            x = run_block(block, x, cond, self.rotary, checkpointing = self.checkpointing)
        x = x[:, registers.shape[1]:]  # b n d
        shift, scale = self.final_modulation(cond)  # b 1 d
        patches = self.to_patch(self.final_norm(x) * (1 + scale) + shift)  # b n (p1 p2 ch)
        x = rearrange(patches, 'b (h w) (p1 p2 ch) -> b ch (h p1) (w p2)', h = h, p1 = p, p2 = p)
        x = self.output_convs(x)
        return x if self.outer_slope == 1 else x.clamp(-1, 1).lerp(x, self.outer_slope)

# ── 5. samples, and a generator for small pictures ───

def chunked(values, size = None):
    """Tensors, dicts of them, or None, in chunks [value, ...] of so many rows."""
    num = len(values[0])
    size = default(size, num)
    parts = [slice(i, i + size) for i in range(0, num, size)]
    return [[each(operator.itemgetter(part), value) for value in values] for part in parts]

def is_condition(labels, num_batch_dims = 1):
    """More than class labels: a dict, not integers, or several numbers per row."""
    if torch.is_tensor(labels):
        return labels.ndim > num_batch_dims or labels.ndim == num_batch_dims and labels.is_floating_point()
    return isinstance(labels, dict)

@torch.no_grad()
def sample_from(
    model, noise_shape, labels = None, *,
    num_samples = None, num_samples_each = None, alpha = 1., seed = None, batch_size = None
):
    """Samples of model(noise, labels, alpha, styles), in eval mode, without gradients.

    labels [b], or a condition, [b ...] or a dict of such tensors; where there is none, num_samples.
    num_samples_each: so many for each of these rows, [b num_samples_each ...].
    alpha: a number >= 1 or [b]. batch_size bounds the memory.
    Noise and styles of a sample depend on the seed and its place, not on the device or the batch.
    """
    num_classes = getattr(model, 'num_classes', None)
    labels = each(partial(as_tensor, 'labels'), labels)
    labels = each(lambda t: t.float() if t.is_floating_point() else t, labels)
    wanted = 'labels' if exists(num_classes) else 'num_samples, no labels'
    needs_labels = exists(num_classes) or is_condition(labels)
    given = exists(labels), exists(num_samples)
    check(given == (needs_labels, not needs_labels), f'num_classes is {num_classes}, so pass {wanted}')
    if exists(labels) and not is_condition(labels):
        labels = checked_labels(labels, num_classes, 'batch')
    rows, k = num_samples, default(num_samples_each, 1)
    if exists(labels):
        sizes = {t.shape[:1] for t in (labels if isinstance(labels, dict) else {'': labels}).values()}
        check(len(sizes) == 1 and sizes != {()}, f'labels must be tensors [rows, ...] of equal length, got {sizes}')
        rows, = sizes.pop()
    check_whole(1, num_samples = rows, num_samples_each = k, **existing(batch_size = batch_size))
    check_whole(0, **existing(seed = seed))
    alpha = as_tensor('alpha', alpha).float()
    check(alpha.shape in ((), (rows,)), f'alpha has shape {tuple(alpha.shape)}, expected a number or ({rows},)')
    generator = torch.Generator().manual_seed(int(seed if exists(seed) else torch.randint(2 ** 62, ())))
    seeds = torch.randint(2 ** 31, (), generator = generator) + torch.arange(rows * k)

    device, samples = next(model.parameters()).device, []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch, index in chunked((seeds, torch.arange(rows * k) // k), batch_size):
            noise, styles = [], []
            for own_seed in batch.tolist():
                generator.manual_seed(own_seed)
                noise.append(torch.randn(noise_shape, generator = generator, dtype = torch.float32))
                if hasattr(model, 'draw_styles'):
                    styles.append(model.draw_styles(1, generator))
            given = [each(operator.itemgetter(index), t) for t in (labels, alpha.expand(rows))]
            inputs = stack(noise), *given, cat(styles) if styles else None
            samples.append(model(*(each(lambda t: t.to(device), t) for t in inputs)))
    finally:
        for module, mode in modes.items():
            module.training = mode
    samples = cat(samples)
    return rearrange(samples, '(b k) ... -> b k ...', k = k) if exists(num_samples_each) else samples

def sample(self, labels = None, **kwargs):
    """Samples [b ch h w] for labels [b], see sample_from."""
    return sample_from(self, self.noise_shape, labels, **kwargs)

Generator.sample = sample

class ConvGenerator(Generator, coders = CODERS):
    """A one-step generator of convolutions for small pictures, quicker than a DiT.

    image_size: a multiple of 4 up to 32, or of 8 up to 64; samples in [-1, 1].
    dim: channels of the first map, a multiple of 16. dim_noise: noise for the vector. See DriftingGenerator.
    noise_channels: maps of noise for every map, behind that in the noise. 0: none, textures are stripes.
    The condition acts on every layer, or the samples of a class would be more alike.
    """
    def __init__(
        self, *, image_size, channels, num_classes = None, dim_condition = None, condition_channels = None,
        dim = 64, dim_noise = 64, noise_channels = 0, output_conv_dim = 0
    ):
        super().__init__(image_size, channels, dim, num_classes, dim_condition, condition_channels, output_conv_dim)
        check_whole(1, dim_noise = dim_noise)
        check_whole(0, noise_channels = noise_channels)
        check(dim % 16 == 0, f'dim must be a multiple of 16, got {dim}')
        num_ups = 2 if image_size <= 32 else 3
        fits = image_size % 2 ** num_ups == 0 and 8 <= image_size <= 64
        check(fits, f'image_size must be a multiple of 4 from 8 to 32, or of 8 up to 64, got {image_size}')

        # layers: from noise to a vector, to a map, to maps of twice the side
        image_size, dim, noise_channels = map(int, (image_size, dim, noise_channels))  # also of numpy
        size, widths = image_size // 2 ** num_ups, [dim] * (num_ups - 1) + [dim // 2]
        first_map = nn.Linear(4 * dim, dim // 4 * size ** 2), nn.Unflatten(1, (dim // 4, size, size))
        conv = nn.Conv2d(dim // 4, dim, 3, padding = 1)
        self.layers = ModuleList([nn.Linear(dim_noise, 4 * dim)])
        self.layers.append(nn.Sequential(*first_map, conv, nn.GroupNorm(8, dim)))
        for dim_in, dim_out in zip(widths, widths[1:], strict = False):
            conv = nn.Conv2d(dim_in, dim_out, 3, padding = 1)
            up = nn.Upsample(scale_factor = 2, mode = 'bilinear')
            self.layers.append(nn.Sequential(conv, up, nn.GroupNorm(8, dim_out)))
        to_pixels = nn.Conv2d(dim // 2, 4 * channels, 3, padding = 1), nn.PixelShuffle(2)
        mean = nn.ReplicationPad2d((1, 0, 1, 0)), nn.AvgPool2d(2, stride = 1)  # no checkerboard
        self.to_image = nn.Sequential(*to_pixels, *mean)

        # the condition, by which every layer is scaled and shifted
        self.alpha_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.sizes = [2 * width for width in (4 * dim, *widths)]
        self.to_scale_shift = nn.Linear(dim, sum(self.sizes))
        nn.init.normal_(self.to_scale_shift.weight, std = 0.3 / dim ** 0.5)
        nn.init.zeros_(self.to_scale_shift.bias)

        # a picture (patches) and noise join every map
        self.image_embeds, self.noise_embeds, self.noise_sizes = ModuleList(), ModuleList(), [dim_noise]
        for i, width in enumerate(widths):
            side = size * 2 ** i
            if exists(condition_channels):
                self.image_embeds.append(nn.Conv2d(condition_channels * (image_size // side) ** 2, width, 1))
            if noise_channels > 0:
                embed = nn.Conv2d(noise_channels, width, 1, bias = False)
                nn.init.normal_(embed.weight, std = 0.1)
                self.noise_embeds.append(nn.Sequential(nn.Unflatten(1, (noise_channels, side, side)), embed))
                self.noise_sizes.append(noise_channels * side ** 2)
        self.noise_shape = (sum(self.noise_sizes),)

    def forward(
        self, noise: Float[Tensor, 'b d'], labels: Tensor | dict | None = None,
        alpha: Float[Tensor, 'b'] | float = 1., styles = None  # it has none
    ) -> Float[Tensor, 'b ch h w']:
        """Noise to samples. labels, alpha, errors: see DriftingGenerator."""
        noise, given, alpha = self.checked_inputs(noise, labels, alpha)
        x, *noise_maps = noise.split(self.noise_sizes, dim = -1)
        cond = self.alpha_embed(sinusoidal(alpha, 256).to(x.dtype))  # b d
        cond = self.embedded(cond, given.get('labels'), given.get('vector'))
        scales_shifts = self.to_scale_shift(cond).split(self.sizes, dim = -1)
        for i, (layer, scale_shift) in enumerate(zip(self.layers, scales_shifts, strict = True)):
            x = layer(x)  # b d, or b d h w
            if i > 0 and 'image' in given:
                patches = F.pixel_unshuffle(given['image'], self.image_size // x.shape[-1])
                x = x + self.image_embeds[i - 1](patches)
            if i > 0 and noise_maps:
                x = x + self.noise_embeds[i - 1](noise_maps[i - 1])
            scale, shift = scale_shift.view(x.shape[0], 2, -1, *[1] * (x.ndim - 2)).unbind(dim = 1)
            x = F.silu(x * (1 + scale) + shift)
        return full_precision(self.output_convs(self.to_image(x))).tanh()  # or bf16 saturates

# ── 6. the loss of a step - Eq. 6, 13, 14, A.5-A.7 ───

class DriftStats(NamedTuple):
    scale: Tensor  # S, the mean distance: temperatures are relative to it
    drift_rms: dict  # {temperature: lambda}, the rms of V before it is normalised
    neighbors: dict  # {temperature: to how many positives a sample listens}, 1 .. p
    uncond_share: dict  # {temperature: share of unconditional samples in the push}, 0 .. 1
    potential: dict  # {temperature: what a field with a potential descends}: it falls

class Breakdown(NamedTuple):
    losses: dict  # {feature name: loss}
    stats: dict   # {feature name: DriftStats}

@typecheck
def effective_neighbors(affinity: Float[Tensor, '... n m']) -> Float[Tensor, '... n']:
    """To how many of m samples a point listens: exp of the entropy of its affinities, 1 .. m."""
    prob = F.normalize(affinity, p = 1, dim = -1)
    return torch.special.entr(prob).sum(dim = -1).exp()

@typecheck
def squared_distances(x: Float[Tensor, 'b n d'], y: Float[Tensor, 'b y d']) -> Float[Tensor, 'b n y']:
    """|x|^2 + |y|^2 - 2 x.y: centre the points, or it loses the digits of an offset."""
    x_sq, y_sq = (torch.linalg.vector_norm(t, dim = -1, keepdim = True).square_() for t in (x, y))
    return torch.baddbmm(y_sq.mT, x, y.mT, alpha = -2).add_(x_sq)

class KnownGradient(torch.autograd.Function):
    """A loss () or [b] of known gradient: grad is that of its mean with respect to x."""
    @staticmethod
    def forward(ctx, x, loss, grad):
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        check(not torch.is_grad_enabled(), 'the drifting loss has no second derivative: leave out create_graph')
        grad, = ctx.saved_tensors
        factor = grad_loss * grad_loss.numel()  # () or b
        return grad * factor.reshape(-1, *(1,) * (grad.ndim - 1)), None, None

PART_NUMBERS = dict(cpu = 2 ** 19, gpu = 2 ** 27)  # of a part

class DriftProblems:
    """b independent problems of one feature (class group x location), in parts that fit a cache.

    S and lambda are means over all problems: hence three rounds, sum_distances, sum_drift and loss.
    Between them `two_rounds` adds the sums of other chunks and processes.
    """
    # release
    self_distance = 100.  # of a sample to itself, in units of S
    min_scale = 1e-3  # of S and of S / sqrt(d)
    min_dist_sq, min_drift_sq = 1e-8, 1e-8  # the latter of mean V^2

    def __init__(
        self,
        gen: Float[Tensor, 'b g d'],
        pos: Float[Tensor, 'b p d'],
        uncond: Float[Tensor, 'b u d'] | None = None,
        *,
        uncond_weight: Float[Tensor, 'b u'] | None = None,  # from 0 on. None: ones
        neg: Float[Tensor, 'b m d'] | None = None,  # negatives, instead of gen
        temperatures = (0.02, 0.05, 0.2),  # A.6, relative to the mean distance S
        field = DRIFT_FIELD,  # Algorithm 2
        affinity_floor = 1e-6,  # release; it freezes low-dimensional data: 0 there
        diagnostics = True  # the last three fields of DriftStats, otherwise empty
    ):
        sets = dict(pos = pos, **existing(uncond = uncond, neg = neg))
        check_samples(1, gen = gen, **sets)
        check_shape('gen', gen, ('problems', 'samples', 'features'))
        check_number(0, 1, affinity_floor = affinity_floor)
        check(isinstance(field, DriftField), f'field must be a DriftField, got {field!r}')
        check(exists(neg) or not field.needs_neg, f'{type(field).__name__} needs neg, more generated samples')
        values = np.atleast_1d('' if torch.is_tensor(temperatures) else temperatures)
        fits = values.ndim == 1 and values.dtype.kind in 'iuf' and 0 < len(values) == len({*values})
        fits = fits and 0 < values.min() <= values.max() < math.inf
        check(fits, f'temperatures must be different, finite numbers above 0, got {temperatures!r}')
        self.temperatures = tuple(map(float, values))
        self.field, self.affinity_floor, self.diagnostics = field, affinity_floor, diagnostics
        self.gen = full_precision(gen)  # the gradient flows to it
        self.own_negatives = not exists(neg)
        self.sets = {**sets, 'neg': default(neg, self.gen)}  # in the order of y
        sizes = [t.shape[1] for t in self.sets.values()]
        self.b, self.g, self.d = gen.shape
        self.p, self.m, self.y = sizes[0], sizes[-1], sum(sizes)
        self.weight = self.gen.new_ones(self.b, 1, self.y)
        if exists(uncond_weight):
            num_uncond = self.y - self.p - self.m
            check_shape('uncond_weight', uncond_weight, (self.b, num_uncond), ', one for each of uncond')
            check_range('uncond_weight', uncond_weight, 0, 10 ** 9)
            self.weight[:, 0, self.p:-self.m] = uncond_weight
        temperature = torch.tensor(self.temperatures, dtype = self.gen.dtype).view(-1, 1, 1)
        self.temperature = temperature.to(gen.device, non_blocking = gen.is_cuda)  # t 1 1

        # keeps_W: |V|^2 comes from W and distances, V from the sum of the W
        num_vectors, num_others = self.g * len(self.temperatures), self.y - self.m
        products = num_vectors * self.y ** 2 + (num_others ** 2 + self.g * self.y) * self.d
        is_cheap = products < 1.3 * num_vectors * self.y * self.d
        is_small = self.b * num_vectors * self.d < PART_NUMBERS['cpu'] / 4
        fits = self.field.zero_sum and self.own_negatives and not gen.is_mps  # baddbmm_ fails
        self.keeps_W = fits and is_cheap and not is_small
        largest = self.y * max(self.d, num_vectors)
        size = max(1, PART_NUMBERS.get(gen.device.type, PART_NUMBERS['gpu']) // largest)
        self.parts = [slice(i, i + size) for i in range(0, self.b, size)]

        # of every part what two rounds need, {start: value}
        self.kept_squares, self.kept_fields = {}, {}
        self.placed = None, None, None  # part, x, y

    # of one part
    def points(self, part):
        """x [b g d], y [b y d], centred on x, or distances lose digits."""
        if self.placed[0] != part:
            center = self.gen[part].mean(dim = 1, keepdim = True)
            y = cat([t[part].to(center) for t in self.sets.values()], dim = 1)
            y -= center
            x = y[:, -self.g:] if self.own_negatives else self.gen[part] - center
            self.placed = part, x, y
        return self.placed[1:]

    def squares(self, part):
        """Squared distances [b g y], and where |V| needs them [b o o]."""
        if part.start not in self.kept_squares:
            x, y = self.points(part)
            others = y[:, :-self.m]
            squares_of_others = squared_distances(others, others) if self.keeps_W else None
            self.kept_squares[part.start] = squared_distances(x, y), squares_of_others
        return self.kept_squares[part.start]

    def distances(self, part):
        return self.squares(part)[0].clamp(min = self.min_dist_sq).sqrt_()

    def masked_distances(self, part, scale):
        """[b 1 g y] in units of S; no sample sees itself."""
        dist = self.distances(part).div_(scale.clamp(min = self.min_scale))
        if self.own_negatives:
            dist[:, :, -self.g:].diagonal(dim1 = -2, dim2 = -1).add_(self.self_distance)
        return dist.unsqueeze(1)

    def coefficients(self, part, scale):
        """W [b t g y], V = W (y - x)."""
        dist = self.masked_distances(part, scale)
        weight = self.weight[part] if 'uncond' in self.sets else None
        return self.field.coefficients(dist, self.p, self.m, self.temperature, weight, self.affinity_floor)

    def fields(self, part, W):
        """V [b t g d] of W, or W itself if keeps_W."""
        return W if self.keeps_W else self.field.apply_coefficients(W, *self.points(part))

    def squared_lengths(self, part, W):
        """[t]: -1/2 sum_{y, y'} W(y) W(y') |y - y'|^2, as W sums to 0."""
        squares, squares_of_others = self.squares(part)
        W = rearrange(W, 'b t g y -> b (t g) y')
        (W_others, W_gen), squares = (t.tensor_split((self.y - self.m,), dim = -1) for t in (W, squares))
        to_others, to_gen = (W_gen @ t for t in squares)  # b (t g) o, b (t g) g
        to_others.baddbmm_(W_others, squares_of_others, beta = 2)  # both orders
        lengths = to_others.mul_(W_others).sum(dim = -1) + to_gen.mul_(W_gen).sum(dim = -1)
        return -0.5 * reduce(lengths, 'b (t g) -> t', 'sum', g = self.g)

    # round 1: S. Features are in units of S / sqrt(d)
    def sum_distances(self, part):
        """[distances times weights, weights], summed."""
        sums = self.distances(part).pow_(self.field.scale_power).sum(dim = 1, keepdim = True)
        weight = self.weight[part]
        return stack(((sums * weight).sum(), weight.sum() * self.g))

    def scale(self, S_sums):
        return (S_sums[0] / S_sums[1]) ** (1 / self.field.scale_power)

    # round 2: lambda, and where the drift comes from
    def sum_drift(self, part, S_sums):
        """[V^2, ... diagnostics, number], of each temperature [t], summed."""
        scale = self.scale(S_sums)
        W = self.coefficients(part, scale)
        fields = self.kept_fields[part.start] = self.fields(part, W)
        if self.keeps_W:
            V_sq = self.squared_lengths(part, W)
        else:
            V_sq = torch.linalg.vector_norm(fields, dim = -1).square().sum(dim = (0, 2))
        sums = [V_sq]
        if self.diagnostics:
            pull, push = W[..., :self.p], W[..., self.p:]
            uncond_share = push[..., :-self.m].sum(dim = -1) / push.sum(dim = -1).clamp(max = -1e-30)
            sums += [effective_neighbors(pull).sum(dim = (0, 2)), uncond_share.sum(dim = (0, 2))]
        if self.diagnostics and hasattr(self.field, 'potential'):
            dist = self.masked_distances(part, scale)
            potential = self.field.potential(dist, self.p, self.temperature, self.weight[part])
            sums.append(potential.sum(dim = (0, 2)))
        del self.kept_squares[part.start]
        return stack((*sums, torch.full_like(V_sq, len(W) * self.g)))

    # round 3: fields at root mean square 1, V their sum. The loss is V^2, its gradient -2 V
    def loss(self, scale, unit, rms):
        """The loss of each problem [b], and the gradient of their mean, like gen [b g d]."""
        factors = 1 / (rms.clamp(min = self.min_drift_sq ** 0.5) * unit)  # t
        losses, grad = [], torch.empty_like(self.gen)
        for part in self.parts:
            fields = self.kept_fields.pop(part.start, None)
            if not exists(fields):  # the rounds were of other chunks
                fields = self.fields(part, self.coefficients(part, scale))
            fields = rearrange(fields, 'b t g n -> b t (g n)')
            # the sum of V (n = d), or of W (n = y)
            V = factors.expand(len(fields), 1, -1).contiguous() @ fields  # for mps
            V = rearrange(V, 'b 1 (g n) -> b 1 g n', g = self.g)
            if self.keeps_W:
                V = self.field.apply_coefficients(V, *self.points(part))
            grad[part] = V[:, 0]
            losses.append(V.square_().mean(dim = (1, 2, 3)))
        return cat(losses), grad.mul_(-2 / (self.b * self.g * self.d * unit))

    def solve(self, S_sums, V_sums, of = ''):
        """The loss of each problem [b], and DriftStats."""
        given = {name + of: t for name, t in {'gen': self.gen, **self.sets}.items()}
        check_values(V_sums, **given)  # of all processes
        with torch.no_grad(), torch.autocast(self.gen.device.type, enabled = False):
            scale = self.scale(S_sums)
            V_sq, *diagnosed = V_sums[:-1] / V_sums[-1]
            unit = (scale / self.d ** 0.5).clamp(min = self.min_scale)
            rms = (V_sq.clamp(min = 0) / self.d).sqrt() / unit
            found = [dict(zip(self.temperatures, mean, strict = True)) for mean in (rms, *diagnosed)]
            found += ({} for _ in range(4 - len(found)))  # no diagnostics, or no potential
            stats = DriftStats(scale, *found)
            loss, grad = self.loss(scale, unit, rms)
        return KnownGradient.apply(self.gen, loss, grad), stats

@torch.no_grad()
def two_rounds(bundles):
    """Totals {feature: sums} for S, then for lambda, of bundles() {feature: DriftProblems}."""
    rounds = []
    for sums_of in (DriftProblems.sum_distances, DriftProblems.sum_drift):
        totals = {}
        for bundle in bundles():
            for name, problems in bundle.items():
                known = [earlier[name] for earlier in rounds]  # S, for lambda
                with torch.autocast(problems.gen.device.type, enabled = False):
                    sums = (sums_of(problems, part, *known) for part in problems.parts)
                    totals[name] = sum(sums, start = totals.get(name, 0))
            del bundle, problems  # or those of two are held
        if torch.distributed.is_initialized():
            joined = cat([sums.flatten() for sums in totals.values()])
            torch.distributed.all_reduce(joined)  # one call for all
            for sums in totals.values():
                total, joined = joined.tensor_split((sums.numel(),))
                sums.copy_(total.view_as(sums))
        rounds.append(totals)
    return rounds

def drift_loss(gen, pos, uncond = None, **options) -> tuple[Float[Tensor, 'b'], DriftStats]:
    """The drifting loss on one feature (A.6): mean |x - stopgrad(x + V)|^2 in units of S / sqrt(d).

    gen [b g d]: generated, pos [b p d]: real, uncond [b u d]: real of any class.
    b: independent problems (class group x location), which share the statistics, with all processes.
    options: see DriftProblems.
    Returns the loss of each problem [b] and DriftStats. The loss is V^2, its gradient -2 V / n in those units.
    As each field is divided by its root mean square, the loss stays near a constant: watch stats.drift_rms.
    Raises ValueError for empty sets, unfit shapes, non-finite values, negative weights.
    """
    problems = DriftProblems(gen, pos, uncond, **options)
    S_sums, V_sums = two_rounds(lambda: [{'': problems}])
    return problems.solve(S_sums[''], V_sums[''])

class FeatureDriftLoss(Module):
    """The drifting loss summed over features (Eq. 13, 14, A.5), guided by unconditional negatives (A.7).

    encoder: None, a Module with .features(x), a callable, or a list of them: {name: [b f d]} of x [b ...].
    decoder: a callable in front of them, from latents to pixels. Modules are frozen, gradients pass.
    raw: add the flattened sample itself, before any decoder, as 'global' (A.5: always).
    group_chunk_size: class groups at a time: the same in less memory, by three encoder passes.
    drift_loss_kwargs: temperatures, field, affinity_floor.
    """
    def __init__(self, encoder = None, *, decoder = None, raw = True, group_chunk_size = None, **drift_loss_kwargs):
        super().__init__()
        unknown = sorted(drift_loss_kwargs.keys() - {'temperatures', 'field', 'affinity_floor', 'diagnostics'})
        check(not unknown, f'unknown arguments {unknown}')
        check_whole(1, **existing(group_chunk_size = group_chunk_size))
        is_list = isinstance(encoder, (list, tuple, ModuleList))
        self.encoders = encoder if is_list else [*filter(exists, [encoder])]
        check(raw or self.encoders, 'raw = False needs an encoder')
        held = [*self.encoders, *filter(exists, [decoder])]
        for part in held:  # grows: networks inside are frozen too
            fits = callable(part) or hasattr(part, 'features')
            check(fits, f'encoder and decoder must be callable or have .features(x), got {part!r}')
            method = part if inspect.ismethod(part) else getattr(part, 'features', None)
            inner = [getattr(method, '__self__', None)]
            if hasattr(method, '__code__') and not isinstance(inner[0], Module):  # an object
                inner += [getattr(inner[0], name, None) for name in method.__code__.co_names]
            if isinstance(part, partial):
                inner += [part.func, *part.args, *part.keywords.values()]
            codes = [part.__code__] if inspect.isfunction(part) else []
            for code in codes:  # grows: inner functions
                codes += filter(inspect.iscode, code.co_consts)
                names = [step.argval for step in dis.get_instructions(code) if step.opname == 'LOAD_GLOBAL']
                inner += map(part.__globals__.get, names)
            inner += [cell.cell_contents for cell in getattr(part, '__closure__', None) or ()]
            held += [value for value in inner if callable(value) and all(value is not other for other in held)]
        self.decoder, self.raw = decoder, raw
        self.group_chunk_size, self.drift_loss_kwargs = group_chunk_size, drift_loss_kwargs
        self.needs_neg = getattr(drift_loss_kwargs.get('field'), 'needs_neg', False)
        self.frozen = ModuleList([m.eval().requires_grad_(False) for m in held if isinstance(m, Module)])

    def with_options(self, *, group_chunk_size = None, compile = False):
        """A copy, in chunks or compiled. On a cpu the field is faster uncompiled."""
        other = copy(self)
        other.group_chunk_size = default(group_chunk_size, self.group_chunk_size)
        if compile:
            other.features = torch.compile(self.features)
        if compile and torch.accelerator.is_available():
            field = copy(self.drift_loss_kwargs.get('field', DRIFT_FIELD))
            field.coefficients = torch.compile(field.coefficients)
            other.drift_loss_kwargs = {**self.drift_loss_kwargs, 'field': field}
        return other

    def train(self, mode = True):
        return super().train(False)  # always in eval mode

    def features(self, x):
        """{name: [b f d]} of samples x [b ...]."""
        features = {'global': rearrange(x, 'b ... -> b 1 (...)')} if self.raw else {}
        x = self.decoder(x) if exists(self.decoder) else x
        for encoder in self.encoders:
            encoded = getattr(encoder, 'features', encoder)(x)
            fits = isinstance(encoded, dict) and len(encoded) > 0
            check(fits, f'an encoder must return a dict {{name: [b f d]}}, got {type(encoded).__name__}')
            twice = sorted(features.keys() & encoded.keys())
            check(not twice, f'two encoders return features of the same name: {twice}')
            features |= encoded
        for name, t in features.items():
            check_shape(f'feature {name!r}', t, (len(x), 'locations', 'feature dim'))
        return features

    def problems(self, options, gen, uncond_weight = None, **others):
        """Yields {feature: DriftProblems}, small ones together: fewer all_reduce. others: pos, uncond, neg."""
        c, num = len(gen), gen.shape[1] + sum(t.shape[1] for t in others.values())
        gen_features = self.features(rearrange(gen, 'c g ... -> (c g) ...'))
        with torch.no_grad():
            encoded = {key: self.features(rearrange(t, 'c n ... -> (c n) ...')) for key, t in others.items()}
        alone = sorted({name for found in encoded.values() for name in gen_features.keys() ^ found.keys()})
        check(not alone, f'features of generated or of real samples alone: {alone}')
        without = [name for name, t in gen_features.items() if gen.requires_grad and not t.requires_grad]
        check(not without or not torch.is_grad_enabled(), f'encoder or decoder gives no gradient to {without}')

        # up to half the numbers of the largest feature
        numbers = {name: t.shape[1] * (t.shape[2] + num) for name, t in gen_features.items()}
        bundle = {}
        for name, t in gen_features.items():
            if bundle and sum(numbers[key] for key in (*bundle, name)) > max(numbers.values()) / 2:
                yield bundle
                bundle = {}
            points = {'gen': t, **{key: found.pop(name) for key, found in encoded.items()}}
            arguments = {key: rearrange(t, '(c n) f d -> (c f) n d', c = c) for key, t in points.items()}
            if exists(uncond_weight):
                arguments['uncond_weight'] = repeat(uncond_weight, 'c u -> (c f) u', f = t.shape[1])
            bundle[name] = DriftProblems(**arguments, **options)
            del arguments, points
        yield bundle

    def forward(
        self,
        gen: Float[Tensor, 'c g ...'],
        pos: Float[Tensor, 'c p ...'],
        uncond: Float[Tensor, 'c u ...'] | None = None,
        alpha: Float[Tensor, 'c'] | None = None,  # guidance scale of each group, >= 1
        neg: Float[Tensor, 'c m ...'] | None = None,  # other generated samples as negatives
        diagnostics = True  # see DriftProblems
    ) -> tuple[Float[Tensor, ''], Breakdown]:
        """The loss, and its Breakdown. Gradients reach gen through the encoder. Errors: as drift_loss, alpha < 1."""
        samples = dict(gen = gen, pos = pos, **existing(uncond = uncond, neg = neg))
        check_samples(1, **samples)
        check(exists(alpha) or not exists(uncond), 'uncond needs alpha, guidance scales [groups]')
        if exists(alpha):
            alpha = as_tensor('alpha', alpha).to(gen.device)
            check_shape('alpha', alpha, (len(gen),), ', one per group')
            check_range('alpha', alpha, 1, 10 ** 6)
            fits = exists(uncond) or not can_read(alpha) or (alpha == 1).all()
            check(fits, 'alpha above 1 needs uncond, unconditional samples')
        if exists(uncond):
            g, u = gen.shape[1], uncond.shape[1]
            samples['uncond_weight'] = repeat((full_precision(alpha) - 1) * (g - 1) / u, 'c -> c u', u = u)  # A.7
        options = {'diagnostics': diagnostics, **self.drift_loss_kwargs}
        if not exists(self.group_chunk_size):
            return self.loss_of(samples, options)

        # chunks: the encoder sees them for S, for lambda, and for the loss
        losses, grad = {}, torch.empty_like(gen)
        chunks = chunked((grad, samples), self.group_chunk_size)
        sums = two_rounds(lambda: chain.from_iterable(self.problems(options, **chunk) for _, chunk in chunks))
        for part, chunk in chunks:  # part: of grad, a view
            x, share = chunk['gen'].detach(), len(part) / len(gen)
            x.requires_grad_(gen.requires_grad and torch.is_grad_enabled())
            loss, breakdown = self.loss_of({**chunk, 'gen': x}, options, sums)
            if x.requires_grad:
                part.copy_(torch.autograd.grad(loss, x)[0]).mul_(share)
            for name, t in breakdown.losses.items():
                losses[name] = losses.get(name, 0) + t.detach() * share
        return KnownGradient.apply(gen, sum(losses.values()), grad), Breakdown(losses, breakdown.stats)

    def loss_of(self, samples, options, sums = None):
        """Sum over features (Eq. 14) of means over their locations (release; A.6: sums), Breakdown."""
        losses, stats = {}, {}
        for bundle in self.problems(options, **samples):
            S_sums, V_sums = sums or two_rounds(lambda bundle = bundle: [bundle])
            for name, problems in bundle.items():
                loss, stats[name] = problems.solve(S_sums[name], V_sums[name], f' of feature {name!r}')
                losses[name] = loss.mean()
            del bundle, problems
        return sum(losses.values()), Breakdown(losses, stats)

# ── 7. fields of later work ───

class GradientField(DriftField):
    """The direction of the kernel's own gradient, sum_y k (y - x) / (r t) / sum_y k (2605.10727).
    V is that over positives minus that over negatives; r = |x - y|, or t if Gaussian.
    """
    def __init__(self, *, kernel = 'laplace', attraction = 1., repulsion = 1.):
        super().__init__(kernel = kernel, attraction = attraction, repulsion = repulsion)
        self.zero_sum = False

    def log_kernels(self, dist, num_pos, temperature, weight):
        """Logs of the weighted kernel on [positives, negatives], and of its sums [... n 1]."""
        log_weight = rearrange(weight.log().clamp(min = -1e6), '... y -> ... 1 y')
        sides = (self.logits(dist, temperature) + log_weight).tensor_split((num_pos,), dim = -1)
        return sides, [t.logsumexp(dim = -1, keepdim = True) for t in sides]

    def slope(self, dist, temperature):
        """Length of the kernel's gradient, per |y - x| and per k."""
        r = dist.clamp(min = 1e-4 * temperature) if self.kernel == 'laplace' else temperature
        return 1 / (r * temperature)

    def coefficients(self, dist, num_pos, num_neg, temperature, weight = None, *_):
        weight = default(weight, dist.new_ones(dist.shape[-1]))
        (log_pos, log_neg), (mass_pos, mass_neg) = self.log_kernels(dist, num_pos, temperature, weight)
        W_pos = self.attraction * (log_pos - mass_pos).exp()
        W_neg = -self.repulsion * (log_neg - mass_neg).exp()
        return cat((W_pos, W_neg), dim = -1) * self.slope(dist, temperature)

class SharpField(GradientField):
    """V = grad log sum_y k c over positives, minus that over negatives, c = t (|x - y| + t) (2604.06333).
    The gradient of k c is k (y - x), and V is minus the gradient of a scalar, `potential`.
    """
    def __init__(self, *, attraction = 1., repulsion = 1.):
        super().__init__(attraction = attraction, repulsion = repulsion)

    def logits(self, dist, temperature):
        return super().logits(dist, temperature) - self.slope(dist, temperature).log()

    def slope(self, dist, temperature):
        return 1 / (temperature * (dist + temperature))

    def potential(self, dist, num_pos, temperature, weight):
        """[... n], log of the mean of k c over negatives minus that over positives."""
        _, (mass_pos, mass_neg) = self.log_kernels(dist, num_pos, temperature, weight)
        pos, neg = (t.sum(dim = -1, keepdim = True) for t in weight.tensor_split((num_pos,), dim = -1))
        return (mass_neg - mass_pos).squeeze(-1) - (neg / pos).log()

class SinkhornField(DriftField):
    """Entropic optimal transport, W-Flow (2605.11755): V = T_pos - T_neg + (alpha - 1) (T_pos - T_uncond).

    T(x) is the barycenter of the plan for the cost |x - y|^2 / 2, regularised by the temperature, of uniform
    marginals. The negatives are a second, independent batch of generated samples.
    """
    scale_power = 2
    needs_neg = True

    def __init__(self, *, iters = 10, attraction = 1., repulsion = 1.):
        super().__init__(attraction = attraction, repulsion = repulsion)
        check_whole(1, iters = iters)
        self.iters = iters

    def barycenter(self, dist, temperature):
        """The plan's rows [... n m], of sum 1: T(x) is their product with y."""
        log_kernel = -0.5 * dist ** 2 / temperature
        n, m = log_kernel.shape[-2:]
        v = 0.
        for _ in range(self.iters if m > 0 else 0):
            u = -math.log(n) - (log_kernel + v).logsumexp(dim = -1, keepdim = True)
            v = -math.log(m) - (log_kernel + u).logsumexp(dim = -2, keepdim = True)
        return (log_kernel + v).softmax(dim = -1)

    def coefficients(self, dist, num_pos, num_neg, temperature, weight = None, *_):
        y = dist.shape[-1]
        sets = num_pos, y - num_neg
        T_pos, T_uncond, T_neg = (self.barycenter(t, temperature) for t in dist.tensor_split(sets, dim = -1))
        uncond_weight = default(weight, dist.new_ones(y))[..., num_pos:y - num_neg]
        # alpha - 1 from the weights (alpha - 1) (g - 1) / u
        guidance = reduce(uncond_weight, '... u -> ... 1 1', 'sum') / max(1, dist.shape[-2] - 1)
        W_pos = self.attraction * (1 + guidance) * T_pos
        W_neg = -self.repulsion * cat((guidance * T_uncond, T_neg), dim = -1)
        return cat((W_pos, W_neg), dim = -1)

# ── 8. feature encoders - A.3-A.5 ───

FEATURE_SETS = ('locations', 'mean_std', '2x2', '4x4')

def floating(x, like):
    """In a parameter's dtype. Of integers nobody knows the range."""
    check_floating('x', x, 'convert it to float in [-1, 1]')
    check_range('x', x, -10 ** 6, 10 ** 6)
    return x.to(like.dtype)

def check_sets(sets, known = FEATURE_SETS):
    is_known = isinstance(sets, (list, tuple)) and all(name in known for name in sets)
    check(is_known, f'feature_sets must be among {known}, got {sets!r}')

def map_features(name, x, sets = FEATURE_SETS):
    """{name, name_mean, name_std, name_mean_2, ...: [b f d]}, features of a map x [b d h w] (A.5): 'locations', mean
    and deviation of it and of 2x2 and 4x4 patches, if they divide it.
    """
    maps = {name: x} if 'locations' in sets else {}
    mean, var, (h, w) = full_precision(x), None, x.shape[-2:]
    for feature_set, suffix, size in (('2x2', '_2', 2), ('4x4', '_4', 4), ('mean_std', '', 1)):
        if feature_set in sets and h % size == 0 and w % size == 0:
            finer = mean  # means of smaller patches, or the map
            pool = partial(torch.mean, dim = (-2, -1), keepdim = True)  # the whole map
            if suffix:
                pool = partial(F.avg_pool2d, kernel_size = size * finer.shape[-1] // w)
            mean = pool(finer)
            repeated = F.interpolate(mean, finer.shape[-2:]) if suffix else mean
            squares = (finer - repeated).square()
            # variance: of the finer means, and the mean of the finer variances
            var = pool(squares + var if exists(var) else squares)
            maps[f'{name}_mean{suffix}'], maps[f'{name}_std{suffix}'] = mean, (var + 1e-6).sqrt()
    return {key: rearrange(t, 'b d h w -> b (h w) d') for key, t in maps.items()}

def group_norm(dim):
    """At most 32 groups, the largest divisor; the release's epsilon is flax's."""
    num_groups = max(n for n in range(1, 33) if dim % n == 0)
    return nn.GroupNorm(num_groups, dim, eps = 1e-6)

def conv_norm(dim_in, dim_out, kernel = 3, stride = 1):
    conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding = kernel // 2, bias = False)
    return nn.Sequential(conv, group_norm(dim_out))

class ResidualBlock(Module):
    """Where it widens the map, it halves its sides."""
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.stride = 1 if dim_in == dim_out else 2
        self.conv1 = conv_norm(dim_in, dim_out, stride = self.stride)
        self.conv2 = conv_norm(dim_out, dim_out)
        self.shortcut = nn.Identity() if dim_in == dim_out else conv_norm(dim_in, dim_out, 1)

    def forward(self, x):
        h, s = F.relu(self.conv1(x)), self.stride
        return F.relu(self.conv2(h) + self.shortcut(x[..., ::s, ::s]))  # oneDNN can crash on strided 1x1

class UpBlock(Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.norm = group_norm(dim_in + dim_out)
        self.proj = conv_norm(dim_in + dim_out, dim_out)
        self.refine = conv_norm(dim_out, dim_out)

    def forward(self, x, skip):
        x = F.interpolate(x, skip.shape[-2:], mode = 'bilinear')
        x = self.norm(cat((x, skip), dim = 1))
        return F.relu(self.refine(F.relu(self.proj(x))))

class MAEBreakdown(NamedTuple):
    reconstruction: Tensor  # squared error per masked position, summed over channels (release)
    classification: Tensor  # cross entropy, 0 without labels
    accuracy: Tensor        # of the classifier, 0 without labels

class LatentMAE(Module, PyTorchModelHubMixin, coders = CODERS):
    """The paper's feature encoder: a ResNet, pretrained as a masked autoencoder on latents or pixels (A.3).

    patch_size: patches are folded into channels first: 1 for latents, 8 for pixels. 8 divides the folded sides.
    layers: residual blocks of the four stages, dim, 2 dim, 4 dim and 8 dim wide; the last three halve the map.
    num_classes: of the linear head on the pooled last map, None for no head.
    mask_patch_size, mask_ratio: patches of the folded input, each zeroed with this probability.
    feature_sets: of `.features`, see map_features, and 'norm_x', rms of the folded channels (A.5: squared).
    checkpointing: see DriftingGenerator. Samples are cast to the dtype of the weights.
    """
    def __init__(
        self, *, dim = 256, channels = 4, patch_size = 1, layers = (3, 4, 6, 3), num_classes = 1000,
        mask_patch_size = 2, mask_ratio = 0.5, feature_sets = (*FEATURE_SETS, 'norm_x'), checkpointing = False
    ):
        super().__init__()
        check_whole(1, dim = dim, channels = channels, patch_size = patch_size, mask_patch_size = mask_patch_size)
        check_whole(1, **existing(num_classes = num_classes))
        is_four = isinstance(layers, (list, tuple)) and [type(num) for num in layers] == [int] * 4
        check(is_four and min(layers) > 0, f'layers must be four numbers of blocks from 1 on, got {layers!r}')
        check_number(1e-6, 1 - 1e-6, mask_ratio = mask_ratio)
        check_sets(feature_sets, (*FEATURE_SETS, 'norm_x'))
        self.channels, self.patch_size, self.num_classes = channels, patch_size, num_classes
        self.mask_patch_size, self.mask_ratio = mask_patch_size, mask_ratio
        self.feature_sets, self.checkpointing = feature_sets, checkpointing
        self.mask_pixels = mask_patch_size * patch_size  # side of a mask patch

        dims = (dim, dim, dim * 2, dim * 4, dim * 8)  # of the stem and the stages
        self.stem = conv_norm(channels * patch_size ** 2, dim)
        self.stages, self.norms = ModuleList(), ModuleDict()
        for i, depth in enumerate(layers, 1):
            dims_in = dims[i - 1], *[dims[i]] * (depth - 1)
            self.stages.append(ModuleList([ResidualBlock(dim_in, dims[i]) for dim_in in dims_in]))
            self.norms[f'layer{i}'] = group_norm(dims[i])

        # decoder: from stage 4 up to stages 3, 2, 1 and the stem
        self.bridge = conv_norm(dims[4], dims[4])
        self.ups = ModuleDict({f'up{i}{i - 1}': UpBlock(dims[i], dims[i - 1]) for i in (4, 3, 2, 1)})
        self.to_pixels = nn.Conv2d(dim, channels * patch_size ** 2, 1)
        self.to_logits = nn.Linear(dims[4], num_classes) if exists(num_classes) else None

        # flax's lecun_normal: variance 1 / fan_in, cut at two deviations
        for name, p in self.named_parameters():
            if p.ndim > 1:
                std = p[0].numel() ** -0.5 / 0.87962566103423978
                nn.init.trunc_normal_(p, std = std, a = -2 * std, b = 2 * std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def checked_samples(self, x, multiple = 8):
        x = floating(x, self.to_pixels.weight)
        multiple *= self.patch_size
        check_shape('x', x, ('batch', self.channels, 'height', 'width'))
        fits = x.numel() > 0 and x.shape[2] % multiple == x.shape[3] % multiple == 0
        check(fits, f'x has shape {tuple(x.shape)}, expected sides that are multiples of {multiple}')
        return x

    def mask_shape(self, x):
        self.checked_samples(x, math.lcm(8, self.mask_patch_size))
        return x.shape[0], x.shape[2] // self.mask_pixels, x.shape[3] // self.mask_pixels

    def fold(self, x):
        x, p = self.checked_samples(x), self.patch_size
        return channels_last(rearrange(x, 'b ch (h p1) (w p2) -> b (p1 p2 ch) h w', p1 = p, p2 = p))

    def maps(self, x):
        """{name: [b d h w]}: stem, every second block of a stage, its normalised output."""
        x = F.relu(self.stem(x))
        maps = {'conv1': x}
        for stage, (name, norm) in zip(self.stages, self.norms.items(), strict = True):
            for k, block in enumerate(stage, 1):
                x = run_block(block, x, checkpointing = self.checkpointing)
                if k % 2 == 0:
                    maps[f'{name}_blk{k}'] = x
            x = maps[name] = norm(x)  # release: feeds the next stage too
        return maps

    def features(self, x):
        """{name: [b f d]} of samples x [b ch h w], under the release's names (A.5)."""
        x, features = self.fold(x), {}
        if 'norm_x' in self.feature_sets:
            features['norm_x'] = (reduce(full_precision(x) ** 2, 'b d h w -> b 1 d', 'mean') + 1e-6).sqrt()
        for name, feature_map in self.maps(x).items():
            features |= map_features(name, feature_map, self.feature_sets)
        return features

    def draw_mask(self, x, generator = None):
        """A random mask [b h w] over mask patches of x [b ch h w]: 1 is dropped."""
        device = getattr(generator, 'device', x.device)
        keys = torch.rand(self.mask_shape(x), generator = generator, device = device)
        return (keys < self.mask_ratio).to(x)

    def dropped(self, mask):
        """A mask [b h w] of mask patches as [b 1 h w] of pixels."""
        p = self.mask_pixels
        return repeat(mask, 'b h w -> b 1 (h p1) (w p2)', p1 = p, p2 = p)

    def reconstruct(self, x, mask):
        """Samples [b ch h w] from what a mask [b h w] leaves, and the encoder's last map."""
        check_shape('mask', mask, self.mask_shape(x), ', one number per mask patch')
        maps = self.maps(self.fold(x * (1 - self.dropped(mask.to(x)))))
        y = F.relu(self.bridge(maps['layer4']))
        for up, skip in zip(self.ups.values(), ('layer3', 'layer2', 'layer1', 'conv1'), strict = True):
            y = up(y, maps[skip])
        p = self.patch_size
        y = rearrange(self.to_pixels(y), 'b (p1 p2 ch) h w -> b ch (h p1) (w p2)', p1 = p, p2 = p)
        return y, maps['layer4']

    def forward(self, x, labels = None, *, cls_weight = 0., mask = None):
        """The mean of cls_weight * classification + (1 - cls_weight) * reconstruction, and its MAEBreakdown.

        labels [b]: None for no classification. mask [b h w]: 1 is dropped, drawn if None.
        Raises ValueError for what does not fit, labels without a classifier, cls_weight without labels.
        """
        check_number(0, 1, cls_weight = cls_weight)
        check(cls_weight == 0 or exists(labels), 'cls_weight above 0 needs labels')
        check(exists(self.to_logits) or not exists(labels), 'labels need a classifier: set num_classes')
        x = self.checked_samples(x)
        mask = mask if exists(mask) else self.draw_mask(x)
        reconstruction, last = self.reconstruct(x, mask)
        mask = mask.to(x)
        check_range('mask', mask, 0, 1)
        positions = reduce(mask, 'b h w -> b', 'sum') * self.mask_patch_size ** 2
        error_sq = (full_precision(reconstruction) - x) ** 2 * self.dropped(mask)
        error = reduce(error_sq, 'b ch h w -> b', 'sum') / (positions + 1e-8)
        cross_entropy = accuracy = torch.zeros_like(error)
        if exists(labels):
            labels = checked_labels(labels, self.num_classes, len(x)).to(x.device)
            logits = full_precision(self.to_logits(reduce(last, 'b d h w -> b d', 'mean')))
            cross_entropy = F.cross_entropy(logits, labels, reduction = 'none')
            accuracy = (logits.argmax(dim = -1) == labels).to(error)
        loss = cls_weight * cross_entropy + (1 - cls_weight) * error
        return loss.mean(), MAEBreakdown(error.mean(), cross_entropy.mean(), accuracy.mean())

# encoders of pixels: images [b 3 h w] in [-1, 1], also after a decoder
class PixelInput(Module):
    """Images, resized (antialiased) and normalised, by default like ImageNet's."""
    def __init__(self, image_size = 224, mean = (0.485, 0.456, 0.406), std = (0.229, 0.224, 0.225)):
        super().__init__()
        check_whole(1, image_size = image_size)
        self.image_size = image_size
        for name, values, low in (('mean', mean, -math.inf), ('std', std, 1e-6)):
            values = as_tensor(name, values).to(torch.get_default_dtype())
            check_shape(name, values, ('channels',))
            check_range(name, values, low)
            self.register_buffer(name, rearrange(values, 'ch -> ch 1 1'), persistent = False)
        check(len(self.mean) == len(self.std), f'mean has {len(self.mean)} channels, std has {len(self.std)}')

    def forward(self, x):
        x = floating(x, self.mean)
        check_shape('x', x, ('batch', len(self.mean), 'height', 'width'), ', images in [-1, 1]')
        x = F.interpolate(x, self.image_size, mode = 'bilinear', antialias = True)
        return ((x + 1) / 2 - self.mean) / self.std

class BackboneFeatures(Module):
    """Drifting features of any vision backbone, as one of timm.

    backbone: images -> maps [b d h w] or tokens [b n d] (of a square map), one, a list, or a dict.
    num_prefix_tokens: class and register tokens, in front, left out. feature_sets: see map_features.
    pixel_input_kwargs: image_size, mean and std of its training, see PixelInput.
    """
    def __init__(self, backbone, *, num_prefix_tokens = 0, feature_sets = FEATURE_SETS, **pixel_input_kwargs):
        super().__init__()
        check_whole(0, num_prefix_tokens = num_prefix_tokens)
        check_sets(feature_sets)
        self.backbone, self.num_prefix_tokens, self.feature_sets = backbone, num_prefix_tokens, feature_sets
        self.pixel_input = PixelInput(**pixel_input_kwargs)

    def features(self, x):
        """{'layer1': [b f d], 'layer1_mean': ...}, or by the names of the backbone's dict."""
        outputs, features = self.backbone(self.pixel_input(x)), {}
        if not isinstance(outputs, dict):
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            outputs = {f'layer{i}': out for i, out in enumerate(outputs, 1)}
        for name, out in outputs.items():
            if torch.is_tensor(out) and out.ndim == 3:
                out = out[:, self.num_prefix_tokens:]
                num, side = out.shape[1], math.isqrt(out.shape[1])
                check(side ** 2 == num > 0, f'{name} has {num} tokens of patches, expected a square number')
                out = rearrange(out, 'b (h w) d -> b d h w', h = side)
            check_shape(name, out, ('batch', 'dim', 'height', 'width'), ', a map, or tokens (batch, num, dim)')
            features |= map_features(name, out, self.feature_sets)
        return features

class ConvNeXtFeatures(Module):
    """ConvNeXt-V2, the second encoder of pixel models, features under the release's names (A.4).

    model: a ConvNextV2Model of transformers, always in float32. The rest goes to PixelInput.
    """
    def __init__(self, model, **pixel_input_kwargs):
        super().__init__()
        self.model = model
        self.pixel_input = PixelInput(**pixel_input_kwargs)

    @classmethod
    def from_pretrained(cls, name = 'facebook/convnextv2-base-22k-224', *, revision = None, **pixel_input_kwargs):
        """With weights of the hub, by default the release's, or of a folder."""
        try:
            from transformers import ConvNextV2Model
        except ImportError as error:
            raise ImportError('ConvNeXt-V2 needs transformers: pip install "drifting-pytorch[convnext]"') from error
        return cls(ConvNextV2Model.from_pretrained(name, revision = revision), **pixel_input_kwargs).eval()

    def features(self, x):
        """{name: [b f d]} of x [b 3 h w]: stages, standardised over channels, and the pooled output."""
        x, features = self.pixel_input(x), {}
        with torch.autocast(x.device.type, enabled = False):
            out = self.model(x, output_hidden_states = True)
            for i, feature_map in enumerate(out.hidden_states[1:]):  # after the stem's, b d h w
                std, mean = torch.std_mean(feature_map, dim = 1, correction = 0, keepdim = True)
                sets = ('locations', 'mean_std') if i > 0 else ('mean_std',)
                name = f'convenxt_stage_{i}'  # the release's spelling
                features |= map_features(name, (feature_map - mean) / (std + 1e-3), sets)
            features['global_mean'] = rearrange(out.pooler_output, 'b d -> b 1 d')
            features['global_std'] = features['convenxt_stage_3_std']
            return features

# ── 9. data - A.7, A.8 ───

# every random number of a run comes from its place there: it can be repeated
def seed_for(*key):
    """A 63-bit seed from any key, for example (seed, step, 'noise')."""
    return random.Random(repr(key)).getrandbits(63)

def seeded(*key, device = 'cpu'):
    return torch.Generator(device).manual_seed(seed_for(*key))

def seed_cpu(seed):
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)

IMAGE_EXTENSIONS = ('.jpeg', '.jpg', '.png', '.webp', '.bmp', '.tif', '.tiff')

class ImageFolder(Dataset):
    """Images [ch size size] in [-1, 1] of a folder's files of IMAGE_EXTENSIONS, and labels.

    A label is the place of the class folder, or 0 without any (num_classes None).
    channels: 3 (RGB), or 1 (grey). flip: mirror half of them at random.
    Read upright (Exif), over white where transparent, the first of an animation.
    Raises ValueError for folders that are empty or mixed, and for unreadable images.
    """
    def __init__(self, root, image_size, *, channels = 3, flip = False):
        check(os.path.isdir(root), f'{root} is not a folder of images, or of class folders')
        check(channels in (1, 3), f'channels must be 1 or 3, got {channels}')
        check_whole(1, image_size = image_size)
        self.root, self.image_size = Path(root), image_size
        self.channels, self.flip = channels, flip
        _, folders, files = next(os.walk(root), (root, [], []))
        self.classes = sorted(name for name in folders if not name.startswith('.'))
        self.num_classes = len(self.classes) or None
        mixed = self.classes and any(name.lower().endswith(IMAGE_EXTENSIONS) and name[0] != '.' for name in files)
        check(not mixed, f'{root} has both class folders and images: move these into class folders')
        self.files = []
        for label, name in enumerate(self.classes or ['']):
            top = os.path.join(root, '')
            paths = [os.path.join(at, file)[len(top):] for at, _, files in os.walk(top + name) for file in files]
            visible = (path for path in paths if f'{os.sep}.' not in f'{os.sep}{path}')
            found = sorted(path for path in visible if path.lower().endswith(IMAGE_EXTENSIONS))
            check(found, f'{self.root / name} has no images ({", ".join(IMAGE_EXTENSIONS)})')
            self.files += [(path, label) for path in found]

    def __len__(self):
        return len(self.files)

    def cut(self, picture):
        """The centre of a picture, as ADM and DiT cut it."""
        size = self.image_size
        while min(picture.size) >= 2 * size:
            picture = picture.resize([side // 2 for side in picture.size], Image.Resampling.BOX)
        picture = ImageOps.scale(picture, size / min(picture.size), Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in picture.size)
        return picture.crop((left, top, left + size, top + size))

    def __getitem__(self, index):
        name, label = self.files[index]
        try:
            with Image.open(self.root / name) as file:
                check(not file.mode.startswith(('I', 'F')), f'its mode is {file.mode}, convert it to 8 bits')
                picture = ImageOps.exif_transpose(file)
                if picture.has_transparency_data:
                    picture = picture.convert('RGBA')
                    picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
                picture = picture.convert('RGB' if self.channels == 3 else 'L')
        except Exception as error:  # Pillow raises many
            raise ValueError(f'{self.root / name} cannot be read as an image ({error})') from error
        pixels = np.array(self.cut(picture)).reshape(self.image_size, self.image_size, self.channels)
        image = rearrange(torch.from_numpy(pixels), 'h w ch -> ch h w').float() / 127.5 - 1
        return image.flip(-1) if self.flip and random.random() < 0.5 else image, label

def sample_alpha(num, *, low = 1., high = 4., power = 3., no_cfg_frac = 0., generator = None):
    """Guidance scales [num] (A.7): 1 with probability no_cfg_frac, else of density alpha^-power on [low, high]."""
    k, (uniform, skip) = 1 - power, torch.rand(2, num, generator = generator)
    # inverse of the cumulative density
    if abs(k) > 1e-4:
        alpha = (low ** k + uniform * (high ** k - low ** k)) ** (1 / k)
    else:
        alpha = low * (high / low) ** uniform
    return torch.where(skip < no_cfg_frac, 1., alpha.clamp(low, high))

class SampleQueue:
    """The newest real samples of every class (A.8): positives, or unconditional ones.

    size: samples per class, the oldest leave. They are kept on device, as dtype (None: as they come).
    """
    def __init__(self, num_classes = 1, *, size = 128, device = 'cpu', dtype = None):
        check_whole(1, num_classes = num_classes, size = size)
        self.num_classes, self.size = num_classes, size
        self.device, self.dtype = device, dtype
        self.pushed = torch.zeros(num_classes).long()  # ever pushed, per class
        self.samples = None  # [class slot ...], allocated at the first push

    @property
    def filled(self):
        """How many samples each class holds [num_classes], on the cpu."""
        return self.pushed.clamp(max = self.size)

    def push(self, samples, labels = None):
        """samples [b ...] of labels [b] (None: one class). ValueError for other shapes, and nan."""
        num = len(samples)
        check(exists(labels) or self.num_classes == 1, f'a queue of {self.num_classes} classes needs labels')
        labels = default(labels, torch.zeros(num).long())
        labels = checked_labels(labels, self.num_classes, num).cpu()
        check_range('real samples', samples)
        if not exists(self.samples):
            shape = self.num_classes, self.size, *samples.shape[1:]
            self.samples = samples.new_zeros(shape, device = self.device, dtype = self.dtype)
        check_shape('real samples', samples, (num, *self.samples.shape[2:]))
        # each class is a ring: the newest stay
        counts = labels.bincount(minlength = self.num_classes)
        order = labels.argsort(stable = True)
        labels, pushed = labels[order], self.pushed + counts
        number = torch.arange(num) + (pushed - counts.cumsum(dim = 0))[labels]  # of its class, ever
        stays = number >= (pushed - self.size)[labels]
        places = labels, number % self.size, order
        labels, slot, order = (t[stays].to(self.device, non_blocking = self.samples.is_cuda) for t in places)
        samples = samples.detach().to(self.samples, non_blocking = self.samples.is_cuda)
        self.samples[labels, slot] = samples[order]
        self.pushed = pushed

    def draw(self, labels, num, generator = None):
        """Samples [c num ...] of classes labels [c], without replacement in a row."""
        check_whole(1, num = num)
        labels = checked_labels(labels, self.num_classes, 'batch').cpu()
        filled = self.filled[labels]
        short = {int(label): int(held) for label, held in zip(labels, filled, strict = True) if held < num}
        check(not short, f'these classes hold fewer than {num} samples (class: samples): {short}')
        is_empty = einx.greater_equal('size, c -> c size', torch.arange(self.size), filled)
        keys = torch.rand(len(filled), self.size, generator = generator).masked_fill_(is_empty, -1.)
        places = rearrange(labels, 'c -> c 1'), keys.topk(num, dim = -1).indices  # c num
        labels, slot = (t.to(self.device, non_blocking = self.samples.is_cuda) for t in places)
        return self.samples[labels, slot]

    def state_dict(self):
        return existing(pushed = self.pushed, samples = self.samples)

    def load_state_dict(self, state):
        if 'samples' in state:
            saved, own = tuple(state['samples'].shape[:2]), (self.num_classes, self.size)
            check(saved == own, f'the saved queue has (num_classes, size) {saved}, this one {own}')
            self.samples = state['samples'].to(device = self.device, dtype = self.dtype, copy = True)
        self.pushed = state['pushed'].cpu().clone()

def endless_shuffle(length, *, seed, start = 0):
    """Indices of epoch after epoch, in random order, from any position on."""
    epoch, offset = divmod(start, length)
    while True:
        order = torch.randperm(length, generator = seeded(seed, 'epoch', epoch)).tolist()
        yield from order[offset:]
        epoch, offset = epoch + 1, 0

class SeededDataset(Dataset):
    """Indexed by lists of (position in the run, index): the position seeds augmentations."""
    def __init__(self, dataset, seed, with_labels):
        fits = hasattr(dataset, '__len__') and not isinstance(dataset, IterableDataset) and len(dataset) > 0
        check(fits, f'the dataset must be map-style and not empty, got {type(dataset).__name__}')
        self.dataset, self.seed, self.with_labels = dataset, seed, with_labels
        self.sample_shape = self.condition_shape = self.has_conditions = None
        self.sample(0)  # sets what all others must be like

    def __len__(self):
        return len(self.dataset)

    def sample(self, index):
        name = f'sample {index} of the dataset'
        try:
            item = self.dataset[index]
        except Exception as error:
            raise RuntimeError(f'{name} cannot be read: {" ".join(str(error).split())}') from error
        parts = item if isinstance(item, (tuple, list)) else (item,)
        fits = len(parts) == 2 or len(parts) == 1 and not self.with_labels
        check(fits, f'{name} must be (sample, label), got {type(item).__name__}')
        sample, label, *_ = *parts, 0
        label = torch.as_tensor(label) if isinstance(label, (np.ndarray, np.floating, float)) else label
        check_floating(name, sample)
        self.sample_shape = default(self.sample_shape, tuple(sample.shape))
        check_shape(name, sample, self.sample_shape, ' like the first one')
        sample = sample.cpu().float()
        is_label = self.with_labels and torch.is_tensor(label)
        self.has_conditions = default(self.has_conditions, is_condition(label, 0) and not is_label)
        if self.has_conditions:
            condition = each(lambda t: as_tensor(f'the condition of {name}', t).cpu(), label)
            found = each(Tensor.size, condition)
            wanted = self.condition_shape = default(self.condition_shape, found)
            check(found == wanted, f'{name} has a condition of shape {found}, expected {wanted}')
            return sample, each(lambda t: t.float() if t.is_floating_point() else t, condition)
        try:
            return sample, operator.index(label) * self.with_labels  # or 0
        except TypeError as error:
            wanted = 'an integer' if self.with_labels else 'an integer, or tensors as a condition'
            raise ValueError(f'{name} has the label {label!r}, expected {wanted}') from error

    def batch(self, places):
        """float32 samples [b ...] and labels [b], zeros, or conditions [b ...]."""
        seed_cpu(seed_for(self.seed, 'sample', places[0][0]))
        index = [i for _, i in places]
        if type(self.dataset) is not TensorDataset:
            return default_collate([self.sample(i) for i in index])
        samples, *rest = (t[index].cpu().contiguous() for t in self.dataset.tensors)  # the first was checked
        if self.has_conditions:
            return samples.float(), rest[0].float() if rest[0].is_floating_point() else rest[0]
        labels = rest[0].flatten() if self.with_labels else torch.zeros(len(index))
        return samples.float(), labels.long()

    def __getitem__(self, places):
        try:
            return self.batch(places)
        except (RuntimeError, ValueError) as error:  # a worker would add its traceback
            return error

# ── 10. trainers - A.3, A.8, A.9 ───

# checkpoints: files, nothing of training
def sha256(path):
    return hashlib.sha256(np.memmap(path, mode = 'r')).hexdigest()

def save_tensors(state_dict, path, copy = True):
    """copy: where tensors may share memory."""
    save_file(each(lambda t: t.detach().to('cpu', copy = copy).contiguous(), state_dict), path)

def discard(folder):
    """Remove a folder. Nobody sees it half removed."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f'unfinished-old-{folder.name}')))

# what a run writes into its folder, and removes with overwrite = True
STEP, BEST = (f'{kind}-' + '[0-9]' * 8 for kind in ('step', 'best'))
OURS = ['metrics.jsonl', f'samples/{STEP}.png', 'checkpoints/unfinished-*']
OURS += [f'checkpoints/{before}{name}' for before in ('', 'left-') for name in (STEP, BEST)]
SHARED_FILES = 'ema.safetensors', 'averages.safetensors', 'model.safetensors', 'optimizer.safetensors'

def damage(folder, rank):
    """What is wrong with a checkpoint, or None. A process looks at its queue."""
    try:
        path = folder / 'manifest.json'
        fits = path.is_file() and path.stat().st_size < 2 ** 24  # a pipe never ends
        check(fits, 'it has no manifest')
        manifest = json.loads(path.read_text())
        for name, kind in dict(step = int, samples_read = int, num_processes = int, config = dict).items():
            check(type(manifest[name]) is kind, f'{name} is {manifest[name]!r} in its manifest')
        queue = [f'queue-{rank}.safetensors'] if rank < manifest['num_processes'] else []
        for name in (*SHARED_FILES, *queue) if rank == 0 else queue:
            path, expected = folder / name, manifest['sha256'][name]
            fits = path.is_file() and path.stat().st_size > 0 and sha256(path) == expected
            check(fits, f'{name} is not what its manifest says')
    except Exception as error:  # whatever a file may hold
        return f'it is damaged ({type(error).__name__}: {error})'

def together(work, here = True):
    """Results of work() in processes `here`; an error of one is raised in all."""
    try:
        result = work() if here else None
    except Exception as error:  # as text: not all can be sent
        kind = next(kind for kind in (OSError, ValueError, RuntimeError, Exception) if isinstance(error, kind))
        gather_object([kind(f'in another process: {type(error).__name__}: {error}')])
        raise
    results = gather_object([result])
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results

def flat(states):
    return {f'{name}.{key}': t for name, state in states.items() for key, t in state.items()}

def nested(tensors):
    states = {}
    for path, t in tensors.items():
        name, _, key = path.rpartition('.')
        states.setdefault(name, {})[key] = t
    return states

# of the whole model; the optimizer has no states without gradients
FULL_STATE = dcp.StateDictOptions(full_state_dict = True, cpu_offload = True)
TO_LOAD = dcp.StateDictOptions(full_state_dict = True, strict = False)

def check_fits(own, given, what = 'weights'):
    own, given = ({f'{name} {tuple(t.shape)}' for name, t in state.items()} for state in (own, given))
    found = f'missing {sorted(own - given)}, unknown {sorted(given - own)}'
    check(own == given, f'the {what} do not fit the model: {found}')

# signals
SIGNALS = signal.SIGINT, signal.SIGTERM

@contextmanager
def interruptions():
    """Signals that came, so that a step can end. A second one acts at once."""
    received, handlers = [], {}

    def remember(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup
            handlers[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

def ignore_signals(worker):
    """Workers end when the process that they read for tells them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

# pictures and records
def image_grid(images, *, min_size = 48):
    """A Pillow image of [rows cols ch h w] in [0, 1]; tiny ones are magnified."""
    ch, h = images.shape[2:4]
    check(ch in (1, 3), f'a picture has 1 or 3 channels, got {ch}')
    check_floating('a picture', images, 'expected numbers in [0, 1]')
    check(images.isfinite().all(), 'a picture has non-finite values (nan or inf)')
    pixels = F.pad(images.float().cpu(), (1, 1, 1, 1), value = 1.)
    pixels = rearrange(pixels, 'rows cols ch h w -> (rows h) (cols w) ch')
    pixels = pixels.clamp(0, 1).mul(255).round().byte().numpy()
    picture, zoom = Image.fromarray(pixels[..., 0] if ch == 1 else pixels), math.ceil(min_size / h)
    return ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)

# settings
def described(part):
    """Class and attributes of a loss or field, values or names."""
    def name_of(value):
        return getattr(value, '__name__', type(value).__name__)
    own = {name: value for name, value in getattr(part, '__dict__', {}).items() if name[0] != '_'}
    return json.loads(json.dumps({'class': name_of(part), **own}, default = name_of, skipkeys = True))

def bounded(value, low = 0, high = 1e20, **metadata):
    """A default, and the bounds of its numbers: another default needs them again."""
    return dataclasses.field(default = value, metadata = dict(bounds = (low, high), **metadata))

free = partial(bounded, free = True)  # a resumed run may change it without a warning

@dataclasses.dataclass(kw_only = True)
class LoopSettings:
    """What every trainer is told."""
    num_train_steps: int = free(30_000, low = 1)
    seed: int = bounded(0, high = 2 ** 63)
    learning_rate: float = 2e-4
    lr_warmup_steps: int = 5_000  # linear from 1e-6, then constant
    lr_decay_start: int | None = bounded(None, low = 1)  # then it falls as 1 / sqrt(step). None: never (paper)
    betas: tuple | list = bounded((0.9, 0.95), high = 1)  # of AdamW
    weight_decay: float = 0.01
    max_grad_norm: float | None = bounded(2., low = 1e-20)  # None: no clipping
    ema_decay: float | tuple | list = bounded(0.999, high = 1)  # of the averaged weights; several: see keep_best
    gradient_accumulation_steps: int = bounded(1, low = 1)  # each has samples of its own
    mixed_precision: str | None = None  # None: accelerate's, or bf16 if the GPU has it
    compile: bool = False  # model, encoders and, on a GPU, the field
    cpu: bool = False  # train on the cpu even where there is a GPU
    num_workers: int = free(0)  # processes that read data

    log_with: object = free(None)  # trackers of accelerate
    log_every: int = free(10)  # steps, 0 for never: into metrics.jsonl and the trackers
    sample_every: int = free(1_000)  # steps: grids of images, into samples/
    save_every: int = free(1_000)  # steps: into checkpoints/
    evaluate_every: int = free(0)  # steps
    keep_best: str | None = free(None)  # 'name', evaluate's number to minimise, or 'max:name'
    keep_checkpoints: int = free(3, low = 1)  # the newest
    progress_bar: bool = free(True)

    results_folder: str | Path = free('./results')
    resume_from_checkpoint: str | Path | None = free(None)  # a folder, or 'latest', if there is any
    overwrite: bool = free(False)  # remove an earlier run, else it is refused

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            name, kind, value = entry.name, entry.type, getattr(self, entry.name)
            value = value.item() if isinstance(value, np.generic) else value
            setattr(self, name, value)
            kind = kind | int if isinstance(0., kind) else kind
            check(isinstance(value, kind), f'{name} must be {inspect.formatannotation(kind)}, got {value!r}')
            is_list = isinstance(value, (tuple, list)) and name != 'log_with'
            numbers = value if is_list else [value]
            fits = not is_list or len(value) == 2 or name == 'ema_decay' and value
            check(fits, f'{name} cannot be {len(numbers)} numbers, got {value!r}')
            for number in numbers:
                if is_list or isinstance(number, (int, float)):
                    check_number(*entry.metadata.get('bounds', (0, 1e20)), **{name: number})

class BaseTrainer:
    """The training loop of any model.

    A subclass has
    backward(batches, micro_step, sync): adds a gradient, of all processes if sync; returns loss () and details.
    metrics(details): {name: number}, and the names on the bar. pictures(): samples [b ch h w], rows.
    samples_per_process: read in a micro step. less_memory: a hint.
    before_training(batches): where there are queues.
    Ctrl-C and SIGTERM save a checkpoint first. A resumed run repeats the uninterrupted one, or warns.
    """
    def __init__(self, model, dataset, settings, to_image, evaluate = None):
        is_rerun = getattr(multiprocessing.current_process(), '_inheriting', False)  # by a worker
        check(not is_rerun, "num_workers needs a script under if __name__ == '__main__'")
        self.settings, self.to_image, self.evaluate = settings, to_image, evaluate
        fits = callable(evaluate) or not exists(evaluate) and settings.evaluate_every == 0
        check(fits, 'evaluate_every needs evaluate, a function')
        check(not hasattr(model, '_orig_mod'), 'pass compile = True, and the model as it was')
        check(settings.evaluate_every > 0 or not exists(settings.keep_best), 'keep_best needs evaluate_every')
        self.results_folder = Path(settings.results_folder).expanduser().absolute()
        self.checkpoints = self.results_folder / 'checkpoints'
        self.lock = FileLock(self.results_folder / '.lock', timeout = 0)
        self.queues, self.parts = {}, {}
        self.emas, self.best = {}, None
        self.step, self.samples_read = 0, 0
        self.in_step, self.logs_this_step = False, False
        has_bf16 = not settings.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
        given = settings.mixed_precision or os.environ.get('ACCELERATE_MIXED_PRECISION')
        precision = settings.mixed_precision = default(given, 'bf16' if has_bf16 else 'no')
        check(precision in ('no', 'bf16'), f'mixed_precision = {precision} is not supported: use bf16')
        # else accelerate runs them singly
        on_cpus = int(os.environ.get('WORLD_SIZE', 1)) > 1 and not torch.accelerator.is_available()
        self.accelerator = accelerator = Accelerator(
            mixed_precision = precision, cpu = settings.cpu or on_cpus, log_with = settings.log_with,
            project_dir = self.results_folder,
            kwargs_handlers = [DistributedDataParallelKwargs(broadcast_buffers = False)]
        )
        accelerator.gradient_accumulation_steps = 1  # whatever the environment says
        self.is_sharded = accelerator.is_fsdp2
        if self.is_sharded:  # FSDP would round parameters; its loading needs nested names
            plugin = accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy, plugin.cpu_ram_efficient_loading = None, False
        is_fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not self.is_sharded
        check(not is_fsdp1, 'FSDP is supported in its second version: set fsdp_version to 2')
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        move = partial(Tensor.to, device = self.device, non_blocking = self.device.type == 'cuda')
        self.to_device = partial(each, move)
        self.hide_bar = not (settings.progress_bar and self.is_main)
        self.num_classes = getattr(model, 'num_classes', None)
        self.dataset = SeededDataset(dataset, settings.seed, exists(self.num_classes))
        self.sample_shape = self.dataset.sample_shape
        can_learn = any(p.requires_grad for p in model.parameters())
        check(can_learn, 'the model is frozen, as encoders of a loss are')
        self.prepare(model)

    def prepare(self, model):
        """Release: AdamW on all parameters, their plain average."""
        settings, saved = self.settings, model.state_dict()
        kept = [name for name, t in model.named_buffers() if t.is_floating_point() and name in saved]
        wanted = 'use one process, or persistent = False for constants'
        check(self.world == 1 or not kept, f'the buffers {kept} would differ between processes: {wanted}')
        decays = settings.ema_decay if isinstance(settings.ema_decay, (tuple, list)) else [settings.ema_decay]
        averages = {decay: deepcopy(model) for decay in decays}
        options = dict(weight_decay = settings.weight_decay, fused = self.device.type in ('cuda', 'cpu'))
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, settings.betas, **options)
        self.model, prepared = self.accelerator.prepare(model, optimizer)
        self.optimizer = prepared.optimizer  # a step of accelerate's is slower
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        if self.is_sharded:  # as accelerate does it for other models
            forward = self.accelerator.autocast()(self.unwrapped.forward)
            self.unwrapped.forward = convert_outputs_to_fp32(forward)
        for decay, average in averages.items():
            average = fsdp2_prepare_model(self.accelerator, average) if self.is_sharded else average.to(self.device)
            self.emas[decay] = EMA(  # which would warm its decay up otherwise
                self.unwrapped, average, beta = decay, min_value = decay, update_every = 1,
                update_after_step = -1, include_online_model = False, use_foreach = not self.is_sharded
            )
            self.emas[decay].update()
        self.ema = self.emas[decays[0]]  # that is sampled and exported
        if settings.compile:
            self.model = torch.compile(self.model)

    def hold_folder(self):
        """Against a second run. A dead process holds no lock."""
        try:
            self.results_folder.mkdir(parents = True, exist_ok = True)
            self.lock.acquire()
        except OSError as error:
            raise OSError(f'{self.results_folder} is in use, or not writable: {error}') from error

    def claim_folder(self):
        """A new run does not mix with an earlier one."""
        folder, given = self.results_folder, self.settings.resume_from_checkpoint
        self.hold_folder()
        self.lock.release()  # until it trains
        names = ['checkpoints/unfinished-*'] if exists(given) else OURS
        earlier = [path for name in names for path in folder.glob(name)]
        wanted = "pass resume_from_checkpoint = 'latest' or overwrite = True"
        fits = exists(given) or self.settings.overwrite or not earlier
        check(fits, f'{folder} holds an earlier run: {wanted}')
        is_own = given in (None, 'latest') or Path(given).expanduser().parent.resolve() == self.checkpoints.resolve()
        check(is_own or not any(self.checkpoints.glob(STEP)), f'{folder} has another run than {given}')
        for path in earlier:
            remove = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink
            remove(path)

    def record(self):
        """The settings, and what else a run depends on."""
        frozen = [name for name, p in self.unwrapped.named_parameters() if not p.requires_grad]
        model = getattr(self.unwrapped, '_hub_mixin_config', None) or {}
        record = dict(dataset_length = len(self.dataset), frozen = frozen, **flat({**self.parts, 'model': model}))
        return json.loads(json.dumps(vars(self.settings) | record, default = str))

    def is_due(self, step, *periods):
        is_last = step == self.settings.num_train_steps
        return any(every > 0 and (is_last or step % every == 0) for every in periods)

    # a step
    def batches(self):
        """Endless (samples, labels), from where the run stands, in turns."""
        indices = endless_shuffle(len(self.dataset), seed = self.settings.seed, start = self.samples_read)
        places = enumerate(indices, self.samples_read)
        batches = BatchSampler(places, self.samples_per_process, drop_last = False)
        yield from DataLoader(
            self.dataset, None, sampler = islice(batches, self.rank, None, self.world),
            num_workers = self.settings.num_workers, pin_memory = self.device.type == 'cuda',
            worker_init_fn = ignore_signals
        )

    def read(self, batches):
        batch = next(batches)
        if isinstance(batch, Exception):
            raise batch
        self.samples_read += self.samples_per_process * self.world
        self.seed_model()
        return batch

    def seed_model(self, *key):
        """What dropout draws next depends on the place in the run."""
        seed = seed_for(self.settings.seed, self.samples_read, *key, self.rank)
        seed_cpu(seed)
        if self.device.type != 'cpu':
            torch.get_device_module(self.device).manual_seed(seed)

    def learning_rate_at(self, step):
        settings = self.settings
        warmup = min(1., step / settings.lr_warmup_steps) if settings.lr_warmup_steps > 0 else 1.
        decay = min(1., default(settings.lr_decay_start, math.inf) / (step + 1)) ** 0.5
        return (1e-6 + (settings.learning_rate - 1e-6) * warmup) * decay

    def synced(self, sync):
        return nullcontext() if sync else self.accelerator.no_sync(self.model)

    def train_step(self, batches):
        """Returns loss, details of the last micro step, and the gradient's norm."""
        num_micro_steps = self.settings.gradient_accumulation_steps
        self.optimizer.zero_grad()
        self.model.train()
        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate_at(self.step)
        for micro_step in range(num_micro_steps):
            loss, details = self.backward(batches, micro_step, sync = micro_step == num_micro_steps - 1)
        if self.world > 1 and not self.is_sharded:
            parameters = self.unwrapped.named_parameters()
            unused = [name for name, p in parameters if p.requires_grad and not exists(p.grad)]
            check(not unused, f'with several processes {unused} need a gradient and have none: freeze them')
        limit = default(self.settings.max_grad_norm, math.inf)
        norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), limit)
        norm = norm.full_tensor() if self.is_sharded else norm
        self.optimizer.step()
        for ema in self.emas.values():
            for part in ema.ema_model.modules() if self.is_sharded else ():
                if isinstance(part, FSDPModule):  # pictures may leave it whole
                    part.reshard()
            ema.update()
            for averaged, buffer in zip(ema.ema_model.buffers(), self.unwrapped.buffers(), strict = True):
                if not buffer.is_floating_point():  # integers have no average
                    averaged.copy_(buffer)
        self.step += 1
        return loss, details, norm

    def check_finite(self, loss, details, norm):
        """Raise before broken weights are saved."""
        is_finite = loss.isfinite() & norm.isfinite()
        if self.accelerator.reduce(is_finite.float(), 'mean') == 1:
            return
        values, _ = self.metrics(details)
        broken = [f'{name} is {float(value)}' for name, value in values.items() if not math.isfinite(value)]
        found = ', '.join(broken) or 'what it logs is finite: look at the backward pass'
        last = ['none', *sorted(self.checkpoints.glob(STEP))][-1]
        numbers = f'loss {loss:.4g}, gradient norm {norm:.4g}'
        raise FloatingPointError(f'step {self.step}: {numbers}; {found}; the last checkpoint is {last}')

    # the loop
    def train(self):
        """Train up to num_train_steps.

        Raises FloatingPointError for non-finite losses and gradients, ValueError for such samples.
        It can be called again after an error, unless that came within a step.
        """
        check(not self.in_step, f'step {self.step + 1} failed halfway: make the trainer again, and resume')
        together(self.hold_folder, self.is_main)
        batches, own_seed = self.batches(), int(torch.randint(2 ** 62, ()))
        try:
            together(self.set_aside, self.is_main)
            config = {name: str(value) for name, value in self.record().items()}
            self.accelerator.init_trackers('drifting-pytorch', config = config)
            if self.settings.sample_every > 0:
                together(lambda: exists(self.grid()))  # tried, not sent
            if self.step == 0 and self.queues:
                self.before_training(batches)
            signals = self.run(batches)
        except RuntimeError as error:
            if 'out of memory' not in str(error):
                raise
            hint = f'{self.less_memory}, or give the networks checkpointing = True ({error})'
            raise torch.OutOfMemoryError(f'step {self.step + 1} does not fit into memory: {hint}') from error
        finally:
            batches.close()
            self.lock.release()
            torch.manual_seed(own_seed)  # also of GPUs
            seed_cpu(own_seed)  # the caller's go on
        for tracker in self.accelerator.trackers:
            tracker.finish()
        for number in signals[:1]:
            self.accelerator.print(f'stopped by a signal after step {self.step}')
            signal.raise_signal(number)

    def end_training(self):
        """The last call of several processes. Sampling still works."""
        self.model = self.unwrapped  # or DDP may wait for gloo's threads, and they for Python
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def run(self, batches):
        """The steps that are left. Returns the signals that came."""
        settings, num_steps, signals = self.settings, self.settings.num_train_steps, []
        self.clock = time.perf_counter(), self.step
        needed = max(settings.lr_warmup_steps, 1 // max(1e-9, 1 - self.ema.beta))
        if self.step < num_steps < needed:
            warnings.warn(f'lr_warmup_steps and ema_decay are for more than {num_steps} steps', stacklevel = 3)
        bar = tqdm(initial = self.step, total = num_steps, disable = self.hide_bar)
        with interruptions() as received, bar:
            while self.step < num_steps and not signals:
                self.in_step = True
                self.logs_this_step = self.is_due(self.step + 1, settings.log_every, settings.evaluate_every)
                result = self.train_step(batches)
                bar.update()
                if self.world == 1 or self.step % 10 == 0:  # to share signals takes time
                    signals = gather_object([*received])
                saves = signals or self.is_due(self.step, settings.save_every)
                if self.logs_this_step or saves or self.step % 10 == 0 or self.step == num_steps:
                    self.check_finite(*result)
                self.in_step = False
                try:
                    if self.logs_this_step:
                        self.log(bar, *result)
                finally:  # an evaluation may fail
                    if saves:
                        self.save()
                if self.is_due(self.step, settings.sample_every):
                    together(self.save_pictures)
        return signals or received

    def log(self, bar, loss, details, norm):
        metrics, on_bar = self.metrics(details)
        metrics = {'loss': loss, 'grad_norm': norm, **metrics}
        kind = dict(dtype = torch.float32, device = self.device)
        values = stack([torch.as_tensor(value, **kind) for value in metrics.values()]).detach()
        values = self.accelerator.reduce(values, 'mean').tolist()
        metrics = {'step': self.step, **dict(zip(metrics, values, strict = True))}
        metrics['learning_rate'] = self.optimizer.param_groups[0]['lr']
        # these differ when a run is repeated
        before, first_step = self.clock
        self.clock = time.perf_counter(), self.step
        metrics['machine/steps_per_second'] = (self.step - first_step) / (self.clock[0] - before)
        if self.device.type == 'cuda':
            metrics['machine/memory_mib'] = torch.cuda.max_memory_allocated(self.device) / 2 ** 20
        self.accelerator.log(metrics, step = self.step)
        if self.is_main:
            bar.set_postfix({name: f'{metrics[name]:.4g}' for name in on_bar})
            with open(self.results_folder / 'metrics.jsonl', 'a', newline = '') as file:
                file.write(json.dumps(metrics) + '\n')

    @torch.no_grad()
    def grid(self):
        """A picture of samples, or None where they are no images."""
        is_image = len(self.sample_shape) == 3 and self.sample_shape[0] in (1, 3)
        if not is_image and not exists(self.to_image):
            return None
        if not exists(self.to_image):
            least, largest = self.dataset.sample(0)[0].aminmax()
            check(not largest > 100, 'pictures are not in [-1, 1]: scale them, or pass to_image')
            if 0 <= least < largest and self.step == 0:
                warnings.warn('the first picture has nothing below 0: is it in [-1, 1]?', stacklevel = 6)
        samples, rows = self.pictures()
        images = self.to_image(samples) if exists(self.to_image) else (samples + 1) / 2
        check_shape('what to_image returns', images, (len(samples), 'channels', 'height', 'width'))
        return image_grid(rearrange(images, '(rows cols) ... -> rows cols ...', rows = rows))

    def save_pictures(self):
        grid = self.grid()
        if not exists(grid) or not self.is_main:
            return
        folder = self.results_folder / 'samples'
        folder.mkdir(exist_ok = True)
        grid.save(folder / f'step-{self.step:08d}.png')
        pixels = np.array(grid.convert('RGB'))[None]
        options = dict(tensorboard = dict(dataformats = 'NHWC'), wandb = {})
        for tracker in self.accelerator.trackers:
            if tracker.name in options:
                tracker.log_images({'samples': pixels}, self.step, **options[tracker.name])

    # checkpoints
    def save(self, kind = 'step'):
        """Aside until it is complete. The newest are kept."""
        unfinished = self.checkpoints / f'unfinished-{self.step:08d}'
        try:
            written = together(lambda: self.write_states(unfinished))
            together(lambda: self.complete(unfinished, written, kind), self.is_main)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors = True)
            raise OSError(f'checkpoint {self.step} could not be written: {error}') from error

    def write_states(self, folder):
        model, optimizer = dcp.get_state_dict(self.unwrapped, self.optimizer, options = FULL_STATE)
        modules = [ema.ema_model for ema in self.emas.values()]
        average, *others = (dcp.get_model_state_dict(module, options = FULL_STATE) for module in modules)
        queues = flat({name: queue.state_dict() for name, queue in self.queues.items()})
        states = {f'queue-{self.rank}.safetensors': queues}
        if self.is_main:
            numbered = {f'{name}.{i}': t for i, other in enumerate(others) for name, t in other.items()}
            found = average, numbered, model, flat(optimizer['state'])
            states |= zip(SHARED_FILES, found, strict = True)
        folder.mkdir(parents = True, exist_ok = True)
        for name, state in states.items():
            save_tensors(state, folder / name, copy = name in SHARED_FILES)
        return [(name, sha256(folder / name)) for name in states]

    def complete(self, unfinished, written, kind):
        """Its manifest, and when all is on disk its name. The oldest go."""
        folder = self.checkpoints / f'{kind}-{self.step:08d}'
        manifest = dict(
            step = self.step, samples_read = self.samples_read, best = self.best,
            num_processes = self.world, device = str(self.device), config = self.record(),
            torch = torch.__version__, sha256 = dict(chain(*written))
        )
        (unfinished / 'config.json').write_text(json.dumps(getattr(self.unwrapped, '_hub_mixin_config', None)))
        (unfinished / 'manifest.json').write_text(json.dumps(manifest, indent = 1))
        for path in unfinished.iterdir():
            with open(path, 'rb+') as file:
                os.fsync(file.fileno())
        discard(folder)
        unfinished.rename(folder)
        names, num = (STEP, self.settings.keep_checkpoints) if kind == 'step' else (BEST, 1)
        for old in sorted(self.checkpoints.glob(names))[:-num]:
            discard(old)

    def resume(self):
        """The end of __init__: goes on from a checkpoint if asked to."""
        length, num = len(self.dataset), self.samples_per_process * self.world
        check(length >= num, f'the dataset has {length} samples, fewer than the {num} read per step')
        together(self.claim_folder, self.is_main)
        given = self.settings.resume_from_checkpoint
        if not exists(given):
            return
        newest_first = reversed(sorted(self.checkpoints.glob(STEP)))
        for folder in newest_first if given == 'latest' else [Path(given).expanduser()]:
            problems = [*filter(exists, gather_object([damage(folder, self.rank)]))]
            if not problems:
                self.load(folder)
                break
            message = f'{folder} cannot be used: {problems[0]}'
            check(given == 'latest', message)
            if self.is_main:
                warnings.warn(f'{message}. Going on from an earlier one', stacklevel = 2)

    def set_aside(self):
        """Later checkpoints count no more, later logs are written again."""
        for folder in (*self.checkpoints.glob(STEP), *self.checkpoints.glob(BEST)):
            if int(folder.name[5:]) > self.step:
                aside = folder.with_name(f'left-{folder.name}')
                discard(aside)
                folder.rename(aside)
        path = self.results_folder / 'metrics.jsonl'
        if path.is_file():
            rows = re.finditer(rb'\{"step": (\d+), [ -~]*\}\n', path.read_bytes())  # whole lines
            trimmed = path.with_suffix('.trimmed')
            trimmed.write_bytes(b''.join(row[0] for row in rows if int(row[1]) <= self.step))
            trimmed.replace(path)

    def load(self, folder):
        manifest = json.loads((folder / 'manifest.json').read_text())
        before, now, num = manifest['config'], self.record(), manifest['num_processes']
        check(num == self.world, f'the checkpoint is of {num} processes, these are {self.world}')
        may_change = [entry.name for entry in dataclasses.fields(self.settings) if 'free' in entry.metadata]
        changed = [name for name in now if name not in may_change and now[name] != before.get(name)]
        found = ', '.join(f'{name} {before.get(name, "default")} -> {now[name]}' for name in changed)
        if found and self.is_main:
            warnings.warn(f'the run goes on with other settings than it had: {found}', stacklevel = 3)
        average, others, model, moments = (load_file(folder / name) for name in SHARED_FILES)
        fits = before['ema_decay'] == now['ema_decay'] or not others and len(self.emas) == 1
        check(fits, f'the checkpoint has averages of ema_decay = {before["ema_decay"]}, got {now["ema_decay"]}')
        modules, by_name = [ema.ema_model for ema in self.emas.values()], nested(others)
        others = [{name: t[f'{i}'] for name, t in by_name.items()} for i in range(len(modules) - 1)]
        for module, saved in zip((self.unwrapped, *modules), (model, average, *others), strict = True):
            check_fits(module.state_dict(), saved)
            dcp.set_model_state_dict(module, saved, options = TO_LOAD)
        # no states: frozen now, or never a gradient, equal to the average. Clones free the file
        self.optimizer.zero_grad()  # or dcp makes no states
        state_dict = dcp.get_optimizer_state_dict(self.unwrapped, self.optimizer)
        moments = {name: each(Tensor.clone, t) for name, t in nested(moments).items() if name not in now['frozen']}
        had_none = [name for name in model.keys() - moments.keys() if torch.equal(model[name], average[name])]
        expected = {name: state for name, state in state_dict['state'].items() if name not in had_none}
        check_fits(flat(expected), flat(moments), 'states of the optimizer')
        state_dict['state'] = moments
        dcp.set_optimizer_state_dict(self.unwrapped, self.optimizer, state_dict, options = TO_LOAD)
        together(lambda: self.load_queues(folder))
        self.step, self.samples_read, self.best = manifest['step'], manifest['samples_read'], None
        best = manifest['best']
        if exists(best) and before['keep_best'] == now['keep_best']:
            if (self.checkpoints / f'best-{best["step"]:08d}').is_dir():
                self.best, self.ema = best, self.emas.get(best['ema_decay'], self.ema)

    def load_queues(self, folder):
        states = nested(load_file(folder / f'queue-{self.rank}.safetensors'))
        for name, queue in self.queues.items():
            check(name in states, f'{folder} has no queue of {name} samples: set alpha_range = (1, 1)')
            queue.load_state_dict(states[name])

    def save_pretrained(self, folder):
        """Write the averaged model, for from_pretrained. Call it in every process."""
        is_ours, folder = isinstance(self.unwrapped, PyTorchModelHubMixin), Path(folder).expanduser()
        check(is_ours, 'save_pretrained is for the models of this package: save ema.ema_model.state_dict()')
        state_dict = dcp.get_model_state_dict(self.ema.ema_model, options = FULL_STATE)
        if self.is_main:
            folder.mkdir(parents = True, exist_ok = True)
            save_tensors(state_dict, folder / 'model.safetensors')
            (folder / 'config.json').write_text(json.dumps(self.unwrapped._hub_mixin_config or {}))

@dataclasses.dataclass(kw_only = True)
class GeneratorSettings(LoopSettings):
    """What Trainer is told, besides; the defaults are the paper's ablation."""
    num_groups: int = bounded(64, low = 1)  # class groups, or rows with a condition, per step
    num_gen: int = bounded(64, low = 2)  # generated samples per group
    num_pos: int = bounded(64, low = 1)  # real samples per group; with a condition its row's, often 1
    num_uncond: int = 16  # unconditional samples per group
    group_chunk_size: int | None = bounded(None, low = 1)  # groups at a time: less memory, but slower

    alpha_range: tuple | list = (1., 4.)  # of the guidance scale; (1, 1): no guidance
    alpha_power: float = bounded(3., low = -9, high = 9)
    no_cfg_frac: float = bounded(0., high = 1)

    push_size: int = bounded(64, low = 1)  # real samples a process reads per step (release); not with conditions
    class_queue_size: int = 128  # real samples that stay, of each class
    uncond_queue_size: int = 1000  # and of all classes
    queue_device: str | torch.device | None = None  # None: the accelerator
    queue_dtype: torch.dtype | None = None  # None: float32

    def __post_init__(self):
        super().__post_init__()
        is_float = default(self.queue_dtype, torch.float32).is_floating_point
        check(is_float, f'queue_dtype must be floating point, got {self.queue_dtype}')
        low, high = self.alpha_range
        check(1 <= low <= high, f'alpha_range must be 1 <= low <= high, got {self.alpha_range}')

# Table 8: what differs from the ablation (release). paper: one of four ema_decay
LARGE = dict(learning_rate = 4e-4, lr_warmup_steps = 10_000, num_train_steps = 200_000)
LARGE |= dict(num_groups = 128, num_uncond = 32, push_size = 128)
PIXEL = dict(LARGE, num_train_steps = 100_000, num_pos = 128, alpha_power = 5.)
PIXEL |= dict(queue_device = 'cpu', queue_dtype = torch.float16)  # open

TRAINER_PRESETS = {
    'ablation': {},
    'B/2': dict(LARGE, weight_decay = 0., alpha_power = 5.),  # paper: num_pos = 128
    **dict.fromkeys(('L/2', 'L/2-512'), dict(LARGE, no_cfg_frac = 0.5, push_size = 64)),
    'B/16': dict(PIXEL, learning_rate = 2e-4),
    'L/16': PIXEL,
}

class Trainer(BaseTrainer):
    """Trains a generator on a map-style dataset of (sample, label) (A.9), or of (sample, condition).

    model: a module, model(noise, labels, alpha, styles), with num_classes (None: integer labels are ignored or
        left out) and, if it is not that of a sample, noise_shape.
    condition: a floating-point tensor, or a dict of tensors. Each row is a group, its sample (or [num_pos ...]
        samples) the positive; real samples of all rows are the unconditional ones.
    loss_fn: (gen, pos, uncond, alpha) -> (loss, Breakdown), see FeatureDriftLoss; None: of raw samples.
    to_image: samples to images [b 1|3 h w] in [0, 1], in all processes. None: those of 1 or 3 channels are in [-1, 1].
    evaluate: sample -> {name: number}, every evaluate_every steps, in all processes.
    settings: see GeneratorSettings and LoopSettings.
    Raises ValueError, before the first step, for settings and data that do not fit.
    """
    less_memory = 'set group_chunk_size or queue_device, lower num_groups, num_gen, num_pos or push_size'
    presets, from_preset = TRAINER_PRESETS, classmethod(from_preset)

    def __init__(self, model, loss_fn, dataset, *, to_image = None, evaluate = None, **settings):
        super().__init__(model, dataset, GeneratorSettings(**settings), to_image, evaluate)
        settings, num, chunk = self.settings, self.settings.num_groups, self.settings.group_chunk_size
        self.has_conditions, shape = self.dataset.has_conditions, self.sample_shape
        self.samples_per_process = num // self.world if self.has_conditions else settings.push_size
        if self.has_conditions and settings.num_pos > 1:
            fits = len(shape) > 1 and shape[0] == settings.num_pos
            wanted = f'expected ({settings.num_pos}, ...): set num_pos = 1 where a row has one sample'
            check(fits, f'the rows of the dataset have samples of shape {shape}, {wanted}')
            self.sample_shape = shape[1:]
        self.noise_shape = tuple(getattr(model, 'noise_shape', self.sample_shape))
        self.loss_fn = default(loss_fn, FeatureDriftLoss())
        fits = callable(self.loss_fn) and not isinstance(self.loss_fn, type)
        check(fits, f'loss_fn must be a function or an instance as FeatureDriftLoss(), got {loss_fn!r}')
        check(num >= self.world, f'num_groups {num} cannot be shared by {self.world} processes')
        if self.has_conditions or exists(chunk) and self.is_sharded:
            wanted = f'conditions, and sharded models in chunks, need a multiple of {self.world} processes'
            check(num % self.world == 0, f'num_groups is {num}: {wanted}')
        options = dict(device = default(settings.queue_device, self.device), dtype = settings.queue_dtype)
        if not self.has_conditions:
            size, num_pos = settings.class_queue_size, settings.num_pos
            check(num_pos <= size, f'num_pos = {num_pos} does not fit into class_queue_size = {size}')
            self.queues['positives'] = SampleQueue(default(self.num_classes, 1), size = size, **options)
        # at alpha = 1 there is nothing to guide away from
        self.alpha_range, self.num_uncond = (1., 1.), 0
        if (exists(self.num_classes) or self.has_conditions) and settings.alpha_range[1] > 1:
            self.alpha_range, self.num_uncond = settings.alpha_range, settings.num_uncond
            most = min(len(dataset), settings.uncond_queue_size)
            wanted = f'guidance needs 1 to {most} unconditional samples (dataset, uncond_queue_size), got num_uncond'
            check(0 < self.num_uncond <= most, f'{wanted} = {self.num_uncond}; alpha_range = (1, 1) trains without')
            self.queues['unconditional'] = SampleQueue(size = settings.uncond_queue_size, **options)
        field = getattr(self.loss_fn, 'drift_loss_kwargs', {}).get('field', DRIFT_FIELD)
        self.parts = dict(loss = described(self.loss_fn), field = described(field))
        if isinstance(self.loss_fn, FeatureDriftLoss):
            self.loss_fn = self.loss_fn.with_options(group_chunk_size = chunk, compile = settings.compile)
        if isinstance(self.loss_fn, Module):
            self.loss_fn.to(self.device)
        self.resume()

    def before_training(self, batches):
        """Read until every class has enough positives."""
        # open: nothing is said of steps before the queues are full
        self.samples_read = 0  # again, if that was interrupted
        for queue in self.queues.values():
            queue.pushed.zero_()
        num_pos = self.settings.num_pos
        needed = dict(positives = num_pos, unconditional = self.num_uncond)
        epoch = math.ceil(len(self.dataset) / self.samples_per_process)
        for number in tqdm(count(1), 'filling the queue', total = epoch, leave = False, disable = self.hide_bar):
            self.push(batches)
            extra = cat([queue.pushed - needed[name] for name, queue in self.queues.items()]).to(self.device)
            extra = self.accelerator.gather(rearrange(extra, 'n -> 1 n'))
            if extra.min() >= 0:
                return
            if number == epoch:  # all together have read `world` of them
                extra = (extra.sum(dim = 0) // self.world).tolist()
                short = {label: num_pos + num for label, num in enumerate(extra) if num < 0}
                found = f'{len(short)} classes with fewer than num_pos = {num_pos} samples (class: samples)'
                found = f'{found}: {dict(islice(short.items(), 10))}. Lower num_pos, or leave them out'
                check(not short, f'one pass over the data left {found}')

    # what goes into a step
    def push(self, batches):
        """Reads into the queues. Returns labels [n], or conditions and positives [n p ...]."""
        samples, labels = self.read(batches)
        if self.has_conditions:
            positives = samples if self.settings.num_pos > 1 else rearrange(samples, 'n ... -> n 1 ...')
            check_range('real samples', samples)
            each(partial(check_range, 'the condition'), labels)
            if hasattr(self.unwrapped, 'checked_condition'):  # on a cpu also values
                self.unwrapped.checked_condition(labels, len(samples))
            if self.num_uncond > 0:
                self.queues['unconditional'].push(rearrange(positives, 'n p ... -> (n p) ...'))
            return labels, positives
        for queue in self.queues.values():
            queue.push(samples, labels if queue.num_classes > 1 else None)
        return labels

    def draw(self, newest, micro_step):
        """labels [c] or conditions, alpha [c], pos [c p ...], uncond [c u ...] or None."""
        settings, key = self.settings, (self.settings.seed, self.step, micro_step)
        (low, high), generator = self.alpha_range, seeded(*key, 'queue', self.rank)
        alpha = sample_alpha(
            settings.num_groups, low = low, high = high, power = settings.alpha_power,
            no_cfg_frac = settings.no_cfg_frac, generator = seeded(*key)
        ).tensor_split(self.world)[self.rank]
        c = len(alpha)
        if self.has_conditions:
            labels, pos = newest
        else:  # release: labels of the newest real samples, without replacement, or in turns
            turns = [torch.randperm(len(newest), generator = generator) for _ in range(0, c, len(newest))]
            labels = newest[cat(turns)[:c]]
            pos = self.queues['positives'].draw(labels, settings.num_pos, generator)
        queue = self.queues.get('unconditional')
        uncond = queue.draw(torch.zeros(c).long(), self.num_uncond, generator) if queue else None
        pos, uncond = (each(Tensor.float, self.to_device(t)) for t in (pos, uncond))
        return self.to_device(labels), self.to_device(alpha), pos, uncond

    def inputs(self, labels, alpha, micro_step, kind = 'gen'):
        """noise [c g ...], labels, alpha, styles [c g s], for any number of processes the same."""
        g, key = self.settings.num_gen, (self.settings.seed, self.step, micro_step, kind)
        noise, styles = [], []
        groups = torch.arange(self.settings.num_groups).tensor_split(self.world)
        for group in groups[self.rank].tolist():
            generator = seeded(*key, group, device = self.device)
            noise.append(torch.randn(g, *self.noise_shape, generator = generator, device = self.device))
            if hasattr(self.unwrapped, 'draw_styles'):
                styles.append(self.unwrapped.draw_styles(g, generator))
        labels = labels if exists(self.num_classes) or self.has_conditions else None
        return stack(noise), labels, alpha, stack(styles) if styles else None

    def generate(self, noise, labels, alpha, styles, number = 0):
        """Samples [c g ...] of a chunk of `inputs`; its number seeds the dropout."""
        self.seed_model(number)
        c, g = noise.shape[:2]
        labels = each(lambda t: repeat(t, 'c ... -> (c g) ...', g = g), labels)
        styles = rearrange(styles, 'c g s -> (c g) s') if exists(styles) else None
        alpha = repeat(alpha, 'c -> (c g)', g = g)
        gen = self.model(rearrange(noise, 'c g ... -> (c g) ...'), labels, alpha, styles)
        check_shape('what the generator returns', gen, (c * g, *self.sample_shape), ' like the dataset')
        return rearrange(gen, '(c g) ... -> c g ...', c = c)

    @torch.no_grad()
    def without_graph(self, chunks, first = 0):
        return cat([self.generate(*chunk, i) for i, chunk in enumerate(chunks, first)])

    def backward(self, batches, micro_step, sync):
        """In chunks: the gradient of samples made without a graph; then each is made again."""
        settings, size, options = self.settings, self.settings.group_chunk_size, {}
        labels, alpha, pos, uncond = self.draw(self.push(batches), micro_step)
        chunks = chunked(self.inputs(labels, alpha, micro_step), size)
        if isinstance(self.loss_fn, FeatureDriftLoss):
            options['diagnostics'] = self.logs_this_step
        if getattr(self.loss_fn, 'needs_neg', False):
            inputs = self.inputs(labels, alpha, micro_step, 'neg')
            options['neg'] = self.without_graph(chunked(inputs, size), first = settings.num_groups)
        # gradients are averaged over processes, which may differ in groups
        share = len(alpha) * self.world / settings.num_groups / settings.gradient_accumulation_steps
        if not exists(size):
            with self.synced(sync):
                loss, details = self.loss(self.generate(*chunks[0]), pos, uncond, alpha, options)
                self.accelerator.backward(loss * share)
            return loss.detach(), details
        gen = self.without_graph(chunks).requires_grad_()
        loss, details = self.loss(gen, pos, uncond, alpha, options)
        grads = torch.autograd.grad(loss * share, gen)[0].split(size)
        for i, (chunk, grad) in enumerate(zip(chunks, grads, strict = True)):
            with self.synced(sync and i == len(chunks) - 1):
                self.accelerator.backward((self.generate(*chunk, i) * grad).sum())
        return loss.detach(), details

    def loss(self, gen, pos, uncond, alpha, options):
        """The loss, (Breakdown, alpha, spread / real spread or None, evaluations)."""
        with self.accelerator.autocast():
            result = self.loss_fn(gen, pos, uncond, alpha, **options)
        is_pair = isinstance(result, tuple) and isinstance(result[-1], Breakdown)
        check(is_pair, 'loss_fn must return (loss, Breakdown): Breakdown({}, {}) will do')
        loss, breakdown = result
        check_shape('the loss', loss, ())
        check(loss.requires_grad, 'the loss has no gradient: frozen, or detached?')
        losses, spread = each(lambda t: t.detach().mean(), breakdown.losses), None
        if self.logs_this_step and self.settings.num_pos > 1:
            of_gen, of_pos = (t.detach().float().std(dim = 1, correction = 0).norm() for t in (gen, pos))
            spread = of_gen / of_pos
        return loss, (Breakdown(losses, breakdown.stats), alpha, spread, {})

    # what is seen of it
    def metrics(self, details):
        """On the bar: the drift before it is normalised, mean over features."""
        breakdown, alpha, spread, evaluated = details
        metrics = {'alpha/mean': alpha.mean(), 'alpha/share_of_1': (alpha == 1).float().mean()}
        metrics |= existing(spread = spread)
        metrics |= {f'feature/{name}/loss': loss for name, loss in breakdown.losses.items()}
        drifts = {}
        for name, stats in breakdown.stats.items():
            prefix, kinds = f'feature/{name}', stats._asdict()
            metrics[f'{prefix}/scale'] = kinds.pop('scale')
            for kind, values in kinds.items():
                metrics |= {f'{prefix}/{kind}/{t}': value for t, value in values.items()}
            for t, value in stats.drift_rms.items():
                drifts.setdefault(f'drift/{t}', []).append(value)
        drifts = {name: stack(values).mean() for name, values in drifts.items()}
        return {**metrics, **drifts, **evaluated}, (*evaluated, *drifts, 'loss')

    @torch.no_grad()
    def evaluate_averages(self):
        """{name: number}. The best average is sampled from now on, its checkpoint stays."""
        wanted, chosen, best = default(self.settings.keep_best, ''), self.ema, self.best
        name, sign = wanted.removeprefix('max:'), -1 if wanted.startswith('max:') else 1
        evaluated = {}
        for decay, ema in self.emas.items():
            given, *_ = together(partial(self.evaluate, partial(self.sample, ema = ema)))
            check(isinstance(given, dict), f'evaluate must return {{name: number}}, it returned {given!r}')
            numbers = {key: float(value) for key, value in given.items()}
            suffix = f'/{decay}' if len(self.emas) > 1 else ''
            evaluated |= {f'eval/{key}{suffix}': value for key, value in numbers.items()}
            check(not wanted or name in numbers, f'keep_best is {name!r}, evaluate returned {list(numbers)}')
            value = numbers.get(name, math.nan)
            if math.isfinite(value) and (not exists(best) or sign * value < sign * best['value']):
                best, chosen = dict(value = value, step = self.step, ema_decay = decay), ema
        self.ema, self.best = chosen, best
        if exists(self.best) and self.best['step'] == self.step:
            self.save('best')
        return evaluated

    def log(self, bar, loss, details, norm):
        *_, spread, evaluated = details
        if self.is_due(self.step, self.settings.evaluate_every):
            evaluated |= self.evaluate_averages()
        super().log(bar, loss, details, norm)
        first_step = max(self.settings.lr_warmup_steps, self.settings.num_train_steps // 5)
        if self.step >= first_step and exists(spread) and spread < 0.1:
            found = 'samples of a class spread less than a tenth of real ones, they collapse: try affinity_floor = 0.'
            warnings.warn(found, stacklevel = 2)

    def sample(self, labels = None, *, ema = None, **kwargs):
        """sample_from an average, None for the chosen one, by default at the least alpha of training."""
        model = default(ema, self.ema).ema_model
        kwargs = dict(alpha = self.alpha_range[0]) | kwargs
        return sample_from(model, self.noise_shape, labels, **kwargs)

    def pictures(self):
        """Ten each of ten classes or conditions, always from the same noise."""
        rows = min(10, len(self.dataset) if self.has_conditions else default(self.num_classes, 10))
        labels = torch.arange(rows) if exists(self.num_classes) else None
        if self.has_conditions:
            _, labels = self.dataset.batch([(i, i) for i in range(rows)])
        num = None if exists(labels) else rows
        samples = self.sample(labels, num_samples = num, num_samples_each = 10, seed = self.settings.seed)
        return rearrange(samples, 'rows ten ... -> (rows ten) ...'), rows

@dataclasses.dataclass(kw_only = True)
class MAESettings(LoopSettings):
    """What MAETrainer is told besides. Smaller batches want a smaller learning rate."""
    batch_size: int = bounded(8192, low = 1)  # of all processes together
    learning_rate: float = 4e-3
    lr_warmup_steps: int = 4_000  # release
    ema_decay: float = bounded(0.9995, high = 1)
    finetune_steps: int = free(0)  # the last ones: the weight of the classification rises
    cls_weight: float = bounded(0.1, high = 1)  # linearly to this
    cls_warmup_steps: int = 1_000  # in so many steps

    def __post_init__(self):
        super().__post_init__()
        start = max(0, self.num_train_steps - self.finetune_steps)
        self.finetune_start = start if self.finetune_steps > 0 else None

class MAETrainer(BaseTrainer):
    """Pretrains a LatentMAE on a dataset of (sample, label) (A.3). The encoder is ema.ema_model.

    settings: see MAESettings and LoopSettings. to_image: see Trainer.
    """
    less_memory = 'lower batch_size and raise gradient_accumulation_steps'

    def __init__(self, model, dataset, *, to_image = None, **settings):
        super().__init__(model, dataset, MAESettings(**settings), to_image)
        num, steps = self.settings.batch_size, self.settings.finetune_steps
        check(steps == 0 or exists(self.num_classes), 'finetune_steps needs a classifier: set num_classes')
        check(num % self.world == 0, f'batch_size {num} cannot be shared by {self.world} processes')
        self.samples_per_process = num // self.world
        if self.is_sharded:
            register_fsdp_forward_method(self.ema.ema_model, 'reconstruct')
        self.resume()

    def cls_weight_at(self, step):
        """lambda, 0 in the first of the finetune_steps (release)."""
        settings, start = self.settings, default(self.settings.finetune_start, step)
        progress = (step - start) / max(1, settings.cls_warmup_steps)
        return settings.cls_weight * min(1., max(0., progress))

    def backward(self, batches, micro_step, sync):
        samples, labels = self.read(batches)
        check_range('real samples', samples)
        labels = checked_labels(labels, self.num_classes, len(labels)) if exists(self.num_classes) else None
        samples, labels = map(self.to_device, (samples, labels))
        generator = seeded(self.settings.seed, self.step, micro_step, self.rank, device = self.device)
        mask, cls_weight = self.unwrapped.draw_mask(samples, generator), self.cls_weight_at(self.step)
        with self.synced(sync):
            loss, details = self.model(samples, labels, cls_weight = cls_weight, mask = mask)
            self.accelerator.backward(loss / self.settings.gradient_accumulation_steps)
        return loss.detach(), MAEBreakdown(*(t.detach() for t in details))

    def metrics(self, details):
        metrics = {**details._asdict(), 'cls_weight': self.cls_weight_at(self.step - 1)}
        return metrics, ('reconstruction', 'accuracy')

    def pictures(self):
        """Ten samples, what the mask leaves of them, and reconstructions."""
        model, num = self.ema.ema_model.eval(), min(10, len(self.dataset))
        samples = self.dataset.batch([(i, i) for i in range(num)])[0].to(self.device)
        mask = model.draw_mask(samples, seeded(self.settings.seed, 'picture', device = self.device))
        dropped = model.dropped(mask)
        left = samples * (1 - dropped)
        restored = left + model.reconstruct(samples, mask)[0] * dropped
        return cat((samples, left, restored)), 3

# ── 11. weights - our own, and those that the authors published ───

# kind and names in the authors' repository, which release.py reads
Generator.published = '', ()
DriftingGenerator.published = 'gen', ('latent_L_sota', 'latent_B_sota', 'pixel_L_sota', 'pixel_B_sota', 'ablation')
LatentMAE.published = 'mae', ('mae_latent_256', 'mae_latent_640', 'mae_pixel_640')

def from_pretrained(cls, name, *, revision = None):
    """A model in eval mode, in float32.

    name: of a published model (extra [pretrained]), a repository on the hub ('user/name'), or a folder.
    revision: of the repository, a commit, tag or branch.
    Raises ValueError for unknown names, damaged files, unfit weights; OSError from the hub.
    """
    kind, published = cls.published
    folder = Path(name).expanduser()
    is_release = (folder / 'metadata.json').is_file() if folder.is_dir() else name in published
    files = ('metadata.json', 'ema_params.msgpack') if is_release else ('config.json', 'model.safetensors')
    if folder.is_dir():
        check(not (folder / SHARED_FILES[0]).is_file(), f'{name} is of a run: resume it, then save_pretrained')
        config, weights = (folder / file for file in files)
    else:
        known = is_release or re.fullmatch(r'[\w.-]+/[\w.-]+', str(name)) and not folder.is_file()
        check(known, f'{name!r} is neither a folder nor a published model, which are {", ".join(published) or "none"}')
        repository, path = ('Goodeat/drifting', f'models/{kind}/jax/{name}/') if is_release else (str(name), '')
        config, weights = (Path(hf_hub_download(repository, path + file, revision = revision)) for file in files)
    if is_release:
        from drifting_pytorch import release
        state_dict = release.read_msgpack(weights)
    try:
        arguments = json.loads(config.read_text())
        if is_release:
            arguments, state_dict = release.TRANSLATIONS[kind](arguments['model_config'], state_dict)
        else:
            state_dict = load_file(weights)
        # even on meta these cost memory
        blocks = sum(arguments.get('layers', [arguments.get('depth', 0)]))
        tokens = (arguments.get('image_size', 0) // arguments.get('patch_size', math.inf)) ** 2
        tokens += arguments.get('num_register_tokens', 0)
        numbers = sum(t.numel() for t in state_dict.values())
        fits = blocks <= len(state_dict) and tokens <= numbers // arguments.get('dim', 1)
        check(fits, f'its config has {blocks} blocks and {tokens} tokens, more than its weights')
        with torch.device('meta'):  # the weights are taken as they are read, not copied
            model = cls(**arguments)
    except Exception as error:  # whatever a config may hold
        reason, *_ = f'{error}\n'.splitlines()
        raise ValueError(f'{name} is not a {cls.__name__}: {reason}') from error

    for key, t in state_dict.items():
        check(t.is_floating_point(), f'{key} in {weights} is {t.dtype}, expected floating point')
        state_dict[key] = t.float()
        check_range(f'{key} in {weights}', state_dict[key])
    check_fits(model.state_dict(), state_dict)
    model.load_state_dict(state_dict, assign = True)
    return model.eval()

for model_class in (Generator, LatentMAE):  # last, so that the models could come first
    model_class.from_pretrained = classmethod(from_pretrained)
