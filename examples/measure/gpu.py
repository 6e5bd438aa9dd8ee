"""A report of a new GPU: what it can do at all, and what drifting costs on it, in at most twenty minutes.

python examples/measure/gpu.py              # before it: pytest -m cuda -s, whether the numbers are right
python examples/measure/gpu.py --quick      # tiny sizes, on a cpu too: that everything runs

rates      large products in every precision, memory, and what starting an operation costs
loss       problems W1 to W3 of benchmark.py, next to a transcription of the release's loss
step       of the paper's ablation (generator B/2, encoder of width 256), as many groups as fit, eager and compiled: the
           shares of generator, encoder, loss, backward and optimiser, and the utilisation
mnist      seconds of training until 5,000 samples have a Frechet distance of 3
sampling   images per second of B/2 and L/2, eager, compiled and as CUDA graphs

It is printed in markdown, and written to --output as it goes. A part that fails says why, and the next one follows.
"""

import argparse
import gc
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import TensorDataset

from benchmark import (
    benchmark_loss,
    benchmark_step,
    device_name,
    flops_of,
    interleaved,
    make_generator,
    matmul_rate,
    seconds,
    show,
    synchronize,
)
from common import Judge, crop, frechet_distance, load_mnist, make_parser, positive, split
from compare_mnist import Classifier, conv_generator
from drifting_pytorch import FeatureDriftLoss, Trainer

def with_options(args, **options):
    return argparse.Namespace(**{**vars(args), **options})

def seconds_left(args):
    return args.end - time.perf_counter()

# what the device can do at all

PRECISIONS = dict(
    float32 = (torch.float32, False), TF32 = (torch.float32, True),
    bfloat16 = (torch.bfloat16, False), float16 = (torch.float16, False)
)

def report_rates(args):
    on_a_gpu, rows = args.device.type == 'cuda', []
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32

    for name, (dtype, rounded) in PRECISIONS.items():
        matmul.allow_tf32 = rounded
        if on_a_gpu or name == 'float32':
            rows.append({'precision': name, 'TFLOP/s': matmul_rate(args, dtype) / 1e12})

    matmul.allow_tf32 = before
    show('Large square products', rows)

    source = torch.ones(2 ** (28 if on_a_gpu else 22), device = args.device)
    target, small = torch.empty_like(source), torch.ones(1, device = args.device)
    copy = min(seconds(partial(target.copy_, source), args)[0] for _ in range(5))
    many = min(seconds(lambda: [small.add_(1) for _ in range(1_000)], args)[0] for _ in range(5))
    bytes_moved = 2 * source.numel() * source.element_size()
    show('Memory, and small operations', [{'GB/s of a copy': bytes_moved / copy / 1e9, 'us per operation': many * 1e3}])

# training

def report_loss(args):
    benchmark_loss(args)

def report_step(args):
    """Eager with as many groups as fit, compiled with as many."""
    groups = benchmark_step(with_options(args, compile = False))['whole'][0]['groups']

    if args.compile:
        print('\nCompiled:')
        benchmark_step(with_options(args, groups = groups))

# sampling

def drawn_inputs(model, batch, device):
    """noise, labels, alpha, styles."""
    noise = torch.randn(batch, *model.noise_shape, device = device)
    labels = torch.arange(batch, device = device) % model.num_classes
    return noise, labels, torch.full((batch,), 1.5, device = device), model.draw_styles(batch)

def forward(model, inputs, device, dtype):
    """A call without arguments. No cache of weights in half precision: a graph could not keep it."""
    def run():
        is_half = dtype != torch.float32
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled = is_half, cache_enabled = False):
            return model(*inputs)

    return run

