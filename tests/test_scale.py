"Several ranks against one process; death and return; what is refused. Every wait has an end."
import json, math, os, signal, time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from plasticity.data import get_data
from plasticity.edits import Deepen, Prune, Reset, Widen, edit, replay
from plasticity.growing import grow
from plasticity.models import make_model
from plasticity.monitors import SUMS, Monitor
from plasticity.policies import Growth
from plasticity.remedies import ReDo
from plasticity.ranks import join, on_ranks
from plasticity.scale import Distributed, watchers
from plasticity.schedules import Averages, Scheduled
from plasticity.snapshots import SnapshotManager, SnapshotStore
from plasticity.training import Callback, Checkpoint, Trainer, load_state
from processes import forked

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[1]
DATA = get_data('digits').subset(train=203, test=101) # 203 = 6*32 + 11: the last batch is uneven for two ranks and for three
WAIT = 60

def weights(t): return {k: v.tolist() for k, v in t.model.state_dict().items()}
def rows(t): return [dict(r) for r in t.history]

def gap(a, b):
    "The largest difference of losses and accuracies of two histories with the same rows"
    assert [r['step'] for r in a] == [r['step'] for r in b]
    return max(abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in ('loss', 'accuracy') if k in x)

def apart(a, b):
    "The largest relative difference of two nested lists"
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert a.shape == b.shape
    return ((a - b).abs().max()/b.abs().max().clamp(min=1e-9)).item() if a.numel() else 0.

def trained(model=None, epochs=2, callbacks=(), strategy='ddp', data=DATA, distributed=None, **options):
    "A trainer after some epochs, under `Distributed`"
    d = Distributed(strategy, device='cpu', timeout=WAIT, **(distributed or {}))
    torch.manual_seed(0)
    if model is None: model = make_model('mlp', data.shape, 10, hidden_sizes=(16, 12), seed=0)
    options = dict(lr=3e-3, batch_size=32, device='cpu') | options
    return Trainer(model, data, callbacks=[d, *callbacks], **options).fit(epochs)

class Reshape(Callback):
    "Grows after the first epoch, prunes what the monitor says after the second"
    order = 40
    def __init__(self, monitor): self.monitor = monitor
    def after_epoch(self, t):
        x = t.x[:4]
        if t.epoch == 1: record = Widen('layers.0.linear', 6, seed=3, noise=.1).apply(t.model, t.optimizer, x)
        elif t.epoch == 2:
            least = self.monitor['layers.0.act'].sum.argsort()[:3].tolist()
            record = Prune('layers.0.linear', least).apply(t.model, t.optimizer, x)
        else: return
        t.call('after_edit', record)

def whole(folder, strategy='ddp', epochs=4, **options):
    "Everything at once: monitor, growth, pruning, snapshots, checkpoints"
    model = make_model('mlp', DATA.shape, 10, hidden_sizes=(16, 12), seed=0)
    monitor = Monitor(model, every=3)
    keep = SnapshotManager(folder + '/snapshots', gain=None)
    t = trained(model, epochs, [Reshape(monitor), monitor, keep, Checkpoint(folder + '/run', every=5)], strategy, **options)
    sums = {k: dict(n=s.n, samples=s.samples, passes=s.passes, largest=s.largest.tolist(), gram=s.gram.tolist(), active=s.active.tolist())
            | {name: getattr(s, name).tolist() for name in SUMS if not name.startswith('saturated')} for k, s in monitor.stats.items()}
    if join('cpu').main: keep.close()
    moments = [v.tolist() for s in t.optimizer.state.values() for k, v in s.items() if k == 'exp_avg']
    return dict(rows=rows(t), weights=weights(t), sums=sums, moments=moments, snapshots=[(s.step, s.reason) for s in keep])

@pytest.fixture(scope='module')
def alone(tmp_path_factory): return whole(str(tmp_path_factory.mktemp('alone')))

