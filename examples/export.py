"""A generator as an ONNX file: one forward pass, from noise, labels, guidance scales and styles to samples.

python examples/export.py MODEL out.onnx               # any batch size, float32; checked against PyTorch, and timed
python examples/export.py MODEL out.onnx --rounds 0    # without the times

MODEL is a published generator by name, a repository on the hub, a folder of save_pretrained, or a checkpoint of a
training, of which the averaged weights are taken. Needs the extra [onnx]. The inputs are noise [batch ch h w] (of a
ConvGenerator [batch d]), labels [batch] (int64, where the model has classes), alpha [batch] (at least 1), styles
[batch s] (int64, where it has styles); with conditions of other kinds also vector [batch k] and image [batch ch h w],
of the side of the samples. The file does not check their ranges, as the model does. To load it:
onnxruntime.InferenceSession('out.onnx').
"""

import sys
import time
from statistics import median

import torch
from torch import nn

from common import load_generator, make_parser, positive
from drifting_pytorch.drifting import check

class Call(nn.Module):
    """The model with the inputs that it has, and nothing that is optional."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.conditions = ['labels'] * (model.num_classes is not None) + list(model.condition_shapes)
        self.names = ['noise', *self.conditions, 'alpha']

        if getattr(model, 'num_style_tokens', 0) > 0:
            self.names.append('styles')

    def forward(self, *inputs):
        given = dict(zip(self.names, inputs, strict = True))
        conditions = {name: given.pop(name) for name in self.conditions}
        no_styles = torch.zeros(inputs[0].shape[0], 0, dtype = torch.long)
        return self.model(**{'styles': no_styles, **given}, labels = conditions or None)

    def draw(self, batch, seed = 0):
        """Inputs of so many samples."""
        model, generator = self.model, torch.Generator().manual_seed(seed)

        shapes = {
            name: [model.image_size if side in ('height', 'width') else side for side in shape]
            for name, shape in model.condition_shapes.items()
        }

        drawn = dict(
            noise = torch.randn(batch, *model.noise_shape, generator = generator),
            labels = torch.randint(model.num_classes or 1, (batch,), generator = generator),
            **{name: torch.randn(batch, *shape, generator = generator) for name, shape in shapes.items()},
            alpha = 1 + torch.rand(batch, generator = generator),
            styles = model.draw_styles(batch, generator) if 'styles' in self.names else None
        )

        return [drawn[name] for name in self.names]

    def dynamic_shapes(self):
        batch = torch.export.Dim('batch', min = 1)
        return (tuple({0: batch} for _ in self.names),)

def export(call):
    """The program of torch.export, for any batch size: a file of it is torch.export.save(program, 'out.pt2')."""
    return torch.export.export(call, tuple(call.draw(2)), dynamic_shapes = call.dynamic_shapes())

def write_onnx(call, path):
    """Weights above 1.5 GB lie next to it, in path.data: a file of ONNX has at most 2 GB."""
    size = sum(p.numel() * p.element_size() for p in call.parameters())

    torch.onnx.export(
        export(call), (), str(path),
        input_names = call.names, output_names = ['samples'], dynamic_shapes = call.dynamic_shapes(),
        dynamo = True, external_data = size > 1.5e9, verbose = False
    )

def session(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers = ['CPUExecutionProvider'])

def run_onnx(loaded, call, inputs):
    feeds = {name: t.numpy() for name, t in zip(call.names, inputs, strict = True)}
    return torch.from_numpy(loaded.run(None, feeds)[0])

def difference(a, b):
    """norm of the difference / norm, which is 0 where a generator is not trained"""
    return ((a - b).norm() / b.norm().clamp(min = 1e-6)).item()

def milliseconds(contenders, batch, rounds):
    """{name: ms per sample}: medians of calls that take turns, after one each that is not counted."""
    times = {name: [] for name in contenders}

    for i in range(rounds + 1):
        for name, fn in contenders.items():
            start = time.perf_counter()
            fn()
            times[name] += [time.perf_counter() - start] * (i > 0)

    return {name: 1e3 * median(each) / batch for name, each in times.items()}

@torch.no_grad()
def compare(call, loaded, batch, rounds):
    """{contender: ms per sample} on the cpu."""
    compiled = torch.compile(call, dynamic = False)
    inputs = call.draw(batch)

    contenders = {
        'PyTorch, eager': lambda: call(*inputs),
        'PyTorch, compiled': lambda: compiled(*inputs),
        'onnxruntime': lambda: run_onnx(loaded, call, inputs)
    }

    return milliseconds(contenders, batch, rounds)

def options(argv):
    parser = make_parser(__doc__)
    parser.add_argument('model', help = 'a published generator by name, a folder, or a checkpoint')
    parser.add_argument('output', help = 'the file to write')
    parser.add_argument('--revision', default = None, help = 'of weights on the hub, None for the default')
    parser.add_argument('--batch-sizes', type = positive, nargs = '+', default = [1, 8], help = 'that are timed')
    parser.add_argument('--rounds', type = int, default = 5, help = 'timed calls of each contender, 0 for no times')
    parser.add_argument('--threads', type = positive, default = torch.get_num_threads(), help = 'of the cpu')
    return parser.parse_args(argv)

def main(argv = None):
    args = options(argv)
    torch.set_num_threads(args.threads)

    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        sys.exit('ONNX needs an extra: pip install "drifting-pytorch[onnx]"')

    call = Call(load_generator(args.model, args.revision)).eval()
    write_onnx(call, args.output)
    loaded = session(args.output, args.threads)

    for batch in (1, 3):
        inputs = call.draw(batch, seed = 1)
        with torch.no_grad():
            error = difference(run_onnx(loaded, call, inputs), call(*inputs))
        check(error < 1e-5, f'onnxruntime differs from PyTorch by {error:.1g}: the file is not to be trusted')
        print(f'batch {batch}: onnxruntime differs from PyTorch by {error:.1g}')

    for batch in args.batch_sizes if args.rounds > 0 else ():
        for name, ms in compare(call, loaded, batch, args.rounds).items():
            print(f'batch {batch}, {name}: {ms:.3g} ms per sample')

    print(args.output)

if __name__ == '__main__':
    main()
