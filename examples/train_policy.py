"""One network evaluation per action chunk: a drifting policy that imitates demonstrations (paper, section 5.3).

python examples/train_policy.py

A point robot with inertia and disturbances has to reach a goal behind a disc. Start, goal and disc vary; the
demonstrator passes it left or right, by a coin. So the mean of the demonstrations runs into the disc, and a policy has
to keep both sides apart. Compared at the same network, demonstrations, steps and batch: regression (behaviour cloning),
flow matching (a many-step diffusion policy), drifting, which `Trainer` trains: a condition per row of the data, one
positive each. Writes policy.png, policy.md and metrics.json.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import cat, nn, stack, tensor
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from common import make_parser, num_parameters, positive
from drifting_pytorch import FeatureDriftLoss, Trainer

CHUNK = 16                          # actions that are predicted
EXECUTE = 8                         # of which so many are executed before the next prediction
MAX_STEPS = 64                      # of an episode, a demonstration takes about 34
SPEED, DISTURBANCE, REACHED = 0.05, 0.004, 0.05

# the task: scenes, the demonstrator, closed-loop episodes, all batched

def uniform(low, high, *shape, generator):
    return low + (high - low) * torch.rand(*shape, generator = generator)

def draw_scenes(n, generator):
    def draw_end(side):
        x = side * uniform(0.65, 0.85, n, generator = generator)
        y = uniform(-0.2, 0.2, n, generator = generator)
        return stack((x, y), dim = -1)

    start, goal = draw_end(-1), draw_end(1)
    radius = uniform(0.15, 0.25, n, generator = generator)
    center = start + uniform(0.4, 0.6, n, 1, generator = generator) * (goal - start)
    center[:, 1] += radius * uniform(-0.5, 0.5, n, generator = generator)
    return dict(start = start, goal = goal, center = center, radius = radius)

def observe(scene, position, velocity):
    """What a policy sees [n 7]."""
    to_goal, to_center = scene['goal'] - position, scene['center'] - position
    return cat((to_goal, to_center, scene['radius'][:, None], velocity / SPEED), dim = -1)

def rotate(v, angle):
    x, y = v.unbind(dim = -1)
    cos, sin = angle.cos(), angle.sin()
    return stack((cos * x - sin * y, sin * x + cos * y), dim = -1)

def demonstrator(n, generator):
    """Heads for the goal, or where the disc is in the way along its tangent, always on the same side.

    The side [n] is a coin, the clearance varies too.
    """
    side = torch.randint(2, (n,), generator = generator) * 2. - 1
    clearance = uniform(0.1, 0.15, n, generator = generator)

    def policy(obs):
        to_goal, to_center = obs[:, :2], obs[:, 2:4]
        radius = obs[:, 4] + clearance
        left, distance = to_goal.norm(dim = -1), to_center.norm(dim = -1)

        ahead = F.normalize(to_goal, dim = -1)
        along = (to_center * ahead).sum(dim = -1)
        aside = (to_center - along[:, None] * ahead).norm(dim = -1)
        blocked = (aside < radius) & (along > 0) & (along < left)

        angle = (radius / distance).clamp(max = 1).asin() + 2 * (1 - distance / radius).clamp(min = 0)
        direction = torch.where(blocked[:, None], rotate(F.normalize(to_center, dim = -1), side * angle), ahead)
        return (direction * (left / 0.15).clamp(max = 1)[:, None])[:, None]        # n 1 2, slower near the goal

    return policy

@torch.no_grad()
def run_episodes(policy, scene, generator, steps = MAX_STEPS):
    """policy: observations [n 7] -> the actions [n k 2] until it is asked again.

    Actions are velocities, in units of SPEED, of which the robot takes up half per step.
    """
    position = scene['start']
    velocity = torch.zeros_like(position)
    crashed = reached = torch.zeros(len(position), dtype = torch.bool)

    path = [position]
    observations = []
    actions = []

    while len(actions) < steps:
        for action in policy(observe(scene, position, velocity)).unbind(dim = 1):
            observations.append(observe(scene, position, velocity))
            actions.append(action)

            too_fast = action.norm(dim = -1, keepdim = True).clamp(min = 1)
            velocity = 0.5 * velocity + 0.5 * SPEED * action / too_fast
            moved = position + velocity + DISTURBANCE * torch.randn(position.shape, generator = generator)
            position = torch.where((crashed | reached)[:, None], position, moved)

            crashed = crashed | ((position - scene['center']).norm(dim = -1) < scene['radius'])
            reached = reached | ~crashed & ((position - scene['goal']).norm(dim = -1) < REACHED)
            path.append(position)

    path, observations, actions = (stack(t, dim = 1) for t in (path, observations, actions))
    offset = path - scene['center'][:, None]
    abreast = offset[..., 0].abs().argmin(dim = 1)
    left = offset[torch.arange(len(path)), abreast, 1] > 0

    return dict(
        path = path, observations = observations, actions = actions,
        reached = reached, crashed = crashed, left = left
    )

def demonstrate(n, generator):
    """Pairs of an observation [m 7] and the chunk of actions [m 16 2] that followed.

    At the steps at which a policy is asked: starts, where the side is decided, would be rare among all steps.
    """
    episodes = run_episodes(demonstrator(n, generator), draw_scenes(n, generator), generator, MAX_STEPS + CHUNK)
    chunks = episodes['actions'].unfold(1, CHUNK, 1).transpose(2, 3)              # n t 16 2
    moving = (episodes['path'].diff(dim = 1) != 0).any(dim = -1) & episodes['reached'][:, None]

    asked = torch.arange(0, MAX_STEPS, EXECUTE)
    moving = moving[:, asked]
    return episodes['observations'][:, asked][moving], chunks[:, asked][moving]

# the policies: one network, three ways to train it

class Policy(nn.Module):
    """(x [b 32], observation [b 7]) -> [b 32].

    x is noise (drifting), a half denoised chunk (flow matching, at this time) or zero (regression).
    """

    def __init__(self, observations, chunks, dim = 256):
        super().__init__()
        size = chunks[0].numel()
        self.size = size

        self.register_buffer('mean', observations.mean(dim = 0))
        self.register_buffer('std', observations.std(dim = 0))
        self.register_buffer('unit', chunks.std())

        self.net = nn.Sequential(
            nn.Linear(observations.shape[-1] + size + 1, dim), nn.SiLU(),
            nn.Linear(dim, dim), nn.SiLU(),
            nn.Linear(dim, dim), nn.SiLU(),
            nn.Linear(dim, size)
        )

    def forward(self, x, obs, time = 0.):
        time = torch.as_tensor(time).expand(len(x), 1)
        return self.net(cat(((obs - self.mean) / self.std, x, time), dim = -1))

class DriftingPolicy(Policy):
    """The same network as Trainer calls it: (noise [b n], observation [b 7]) -> [b 32].

    Gaussian noise is connected, and so is all that a network makes of it: between the noise for left and the noise for
    right there is some for straight ahead. Coins, the signs of noise, have nothing in between, as the random styles of
    the paper's generator, which are whole numbers.

    coins: how many, or 0 for Gaussian noise of 32 dimensions. The other inputs of the network are zero.
    """

    def __init__(self, observations, chunks, coins):
        super().__init__(observations, chunks)
        self.coins = coins
        self.noise_shape = (coins or self.size,)

    def forward(self, noise, obs, alpha = None, styles = None):         # no guidance, no styles
        if self.coins > 0:
            noise = F.pad(noise.sign(), (0, self.size - self.coins))

        return super().forward(noise, obs)

def regression_loss(model, obs, chunks):
    return F.mse_loss(model(torch.zeros_like(chunks), obs), chunks)

def flow_loss(model, obs, chunks):
    noise, time = torch.randn_like(chunks), torch.rand(len(chunks), 1)
    return F.mse_loss(model(noise.lerp(chunks, time), obs, time = time), chunks - noise)

LOSSES = dict(regression = regression_loss, flow = flow_loss)
METHODS = (*LOSSES, 'drifting')

def minimize(loss_fn, model, observations, chunks, settings, title):
    optimizer = torch.optim.AdamW(model.parameters(), lr = settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)

    for _ in tqdm(range(settings.steps), desc = title, leave = False):
        batch = torch.randint(len(chunks), (settings.batch,))
        loss = loss_fn(model, observations[batch], chunks[batch])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

def train_by_drifting(model, observations, chunks, settings, seed):
    """Returns the averaged model.

    A group is an observation: its one demonstrated chunk is the positive, several generated chunks repel each other.
    That the other side is demonstrated too is learned over the steps, as in regression and flow matching, whose targets
    are single chunks as well: the network is smooth in the observation. Fewer observations make up for the several
    chunks, so that all methods pass the same number of rows per step.
    """
    trainer = Trainer(
        model,
        FeatureDriftLoss(temperatures = settings.temperatures, affinity_floor = 0.),
        TensorDataset(chunks, observations),
        num_groups = settings.batch // settings.num_gen,
        num_gen = settings.num_gen,
        num_pos = 1,
        alpha_range = (1., 1.),                                         # no guidance
        num_train_steps = settings.steps,
        learning_rate = settings.learning_rate,
        lr_warmup_steps = 0,
        lr_decay_start = max(1, settings.steps // 10),
        ema_decay = max(0., 1 - 10 / settings.steps),                   # of about the last tenth
        log_every = 0, sample_every = 0, save_every = 0,
        seed = seed,
        cpu = True,
        results_folder = Path(settings.results_folder) / f'seed{seed}',
        overwrite = True
    )

    trainer.train()
    trainer.end_training()
    return trainer.ema.ema_model

def train(method, observations, chunks, settings, seed):
    """Returns the model and the seconds of cpu time."""
    torch.manual_seed(seed)
    is_drifting = method == 'drifting'
    model = DriftingPolicy(observations, chunks, settings.coins) if is_drifting else Policy(observations, chunks)
    chunks = chunks.flatten(1) / model.unit
    start = time.process_time()

    if is_drifting:
        model = train_by_drifting(model, observations, chunks, settings, seed)
    else:
        minimize(LOSSES[method], model, observations, chunks, settings, title = f'{method}, seed {seed}')

    return model, time.process_time() - start

def policy_of(model, method, evaluations = 1):
    """Observations [n 7] -> the actions [n 8 2] to execute."""
    @torch.no_grad()
    def policy(obs):
        if method == 'drifting':
            x = model(torch.randn(len(obs), *model.noise_shape), obs)
        elif method == 'regression':
            x = model(torch.zeros(len(obs), model.size), obs)
        else:
            x = torch.randn(len(obs), model.size)

            for i in range(evaluations):                                # Euler steps from noise to a chunk
                x = x + model(x, obs, time = i / evaluations) / evaluations
        return (x * model.unit).view(-1, CHUNK, 2)[:, :EXECUTE]

    return policy

# evaluation

def share(t):
    return t.float().mean().item()

def evaluate(make_policy, num_scenes, repeats, seed = 10_000):
    """Closed-loop episodes in new scenes, each several times. make_policy gets the number of episodes."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    scenes = draw_scenes(num_scenes, generator)
    scene = {name: t.repeat_interleave(repeats, dim = 0) for name, t in scenes.items()}
    episodes = run_episodes(make_policy(num_scenes * repeats), scene, generator)

    success, left = (episodes[name].view(num_scenes, repeats) for name in ('reached', 'left'))
    on_the_left, on_the_right = success & left, success & ~left

    return dict(
        success = share(success),
        crashed = share(episodes['crashed']),
        left = share(left[success]) if success.any() else None,
        both_sides = share(on_the_left.any(dim = 1) & on_the_right.any(dim = 1))
    )