@pytest.mark.parametrize('strategy, ranks', [('ddp', 2), ('ddp', 3), ('fsdp2', 2)])
def test_same_numbers_as_one_process(alone, tmp_path, strategy, ranks):
    got = on_ranks(whole, str(tmp_path), strategy, ranks=ranks, timeout=WAIT)
    assert gap(got['rows'], alone['rows']) < 1e-6
    assert got['snapshots'] == alone['snapshots'] and len(got['snapshots']) > 2
    for k, v in alone['weights'].items(): assert apart(got['weights'][k], v) < 1e-5
    for a, b in zip(got['moments'], alone['moments'], strict=True): assert apart(a, b) < 1e-4
    assert got['sums'].keys() == alone['sums'].keys()
    for layer, sums in alone['sums'].items():
        for k, v in sums.items():
            if k in ('n', 'samples', 'passes'): assert got['sums'][layer][k] == v
            else: assert apart(got['sums'][layer][k], v) < 1e-5, (layer, k)

def from_snapshot(folder, step):
    "Goes on from the snapshot of a step, in the shape that the network had then"
    store = SnapshotStore(folder)
    def trainer(model):
        monitor = Monitor(model, every=3)
        d = Distributed(device='cpu', timeout=WAIT)
        keep = SnapshotManager(f'{folder}-{d.ranks.world}', gain=None)
        callbacks = [d, Reshape(monitor), monitor, keep, Checkpoint(folder + '-c')]
        return Trainer(model, DATA, lr=3e-3, batch_size=32, device='cpu', callbacks=callbacks)
    t = store.load(next(s for s in store if s.step == step), trainer=trainer)
    return len(t.model.layers[0].linear.weight), rows(t.fit())

def test_snapshot_goes_on_elsewhere(alone, tmp_path):
    "What two ranks kept after growing, one process and three ranks go on from"
    on_ranks(whole, str(tmp_path), 'ddp', ranks=2, timeout=WAIT)
    for ranks in 1, 3:
        units, got = on_ranks(from_snapshot, str(tmp_path/'snapshots'), 7, ranks=ranks, timeout=WAIT)
        assert units == 22 and gap(got, alone['rows']) < 1e-6

def shaped(kind):
    "The history of one of many situations"
    if kind == 'clip': return rows(trained(clip=.5, schedule='cosine', optimizer='adamw', weight_decay=.1))
    if kind == 'accumulate': return rows(trained(accumulate=3))
    if kind == 'fewer rows than ranks': return rows(trained(batch_size=67, data=DATA.subset(train=136)))  # 67, 67, 2
    if kind == 'regression':
        data = get_data('synthetic_regression', n=150)
        return rows(trained(make_model('mlp', data.shape, 1, hidden_sizes=(8,)), data=data, batch_size=32))
    if kind == 'noise and two tasks':
        t = trained(epochs=1, optimizer='noisy_sgd', lr=.05, noise=.1)
        t.begin_task(DATA.subset(train=90, seed=1))
        return rows(t.fit(1))
    if kind == 'frozen':
        m = make_model('mlp', DATA.shape, 10, hidden_sizes=(16, 12), seed=0)
        m.layers[0].requires_grad_(False)
        return rows(trained(m))

@pytest.mark.parametrize('kind', ['clip', 'accumulate', 'fewer rows than ranks', 'regression', 'frozen', 'noise and two tasks'])
def test_situations(kind):
    ranks = 3 if kind == 'fewer rows than ranks' else 2
    assert gap(on_ranks(shaped, kind, ranks=ranks, timeout=WAIT), shaped(kind)) < 1e-6

class EveryFew(Callback):
    "Edits in the middle of an epoch, right after a step"
    order = 30
    def __init__(self): self.record = None
    def after_step(self, t):
        x, linear = t.x[:4], 'layers.0.linear'
        if t.step == 3: self.record = Widen(linear, 4, noise=.1).apply(t.model, t.optimizer, x)
        if t.step == 5: replay(t.model, self.record.inverse(), t.optimizer)
        if t.step == 7: Reset(linear, [0, 1], seed=4).apply(t.model, t.optimizer, x)
        if t.step == 9:
            with edit(t.model, t.optimizer, x) as e: e.widen(linear, 2).do(Deepen('layers.0', seed=1))