def captured(fn):
    """What fn does on the GPU, as one launch: on the same inputs, into the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()

    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        fn()

    return graph.replay

def sampling_contenders(model, batch, args, dtype):
    """(name, a function that makes the contender): what fails can be left out."""
    inputs = drawn_inputs(model, batch, args.device)
    eager = forward(model, inputs, args.device, dtype)
    makers = {'eager': lambda: eager}

    if args.compile:
        compiled = forward(torch.compile(model, dynamic = False), inputs, args.device, dtype)
        makers['compiled'] = lambda: compiled

    if args.device.type == 'cuda':
        makers |= {f'{name}, CUDA graph': partial(captured, maker()) for name, maker in [*makers.items()]}

    return makers

def report_sampling(args):
    dtype = torch.bfloat16 if args.device.type == 'cuda' else torch.float32
    models, batch_sizes = (['tiny'], (1, 2)) if args.quick else (['B/2', 'L/2'], (1, 8, 64))
    rate, rows = matmul_rate(args, dtype), []

    for name in models:
        with args.device:
            model = make_generator(name).eval()

        for batch in batch_sizes:
            if seconds_left(args) < 60:
                print(f'\n{name}, batch {batch}: left out, the time is over')
                continue

            contenders = {}

            for contender, make in sampling_contenders(model, batch, args, dtype).items():
                try:
                    contenders[contender] = make()
                    contenders[contender]()
                except Exception as error:
                    contenders.pop(contender, None)
                    print(f'\n{name}, batch {batch}, {contender} failed: {first_line(error)}')

            flops = flops_of(forward(model, drawn_inputs(model, batch, args.device), args.device, dtype))

            for contender, (wall, _) in interleaved(contenders, args).items():
                rows.append({
                    'generator': name, 'batch': batch, 'contender': contender,
                    'images / s': batch / wall, 'ms': wall * 1e3, 'utilisation': flops / wall / rate
                })

        torch.compiler.reset()

    if rows:
        show(f'Sampling in {dtype}: the network alone. Utilisation of {rate / 1e12:.3g} TFLOP/s', rows)

# a whole training

TARGET = 3.     # all real training images have 2.7

def mnist_trainer(judge, args, folder):
    """The recipe for small data of examples/README.md with more groups, and its encoder, trained here."""
    with args.device:
        encoder = Classifier()
        images, labels = judge.images.to(args.device), judge.labels.to(args.device)
        encoder.train_on(images, labels, 4 if args.quick else 600)

    return Trainer(
        conv_generator(),
        FeatureDriftLoss(encoder, affinity_floor = 0.),
        TensorDataset(judge.images, judge.labels),
        num_groups = 10, num_gen = 8 if args.quick else 64, num_pos = 16 if args.quick else 128,
        push_size = 16, class_queue_size = 400, alpha_range = (1., 1.2),
        learning_rate = 4e-3, lr_warmup_steps = 0, lr_decay_start = 200, ema_decay = 0.999,
        mixed_precision = 'no', cpu = args.device.type == 'cpu',
        log_every = 0, sample_every = 0, save_every = 0, results_folder = folder, progress_bar = False
    )

def report_mnist(args):
    """The judge, its data and the evaluations do not count; the encoder of the loss does."""
    (images, labels), (held_out, held_out_labels) = split(*load_mnist(), num_held_out = 1_000)
    num = 600 if args.quick else len(images)
    judge = Judge((crop(images[:num]), labels[:num]), (crop(held_out), held_out_labels))
    sample_labels = torch.arange(10).repeat_interleave(20 if args.quick else 500)
    limit, steps_at_once = min(args.mnist_seconds, seconds_left(args) / 2), 2 if args.quick else 50
    rows = []

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = mnist_trainer(judge, args, folder)
        batches = trainer.batches()
        trainer.before_training(batches)
        synchronize(args.device)
        used = time.perf_counter() - start
        encoder_seconds, evaluate_at = used, 0.

        while used < limit and not (rows and rows[-1]['Frechet distance'] < TARGET):
            start = time.perf_counter()
            for _ in range(steps_at_once):
                trainer.train_step(batches)
            synchronize(args.device)
            used += time.perf_counter() - start

            if used >= min(evaluate_at, limit):
                evaluate_at = used * 1.2
                samples = trainer.sample(sample_labels, seed = 0, batch_size = 1_000).cpu().clamp(-1, 1)
                features, logits = judge.classify(samples)
                rows.append({
                    'seconds': used, 'steps': trainer.step,
                    'Frechet distance': frechet_distance(features, judge.real),
                    'recognised': (logits.argmax(dim = -1) == sample_labels).double().mean().item()
                })

    show(f'MNIST: a training from its start, {encoder_seconds:.1f} s of it for the encoder and the queue', rows)
    best = min(rows, key = lambda row: row['Frechet distance'])
    is_reached = best['Frechet distance'] < TARGET
    after = f'{best["seconds"]:.1f} s, {best["steps"]} steps'
    reached = f'reached after {after}' if is_reached else f'not reached: {best["Frechet distance"]:.3g} after {after}'
    print(f'\nA Frechet distance of {TARGET:g} was {reached}')

# the report

PARTS = dict(
    rates = report_rates, loss = report_loss, step = report_step, mnist = report_mnist, sampling = report_sampling
)

class Copies:
    """A file of what is printed, while it is printed."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        for file in self.files:
            file.write(text)
            file.flush()

    def flush(self):
        pass