def milliseconds(policy, obs, repeats):
    """Median cpu time of a chunk for one robot, divided by the actions that are executed."""
    times = []

    for _ in range(repeats):
        start = time.process_time()
        policy(obs)
        times.append(time.process_time() - start)

    return tensor(times).median().item() * 1000 / EXECUTE

def plot(policies, path, episodes = 40):
    """The same start, again and again."""
    scene = draw_scenes(1, torch.Generator().manual_seed(3))
    center, radius, goal = scene['center'][0], scene['radius'][0], scene['goal'][0]
    scene = {name: t.expand(episodes, *t.shape[1:]) for name, t in scene.items()}

    figure = Figure(figsize = (3 * len(policies), 2.3))
    axes = figure.subplots(1, len(policies))

    for axis, (name, make_policy) in zip(axes, policies.items(), strict = True):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        result = run_episodes(make_policy(episodes), scene, generator)

        axis.add_patch(Circle(center, radius, color = 'lightgray'))

        for one, left, reached in zip(result['path'], result['left'], result['reached'], strict = True):
            side = 'tab:blue' if left else 'tab:orange'
            axis.plot(*one.T, color = side if reached else 'tab:red', linewidth = 0.6)

        axis.plot(*goal, 'k*', markersize = 5)
        axis.set_title(f'{name}: {result["reached"].sum()} of {episodes} reach the goal', fontsize = 8)
        axis.set(xticks = [], yticks = [], aspect = 'equal', xlim = (-0.95, 0.95), ylim = (-0.6, 0.6))

    figure.tight_layout()
    figure.savefig(path, dpi = 90)

