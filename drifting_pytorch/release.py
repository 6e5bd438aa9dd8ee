"""The files that the authors published: their models in JAX, as arguments and weights of ours.

Only `from_pretrained` of drifting.py needs it, for their models alone.
"""

import math
import re

import torch
from einops import rearrange
from torch import cat

from drifting_pytorch.drifting import check

# the release's options by our names: its name, and what its reader takes where a config says nothing
MAE_OPTIONS = dict(
    dim = ('base_channels', 64), channels = ('in_channels', 3), patch_size = ('input_patch_size', 1),
    num_classes = ('num_classes', 1000), mask_patch_size = ('patch_size', 4),
    layers = ('layers', (2, 2, 2, 2))
)
GENERATOR_OPTIONS = dict(
    image_size = ('input_size', 32), channels = ('in_channels', 3), patch_size = ('patch_size', 2),
    dim = ('hidden_size', 1152), depth = ('depth', 28), heads = ('num_heads', 16),
    ff_mult = ('mlp_ratio', 4.), num_classes = ('num_classes', 1001),
    num_register_tokens = ('n_cls_tokens', 0),
    num_style_tokens = ('noise_coords', 1), style_codebook_size = ('noise_classes', 0)
)

# from its parameters' names to ours: patterns, applied one after the other
MAE_NAMES = {
    '^(encoder|decoder)/': '', r'^stages_(\d+)/layers_': r'stages/\1/', '^up': 'ups/up',
    '^head': 'to_pixels', '^fc': 'to_logits', r'^(layer\d)_norm': r'norms/\1', 'concat_norm_fn': 'norm',
    'proj_(conv|gn)': r'shortcut/\1', r'(conv|gn)(\d)': r'conv\2/\1', 'conv/': '0/', 'gn/': '1/',
    '^conv1': 'stem'
}
GENERATOR_NAMES = {
    '/Dense_0|Torch|^LightningDiT_0/': '', '^RMSNorm_0': 'alpha_embed/3', '^Embed_0': 'class_embed',
    'TimestepEmbedder_0/Linear_0': 'alpha_embed/0', 'TimestepEmbedder_0/Linear_1': 'alpha_embed/2',
    '^Linear_0': 'patch_embed', '^Linear_1': 'register_proj', 'cls_embed': 'register_embed',
    'FinalLayer_0/Linear_0': 'final_modulation/linear', 'FinalLayer_0/Linear_1': 'to_patch',
    'FinalLayer_0/RMSNorm_0': 'final_norm',

    'blocks_': 'blocks/', 'RMSNorm_0': 'attn_norm', 'RMSNorm_1': 'ff_norm',
    r'Attention_0/(\w)_norm': r'attn/\1_rmsnorm',
    'Attention_0/Linear_0': 'attn/to_qkv', 'Attention_0/Linear_1': 'attn/to_out',
    'SwiGLUFFN_0/Linear_0': 'ff/ff/0/gate', 'SwiGLUFFN_0/Linear_1': 'ff/ff/0/proj',
    'SwiGLUFFN_0/Linear_2': 'ff/ff/2', 'Linear_0': 'modulation/linear'
}

def flatten(tree, *path):
    """{'a/b/c': tensor} of nested maps of tensors."""
    name = '/'.join(path)
    if torch.is_tensor(tree):
        return {name: tree}
    check(isinstance(tree, dict), f'expected nested maps of arrays, found {type(tree).__name__} at {name or "the top"}')
    flat = {}
    for key, branch in tree.items():
        flat |= flatten(branch, *path, key)
    return flat

def read_msgpack(path):
    """The parameters {'a/b/c': tensor} of a published artifact."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError('these weights need msgpack: pip install "drifting-pytorch[pretrained]"') from error

    def to_tensor(code, data):  # extension type 1 is an array: (shape, dtype name, bytes)
        shape, name, raw = msgpack.unpackb(data, max_bin_len = len(data))
        known = ('float32', 'float64', 'float16', 'bfloat16')
        check(code == 1 and name in known, f'unknown array type {code}, {name!r}, expected one of {", ".join(known)}')
        t = torch.frombuffer(bytearray(raw), dtype = getattr(torch, name))
        check(math.prod(shape) == len(t), f'an array of shape {shape} with {len(t)} numbers')
        return t.reshape(shape)

    try:
        with open(path, 'rb') as file:  # array by array, never the whole file
            unpacker = msgpack.Unpacker(file, ext_hook = to_tensor, max_buffer_size = 2 ** 31 - 1)
            params = flatten(unpacker.unpack())
            check(unpacker.tell() == path.stat().st_size, 'there is something behind the last array')
            return params
    except Exception as error:  # whatever a file may hold
        raise ValueError(f'{path} is not a msgpack file of arrays: {error or "it ends too early"}') from error

def translated(config, params, options, names):
    """Arguments and state dict, in PyTorch's layout. params is emptied: none is held twice."""
    state = {}
    for path in list(params):
        t, name = params.pop(path), path
        for pattern, ours in {**names, '(kernel|scale|embedding)$': 'weight', '/': '.'}.items():
            name = re.sub(pattern, ours, name)
        if path.endswith('/kernel'):
            t = rearrange(t, '... i o -> o i ...')  # (in, out), or (h, w, in, out)
        state[name] = t.float().contiguous()
    return {ours: config.get(theirs, value) for ours, (theirs, value) in options.items()}, state

def mae_from_release(config, params):
    return translated(config, params, MAE_OPTIONS, MAE_NAMES)

def generator_from_release(config, params):
    arguments, state = translated(config, params, GENERATOR_OPTIONS, GENERATOR_NAMES)
    same = dict(out_channels = arguments['channels'], cond_dim = arguments['dim'])
    needed = dict.fromkeys(('use_qknorm', 'use_swiglu', 'use_rope', 'use_rmsnorm'), True)
    for name, wanted in {**needed, **same}.items():
        value = config.get(name, same.get(name, False))
        check(value == wanted, f'it has {name} = {value}, this generator offers {wanted} alone')

    if arguments['style_codebook_size'] == 0:
        arguments |= dict(num_style_tokens = 0, style_codebook_size = 1)
    arguments['bf16_rotary'] = config.get('use_bf16', False) and not config.get('attn_fp32', True)

    # the release rotates one half of a head with the other, x-transformers neighbours
    def interleaved(t, heads):
        return rearrange(t, '(h two d) ... -> (h d two) ...', h = heads, two = 2)

    num_styles = sum(name.startswith('noise_embeds_') for name in state)
    styles = [state.pop(f'noise_embeds_{i}.weight') for i in range(num_styles)]
    state['style_embed.weight'] = cat((torch.empty(0, arguments['dim']), *styles))
    for name in list(state):
        if name in ('pos_embed', 'register_embed'):
            state[name] = state[name].squeeze(0)
        elif name.endswith('_rmsnorm.weight'):
            state[name] = interleaved(state[name], 1)
        elif '.proj.' in name:
            state[name] = cat((state[name], state.pop(name.replace('proj', 'gate'))))
        elif 'qkv' in name:
            q, k, v = state.pop(name).tensor_split(3)
            q, k = (interleaved(t, arguments['heads']) for t in (q, k))
            for letter, t in dict(q = q, k = k, v = v.clone()).items():
                state[name.replace('qkv', letter)] = t
    return arguments, state

TRANSLATIONS = dict(gen = generator_from_release, mae = mae_from_release)