def first_line(error):
    """Of torch's errors: the others are a page."""
    return f'{type(error).__name__}: {str(error).strip() or "no message"}'.splitlines()[0][:300]

def attempt(name, args):
    """A part. Nothing of it stays: memory, compiled graphs, and accelerate's precision."""
    print(f'\n## {name}', flush = True)
    start = time.perf_counter()

    if seconds_left(args) < 0:
        print('\nLeft out: the time is over')
        return

    try:
        PARTS[name](args)
    except (Exception, SystemExit) as error:
        print(f'\nFailed: {first_line(error)}')

    AcceleratorState._reset_state(reset_partial_state = True)
    torch.compiler.reset()
    gc.collect()

    if args.device.type == 'cuda':
        torch.cuda.empty_cache()

    print(f'\n{time.perf_counter() - start:.0f} s', flush = True)

def report_device(args):
    print(f'# {device_name(args.device)}\n\ntorch {torch.__version__}')

    if args.device.type == 'cuda':
        properties = torch.cuda.get_device_properties(args.device)
        capability = f'capability {properties.major}.{properties.minor}'
        memory = f'{properties.total_memory / 2 ** 30:.0f} GiB'
        print(f'CUDA {torch.version.cuda}, {capability}, {properties.multi_processor_count} processors, {memory}')

def options(argv):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser = make_parser(__doc__)
    parser.add_argument('--parts', nargs = '+', choices = list(PARTS), default = list(PARTS), help = 'what is measured')
    parser.add_argument('--device', type = torch.device, default = torch.device(device), help = 'cpu or cuda')
    parser.add_argument('--threads', type = positive, default = torch.get_num_threads(), help = 'of the cpu')
    parser.add_argument('--rounds', type = positive, default = 9, help = 'timed calls of each contender')
    parser.add_argument('--minutes', type = float, default = 20., help = 'after which nothing new is begun')
    parser.add_argument('--mnist-seconds', type = float, default = 180., help = 'of training on MNIST, at most')
    parser.add_argument('--quick', action = 'store_true', help = 'tiny sizes, to see that everything runs')
    parser.add_argument('--output', default = 'results/gpu.md', help = 'the report')
    return parser.parse_args(argv)

def main(argv = None):
    args = options(argv)

    # what benchmark.py wants to know besides

    args = with_options(
        args, clock = 'wall', preset = 'ablation', groups = 0, compile = args.device.type == 'cuda',
        end = time.perf_counter() + 60 * args.minutes
    )

    if args.quick:
        args.rounds, args.mnist_seconds = 2, 1.

    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.parent.mkdir(parents = True, exist_ok = True)

    with open(output, 'w') as file, redirect_stdout(Copies(sys.stdout, file)):
        torch.manual_seed(0)
        report_device(args)

        for name in args.parts:
            attempt(name, args)

    print(f'\n{output}')

if __name__ == '__main__':
    main()