# how each is sampled: (method, network evaluations per chunk)

VARIANTS = {
    'regression': ('regression', 1),
    'flow matching, 100 steps': ('flow', 100),
    'flow matching, 10 steps': ('flow', 10),
    'flow matching, 1 step': ('flow', 1),
    'drifting': ('drifting', 1)
}

PICTURED = ('demonstrator', 'regression', 'flow matching, 100 steps', 'drifting')

COLUMNS = (
    'success', 'success of each seed', 'crashes', 'left among successes', 'both sides',
    'evaluations per action', 'cpu ms per action', 'training, cpu s'
)

def table(results, training_seconds):
    """A line per variant, means over seeds, of which results and training_seconds hold one entry each."""
    lines = [f'| | {" | ".join(COLUMNS)} |', '| --- ' * (1 + len(COLUMNS)) + '|']

    for name, seeds in results.items():
        known = {key: [r[key] for r in seeds if r[key] is not None] for key in seeds[0]}
        mean = {key: tensor(values).mean().item() for key, values in known.items()}

        cells = [
            name,
            f'{mean["success"]:.3f}',
            ', '.join(f'{r["success"]:.3f}' for r in seeds),
            f'{mean["crashed"]:.3f}',
            f'{mean["left"]:.2f}' if known['left'] else '-',            # None without a success
            f'{mean["both_sides"]:.2f}'
        ]

        if name in VARIANTS:
            method, _ = VARIANTS[name]
            seconds = sum(training_seconds[method]) / len(seeds)
            cells += [f'{mean["evaluations_per_action"]:.3g}', f'{mean["ms_per_action"]:.3f}', f'{seconds:.0f}']
        else:
            cells += ['-', '-', '-']

        lines.append(f'| {" | ".join(cells)} |')

    return '\n'.join(lines)