@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_edits_inside_an_epoch(strategy):
    one = trained(callbacks=[EveryFew()])
    two = on_ranks(lambda: (lambda t: (rows(t), weights(t)))(trained(callbacks=[EveryFew()], strategy=strategy)), timeout=WAIT)
    assert gap(two[0], rows(one)) < 1e-6
    for k, v in weights(one).items(): assert apart(two[1][k], v) < 1e-5

def policies(kind):
    if kind == 'growth':
        net = grow(make_model('mlp', DATA.shape, 10, hidden_sizes=(8, 8), seed=0), DATA.normalize(DATA.x_train[:2]))
        from plasticity.policies import AdaptiveGrowth
        g = Growth(AdaptiveGrowth(patience=1, cooldown=1, loss_threshold=10., gradient_threshold=0.))
        t = trained(net, 4, [g])
        assert g.events
        return rows(t), [e['new_sizes'] for e in g.events]
    if kind == 'averages':
        a = Averages(every=2)
        def propose(t):
            name = next(iter(a.names))
            use = a[name].active
            return Widen('layers.0.linear', int(use.argmax()) % 5 + 1, seed=t.step)
        s = Scheduled(4, propose)
        t = trained(callbacks=[a, s])
        return rows(t), [e['edits'] for e in s.events]
    if kind == 'redo':
        r = ReDo(threshold=.5, every=3)
        t = trained(callbacks=[r])
        assert r.log
        return rows(t), list(r.log)

@pytest.mark.parametrize('kind', ['growth', 'averages', 'redo'])
def test_policies_decide_the_same(kind):
    (a, what), (b, same) = on_ranks(policies, kind, timeout=WAIT), policies(kind)
    assert what == same and gap(a, b) < 1e-6

def dice():
    class Dice(Callback):
        order = 40
        def after_epoch(self, t): Widen('layers.0.linear', 1 + 3*join('cpu').rank).apply(t.model, t.optimizer, t.x[:4])
    d = trained(epochs=2, callbacks=[Dice()])
    return len(d.model.layers[0].linear.weight)

def test_rank_0_decides():
    "Each rank wants another number of units; all do what rank 0 wants, and stay equal (else the checksum would raise)"
    assert on_ranks(dice, timeout=WAIT) == 16 + 2

def drifted():
    class Drift(Callback):
        def after_step(self, t):
            if t.step == 2 and join('cpu').rank == 1:
                with torch.no_grad(): t.model.head.bias[0].add_(1e-6)
    trained(epochs=1, callbacks=[Drift()])

def test_drift_is_found():
    with pytest.raises(RuntimeError, match=r"Disagreement: after epoch 1: .*'head.bias'"): on_ranks(drifted, timeout=WAIT)

class Centred(nn.Linear):
    "Takes off the running mean of its inputs"
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer('middle', torch.zeros(sizes[0]))
    def forward(self, x):
        x = x.flatten(1)
        if self.training: self.middle.mul_(.9).add_(.1*x.detach().mean(0))
        return super().forward(x - self.middle)

def centred(check=True): return rows(trained(Centred(64, 10), 1, distributed=dict(check=check)))

def test_a_buffer_of_each_rank_is_told_of():
    with pytest.raises(RuntimeError, match=r"Disagreement: after epoch 1: .*'middle'; a buffer .* check=False"):
        on_ranks(centred, timeout=WAIT)
    assert on_ranks(centred, False, timeout=WAIT)

def instance_normed():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return rows(trained(net, 1)), norm.running_mean.tolist()

def test_instance_norm_with_running_averages():
    (history, mean), (one, alone) = on_ranks(instance_normed, timeout=WAIT), instance_normed()
    assert gap(history, one) < .01 and any(alone) and apart(mean, alone) < .05

def normed(): # batch norm over shares: not the numbers of one process, equal on all ranks; dropout differs between ranks
    def make(): return make_model('mlp', DATA.shape, 10, hidden_sizes=(16,), normalization='batch', dropout=.2, seed=0)
    a, b = trained(make()), trained(make())
    assert weights(a) == weights(b)
    draws = []
    class Look(Callback):
        def after_forward(self, t):
            if t.model.training: draws.append(t.logits.detach().clone())
    nets = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 10))
    same = DATA.subset(train=32)
    same.x_train[:], same.y_train[:] = same.x_train[:1].clone(), same.y_train[:1].clone()
    trained(nets, 1, [Look()], data=same, eval_every=0)
    every = [torch.empty_like(draws[0]) for _ in range(2)]
    dist.all_gather(every, draws[0])
    return rows(a)[-1]['loss'], float((every[0] - every[1]).abs().max()), torch.initial_seed()