def policies_of(models, seed):
    """{name: a function of the number of episodes that makes a policy}: the demonstrator and every variant."""
    def demonstrators(n):
        return demonstrator(n, torch.Generator().manual_seed(seed))

    make = {'demonstrator': demonstrators}

    for name, (method, evaluations) in VARIANTS.items():
        if method in models:
            policy = policy_of(models[method], method, evaluations)
            make[name] = lambda n, policy = policy: policy

    return make

def options():
    parser = make_parser(__doc__)
    parser.add_argument(
        '--results-folder', default = 'results/policy',
        help = 'where policy.png, policy.md and metrics.json go'
    )
    parser.add_argument(
        '--seeds', type = positive, default = 3,
        help = 'trainings per method, each with its own weights, noise and demonstrations'
    )
    parser.add_argument('--steps', type = positive, default = 4_000, help = 'optimiser steps of each training')
    parser.add_argument('--batch', type = positive, default = 256, help = 'rows that pass the network per step')
    parser.add_argument(
        '--methods', nargs = '+', choices = METHODS, default = METHODS,
        help = 'what is trained, without the others'
    )
    parser.add_argument(
        '--coins', type = int, choices = range(33), metavar = 'N', default = 4,
        help = 'noise of drifting: so many random signs, of 32 inputs; 0 for 32 Gaussian numbers'
    )
    parser.add_argument('--num-gen', type = positive, default = 8, help = 'chunks per observation, in drifting')
    parser.add_argument(
        '--temperatures', type = float, nargs = '+', default = [0.05, 0.2, 0.5],
        help = 'of the kernel, relative to the mean distance of chunks; the largest one reaches from side to side'
    )
    parser.add_argument(
        '--learning-rate', type = float, default = 3e-3,
        help = 'of AdamW; a cosine takes it to 0, in drifting it falls as 1 / sqrt(step) and weights are averaged'
    )
    parser.add_argument('--demonstrations', type = positive, default = 1_000, help = 'episodes to imitate')
    parser.add_argument('--threads', type = positive, default = 1, help = 'cpu threads')
    parser.add_argument(
        '--quick', action = 'store_true',
        help = 'one seed, few steps and episodes: only to see that everything runs'
    )
    args = parser.parse_args()

    if args.quick:
        args.seeds, args.steps, args.demonstrations = 1, 20, 50

    return args

def main():
    args = options()
    torch.set_num_threads(args.threads)
    folder = Path(args.results_folder)
    folder.mkdir(parents = True, exist_ok = True)

    num_scenes, repeats = (4, 4) if args.quick else (50, 10)
    variants = [name for name, (method, _) in VARIANTS.items() if method in args.methods]
    results = {name: [] for name in ('demonstrator', *variants)}
    training_seconds = {method: [] for method in args.methods}

    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        observations, chunks = demonstrate(args.demonstrations, generator)
        models = {}

        for method in args.methods:
            models[method], seconds = train(method, observations, chunks, args, seed)
            training_seconds[method].append(seconds)

        make = policies_of(models, seed)

        for name, seeds in results.items():
            result = evaluate(make[name], num_scenes, repeats)

            if name in VARIANTS:
                _, evaluations = VARIANTS[name]
                result['evaluations_per_action'] = evaluations / EXECUTE
                result['ms_per_action'] = milliseconds(make[name](1), observations[:1], repeats = 100)

            seeds.append(result)

        if seed == 0:
            plot({name: make[name] for name in PICTURED if name in make}, folder / 'policy.png')

    text = table(results, training_seconds)
    record = dict(settings = vars(args), results = results, training_cpu_seconds = training_seconds)
    (folder / 'policy.md').write_text(text + '\n', encoding = 'utf-8')
    (folder / 'metrics.json').write_text(json.dumps(record, indent = 1))

    parameters, episodes = num_parameters(models[args.methods[0]]), num_scenes * repeats
    print(f'''{text}

{parameters:,} parameters, {len(chunks):,} pairs of an observation and a chunk, \
{episodes} episodes per seed: {num_scenes} new scenes, {repeats} times each
both sides: share of scenes in which successful episodes passed on either side
picture: {folder / "policy.png"}''')

if __name__ == '__main__':
    main()