def test_batchnorm_and_dropout():
    loss, other, _ = on_ranks(normed, timeout=WAIT)
    assert math.isfinite(loss) and other > 0

def text_run():
    from plasticity.transformer import GPT
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(17, (90, 13), generator=g)
    class Tokens:
        name, task, classes, num_classes = 'tokens', 'classification', None, 17
        x_train, y_train, x_test, y_test = tokens[:70, :-1], tokens[:70, 1:], tokens[70:, :-1], tokens[70:, 1:]
        def to(self, device): return self
        def n_batches(self, size, split='train', drop_last=False): return -(-len(getattr(self, f'x_{split}'))//size)
        def batches(self, size, split='train', shuffle=True, seed=0, epoch=0, start=0, augment=False, drop_last=False):
            x, y = getattr(self, f'x_{split}'), getattr(self, f'y_{split}')
            for k in range(start, self.n_batches(size, split)): yield x[k*size:(k + 1)*size], y[k*size:(k + 1)*size]
    out = {}
    for s in ('ddp', 'fsdp2'):
        torch.manual_seed(1)
        net = GPT((12,), 17, 16, 2, 2)
        out[s] = rows(trained(net, 2, [EditHeads()], s, data=Tokens(), batch_size=16))
    return out

class EditHeads(Callback):
    order = 40
    def after_epoch(self, t):
        if t.epoch == 1: Widen('blocks.0.fc1', 4, noise=.1).apply(t.model, t.optimizer, t.x[:2])

def test_transformer():
    got, one = on_ranks(text_run, timeout=WAIT), text_run()
    for s in got: assert gap(got[s], one[s]) < 1e-6

class Dies(Callback):
    "Rank 1 is killed in the middle of an epoch"
    order = 200
    def after_step(self, t):
        if t.step == 11 and join('cpu').rank == 1: os.kill(os.getpid(), signal.SIGKILL)

def dying(folder, dies, resume=False, strategy='ddp'):
    model = make_model('mlp', DATA.shape, 10, hidden_sizes=(16, 12), seed=0)
    d = Distributed(strategy, device='cpu', timeout=WAIT)
    monitor, extra = Monitor(model, every=3), [Dies()] if dies else [Callback()]
    t = Trainer(model, DATA, lr=3e-3, batch_size=32, device='cpu', callbacks=[d, monitor, Checkpoint(folder, every=2), *extra])
    if dies: extra[0].__class__.__name__ = 'Callback'
    if resume: t.load(folder)
    at = t.step
    t.fit(None if resume else 3)
    return at, rows(t), weights(t), {k: s.n for k, s in monitor.stats.items()}

@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_killed_rank_and_resume(tmp_path, strategy):
    "What a dead rank leaves is a checkpoint that one process, two or three go on from, to the losses of a run that never stopped"
    _, whole_rows, whole_weights, n = dying(str(tmp_path/'whole'), False)
    with pytest.raises(RuntimeError, match='rank 1 ended with exit status -9; rank 0'):
        on_ranks(dying, str(tmp_path/'run'), True, False, strategy, timeout=WAIT)
    for ranks in (1, 2, 3) if strategy == 'ddp' else (2,):
        import shutil
        shutil.copytree(tmp_path/'run', tmp_path/f'copy{ranks}')
        args = dying, str(tmp_path/f'copy{ranks}'), False, True, strategy
        at, got, w, seen = on_ranks(*args, ranks=ranks, timeout=WAIT)
        assert at == 10 and gap(got, whole_rows) < 1e-6 and seen == n
        for k, v in whole_weights.items(): assert apart(w[k], v) < 1e-5

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from plasticity.data import get_data
from plasticity.models import make_model
from plasticity.scale import Distributed
from plasticity.training import Checkpoint, Trainer
data = get_data('digits').subset(train=203, test=101)
model = make_model('mlp', data.shape, 10, hidden_sizes=(16, 12), seed=0)
t = Trainer(model, data, lr=3e-3, batch_size=32, device='cpu', callbacks=[Distributed(device='cpu', timeout=60), Checkpoint(sys.argv[1])])
t.fit(2)
'''

@pytest.mark.timeout(240)
def test_torchrun(tmp_path):
    "The same script on one process and under torchrun"
    (tmp_path/'script.py').write_text(SCRIPT)
    def torchrun():
        from torch.distributed.run import main
        os.environ |= dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME='lo')
        main()
    run = 'torchrun', '--standalone', '--nproc-per-node', '2' # it picks a port and keeps it
    done = forked(torchrun, *run, tmp_path/'script.py', tmp_path/'out', timeout=220)
    assert done.returncode == 0, done.stderr[:3000]
    got = load_state(tmp_path/'out')
    assert gap(got['history'], rows(trained())) < 1e-6 and got['counters']['step'] == 14

@pytest.mark.parametrize('names, options, message', [
    (dict(strategy='fsdp'), {}, r"strategy: got 'fsdp'; did you mean 'fsdp2'"),
    (dict(sync_batchnorm=True), {}, 'sync_batchnorm: got True on the CPU'),
    (dict(strategy='fsdp2'), dict(callbacks=[Growth('gradient')]), "strategy: got 'fsdp2', but Growth looks at whole gradients"),
    ({}, dict(compile=True), 'compile: got True')])
def test_refused(names, options, message):
    def go():
        callbacks = options.pop('callbacks', ())
        Trainer(make_model('mlp', DATA.shape, 10, hidden_sizes=(8,)), DATA, device='cpu',
                callbacks=[Distributed(device='cpu', timeout=WAIT, **names), *callbacks], **options).fit(1)
    with pytest.raises(RuntimeError, match=message): on_ranks(go, timeout=WAIT)

def test_waits_end():
    def late():
        if join('cpu', timeout=1).rank: time.sleep(5)                    # later than the rank's own wait, well within the caller's
        dist.barrier()
    with pytest.raises(RuntimeError, match='rank 0 failed'): on_ranks(late, timeout=60)
    with pytest.raises(RuntimeError, match='rank 1 failed(.|\n)*ValueError: wrong'):
        on_ranks(lambda: (_ for _ in ()).throw(ValueError('wrong')) if os.environ['RANK'] == '1' else time.sleep(9), timeout=20)

def test_alone_it_does_nothing():
    "On one process the callback changes no bit"
    model = make_model('mlp', DATA.shape, 10, hidden_sizes=(16, 12), seed=0)
    a, b = trained(), Trainer(model, DATA, lr=3e-3, batch_size=32, device='cpu').fit(2)
    assert weights(a) == weights(b) and rows(a) == rows(b)

def test_after_the_fit():
    "The trainer is as it was: whole model, own methods, edits by itself"
    def go():
        t = trained(epochs=1, strategy='fsdp2')
        assert t.forward is t.model and 'call' not in vars(t) and type(t.model).__name__ == 'MLP'
        kinds = {type(p).__name__ for p in t.model.parameters()}
        Widen('layers.0.linear', 2).apply(t.model, t.optimizer, t.x[:2])
        t.fit(1)
        return sorted(kinds), t.evaluate()['loss'], len(watchers(t.callbacks)), t.step
    kinds, loss, n, step = on_ranks(go, timeout=WAIT)
    assert kinds == ['Parameter'] and math.isfinite(loss) and n == 0 and step == 14

LINE = ('training=standard', 'training.epochs=2', 'training.batch_size=70', 'model.hidden_sizes=[11]', 'metrics.probe=60', 'device=cpu',
        'logging.progress=false')

def line(folder, *words):
    from plasticity.experiments import run_line
    kept = [w for w in LINE if w.partition('=')[0] not in {v.partition('=')[0] for v in words}] # said once
    if 'training=extrema' in words: kept = [w for w in kept if not w.startswith('model.')]
    return str(run_line(*kept, *words, f'hydra.run.dir={folder}'))

@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_a_line_on_two_ranks(tmp_path, strategy):
    "The words of the command line: rank 0's folder, nothing left of the others', the numbers of one process, resumed by one"
    from plasticity.experiments import read_run, run_line
    words = 'training=extrema', 'training.sparsity=.03', 'training.hidden_sizes=[12,9]'
    kinds = dict(standard=LINE[:4]) | (dict(extrema=words) if strategy == 'ddp' else {})
    for kind, more in kinds.items():
        one = read_run(line(tmp_path/kind, *more)) # first, so that what it imports is there before the fork
        two = on_ranks(lambda kind=kind, more=more: line(f'{tmp_path}/{kind}-rank-{os.environ["RANK"]}', *more, f'distributed={strategy}'),
                       timeout=WAIT)
        assert two == f'{tmp_path}/{kind}-rank-0' and not (tmp_path/f'{kind}-rank-1').exists()
        assert gap(read_run(two)[1], one[1]) < 1e-6 and len(read_run(two)[2]) == len(one[2]) and (Path(two)/'report.html').exists()
        config = json.loads((Path(two)/'config.json').read_text())
        assert config['distributed']['name'] == strategy and config['distributed']['check'] is True
    run_line(f'resume={tmp_path}/standard-rank-0', 'distributed=none', 'logging.progress=false')
    assert gap(read_run(tmp_path/'standard-rank-0')[1], read_run(tmp_path/'standard')[1]) < 1e-6

def cloned(folder):
    from plasticity.experiments import run_line
    run_line('training=cloning', 'device=cpu', 'distributed=ddp', 'dryrun=true', 'logging.progress=false', f'hydra.run.dir={folder}')

def test_words_and_processes_go_together(tmp_path):
    from plasticity.experiments import ConfigError
    with pytest.raises(ConfigError, match="distributed: got 'ddp', but this process is alone; start it with `torchrun"):
        line(tmp_path/'a', 'distributed=ddp')
    with pytest.raises(ConfigError, match="distributed: no 'dpp'; did you mean 'ddp'"): line(tmp_path/'a', 'distributed=dpp')
    with pytest.raises(RuntimeError, match="ConfigError: distributed: got 'none', but 2 processes were started together"):
        on_ranks(line, tmp_path/'a', timeout=WAIT)
    with pytest.raises(RuntimeError, match='ConfigError: track_base: got True, takes False'):
        on_ranks(cloned, tmp_path/'b', timeout=WAIT)

def weighed(uneven):
    "A loss that asks the model for what its forward pass left in it"
    class Penal(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh())
            self.head = nn.Linear(9, 10)
        def forward(self, x):
            self.h = self.net(x)
            return self.head(self.h)
        def loss(self, out, y): return nn.functional.cross_entropy(out, y) + .3*self.h.square().mean()
    torch.manual_seed(5)
    m = Penal()
    d = Distributed(device='cpu', timeout=WAIT)
    t = Trainer(m, DATA.subset(train=131 if uneven else 128), loss=m.loss, batch_size=32, device='cpu', callbacks=[d]).fit(2)
    assert t.loss_fn == m.loss
    return rows(t), weights(t)

@pytest.mark.parametrize('uneven', [False, True])
def test_a_loss_that_asks_the_model(uneven):
    (a, w), (b, v) = on_ranks(weighed, uneven, timeout=WAIT), weighed(uneven)
    test = lambda r: [x for x in r if x['split'] == 'test']
    assert gap(test(a), test(b)) < 1e-6
    for k in v: assert apart(w[k], v[k]) < 1e-5

def test_own_methods_of_a_callback_stay():
    "What a reader set on a callback is there after the fit, and films go on rank 0 alone"
    def go(folder):
        from plasticity.filming import Filming
        seen, c = [], Callback()
        c.after_epoch = lambda t: seen.append(t.epoch)
        film = Filming(every=0., share=1., path=f'{folder}/film.json')
        t = trained(epochs=1, callbacks=[c, film])
        t.fit(1)
        return seen, len(film.film.steps) if hasattr(film.film, 'steps') else len(film.film.frames), rows(t)
    import tempfile
    with tempfile.TemporaryDirectory() as d: seen, frames, got = on_ranks(go, d, timeout=WAIT)
    assert seen == [1, 2] and frames > 1 and gap(got, rows(trained())) < 1e-6
