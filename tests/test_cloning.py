"Cloning: exact for every model, norm and factor; what stays on the manifold and what leaves it"
import copy, json

import pytest
import torch
from torch import nn

from plasticity.cloning import Expand, Paths, Until, clone, cloning, compare, deviation, escape, features, scatter
from plasticity.data import get_data
from plasticity.edits import EditRecord, replay
from plasticity.metrics import clone_r2
from plasticity.models import make_model
from plasticity.training import Callback, NoisySGD, Trainer
from plasticity.units import EditError

torch.set_num_threads(1)

SMALL = dict(mlp=dict(hidden_sizes=(6, 8)), cnn=dict(channels=(8, 4), hidden_sizes=(6,)),
             resnet=dict(depth=10, channels=4, blocks=(1, 1)), vit=dict(embed_dim=8, depth=2, num_heads=2))
CASES = [(m, n) for m in SMALL for n in ('none', 'batch', 'layer', 'group', 'instance') if (m, n) != ('mlp', 'instance')]

def shaken(name, norm, seed=0, dtype=torch.float64, **options):
    "A model with random affine weights and statistics, and sharp attention"
    net, g = make_model(name, (3, 8, 8), 5, seed=seed, normalization=norm, **SMALL[name] | options), torch.Generator().manual_seed(seed)
    for k, t in net.state_dict().items():
        if k.endswith('running_var'): t.uniform_(.2, 3, generator=g)
        elif t.is_floating_point() and t.dim() == 1: t.add_(torch.randn(t.shape, generator=g), alpha=.5)
        elif '.attn.q.' in k: t.mul_(20)
    return net.to(dtype)

def images(seed=1, dtype=torch.float64, n=4): return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)

@torch.no_grad()
def difference(a, b, x):
    "Largest difference of outputs relative to the largest output, in both modes"
    out = []
    for train in (False, True):
        y, z = copy.deepcopy(a).train(train)(x), copy.deepcopy(b).train(train)(x)
        out.append(((y - z).abs().max()/z.abs().max()).item())
    return max(out)

@torch.no_grad()
def hooked(net, x, train):
    "Every leaf module's output"
    out, net = {}, copy.deepcopy(net).train(train)
    for k, m in net.named_modules():
        if not list(m.children()): m.register_forward_hook(lambda m, a, h, k=k: out.setdefault(k, h.clone()))
    net(x)
    return out

@pytest.mark.parametrize('name, norm', CASES)
def test_exact(name, norm):
    "Outputs and every single unit, for factors 2, 3, 4 and 2 then 2, on inputs that the edit has not seen"
    base, x = shaken(name, norm), images()
    for factors in ((2,), (3,), (4,), (2, 2)):
        net = copy.deepcopy(base)
        c = None
        for f in factors:
            step = clone(net, f)
            c = step if c is None else step.after(c)
        assert c.factor == torch.tensor(factors).prod()
        assert difference(net, base, x) < 1e-12
        if factors in ((3,), (2, 2)):
            for train in (False, True):
                a, b = hooked(base, x, train), hooked(net, x, train)
                assert set(c.layers) == {k for k in a if a[k].shape != b[k].shape} and c.layers
                for k, labels in c.layers.items():
                    axis = next(d for d in range(a[k].dim()) if a[k].shape[d] != b[k].shape[d])
                    assert len(labels) == c.factor*a[k].shape[axis] and (labels.bincount() == c.factor).all()
                    assert ((b[k] - a[k].index_select(axis, labels)).abs().max()/a[k].abs().max()) < 1e-11, (k, train)

@pytest.mark.parametrize('name, norm', [(m, 'batch' if m != 'vit' else 'layer') for m in SMALL])
def test_exact_float32(name, norm):
    base, x = shaken(name, norm, dtype=torch.float32), images(dtype=torch.float32)
    for f in (2, 4):
        net = copy.deepcopy(base)
        clone(net, f)
        assert difference(net, base, x) < 1e-5

def test_one_head():
    "A single head can only be widened; asked for more of them, nothing is changed"
    base, x = shaken('vit', 'layer', num_heads=1), images()
    net = copy.deepcopy(base)
    with pytest.raises(EditError): clone(net, 2, heads='heads')
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), base.state_dict().values(), strict=True))
    clone(net, 2)
    assert difference(net, base, x) < 1e-12 and net.blocks[0].attn.head_dim == 16

@pytest.mark.parametrize('options', [dict(), dict(fused_qkv=True), dict(head_dim=6), dict(head_pool='avg')])
def test_attention(options):
    "Wider heads divide the scale by the factor; more heads leave it alone"
    base, x = shaken('vit', 'layer', **options), images()
    wide, more = copy.deepcopy(base), copy.deepcopy(base)
    clone(wide, 3); clone(more, 3, heads='heads')
    assert difference(wide, base, x) < 1e-12 and difference(more, base, x) < 1e-12
    a, b, c = (m.blocks[0].attn for m in (base, wide, more))
    assert (b.num_heads, b.head_dim, c.num_heads, c.head_dim) == (a.num_heads, 3*a.head_dim, 3*a.num_heads, a.head_dim)
    assert b.scale == pytest.approx(a.scale/3) and c.scale == a.scale

def test_undo_and_replay():
    "The record takes it back bit for bit, and does it again elsewhere"
    base = shaken('vit', 'layer')
    net, other = copy.deepcopy(base), copy.deepcopy(base)
    c = clone(net, 2)
    replay(other, c.record)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert other.blocks[0].attn.scale == net.blocks[0].attn.scale and torch.equal(other(images()), net(images()))
    replay(net, c.record.inverse())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), base.state_dict().values(), strict=True))
    assert torch.equal(net(images()), base(images())) and isinstance(c.record, EditRecord) and len(c.record.edits) == 1

def test_sites():
    "Only what was asked for; by module, parameter or group"
    net = shaken('mlp', 'batch')
    base = copy.deepcopy(net)
    c = clone(net, 3, sites=['layers.0'], examples=images())
    assert net.sizes() == dict(hidden_sizes=(18, 8)) and set(c.layers) == {f'layers.0.{k}' for k in ('linear', 'norm', 'act', 'drop')}
    assert difference(net, base, images()) < 1e-12

def test_optimizer_follows():
    "Moments are copied: a step of the clone is the step of the base"
    base, x = shaken('mlp', 'none', dtype=torch.float64), images()
    y = torch.tensor([0, 1, 2, 3])
    def step(m, o): o.zero_grad(); nn.functional.cross_entropy(m(x), y).backward(); o.step()
    opt = torch.optim.SGD(base.parameters(), .01, momentum=.9)
    for _ in range(5): step(base, opt)
    net, wide = copy.deepcopy((base, opt))
    clone(net, 2, examples=x, optimizer=wide)
    assert all(wide.state[p]['momentum_buffer'].shape == p.shape for p in net.parameters())

def test_foreign():
    "Any module, not only this book's"
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4), nn.RMSNorm(4), nn.Linear(4, 2)).double()
    base, x = copy.deepcopy(net), torch.randn(7, 5).double()
    c = clone(net, 2, examples=x)
    assert (net(x) - base(x)).abs().max() < 1e-12 and set(c.layers) == {'0', '1', '2', '3', '4'}

class Shaped(nn.Module):
    "Attention that takes its scale from a shape, q, k and v from one projection"
    def __init__(self):
        super().__init__()
        self.start, self.qkv, self.out, self.end, self.head_dim = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 2), 4

    def forward(self, x):
        x = self.start(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT/q.shape[-1]**.5).softmax(-1)
        return self.end(x + self.out((a @ v).transpose(1, 2).flatten(2)))

@pytest.mark.parametrize('heads', ['head_dim', 'heads'])
@pytest.mark.parametrize('make', [Shaped, lambda: nn.Sequential(
    nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.), nn.Linear(8, 3))])
def test_foreign_attention(make, heads):
    with torch.no_grad():
        net, x = make().double(), torch.randn(3, 4, 5).double()
        base = copy.deepcopy(net)
        c = clone(net, 3, examples=x, heads=heads)
        assert difference(net, base, x) < 1e-12 and next(m for m in net.modules() if isinstance(m, nn.Linear)).out_features == 24
        assert heads == 'head_dim' or c.error < 1e-12
        replay(net, c.record.inverse())
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), base.state_dict().values(), strict=True))

def test_recurrent():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l, self.h = nn.LSTM(5, 6, 2, batch_first=True), nn.Linear(6, 2)
        def forward(self, x): return self.h(self.l(x)[0][:, -1])
    with torch.no_grad():
        net, x = Net().double(), torch.randn(3, 4, 5).double()
        base = copy.deepcopy(net)
        assert clone(net, 3, examples=x).error < 1e-12 and difference(net, base, x) < 1e-12 and net.l.hidden_size == 18

def test_errors():
    net = shaken('mlp', 'batch')
    for factor in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match='factor'): clone(net, factor)
    with pytest.raises(ValueError, match='heads'): clone(net, 2, heads='tails')
    with pytest.raises(TypeError, match='examples'): clone(nn.Linear(3, 3), 2)
    with pytest.raises(Exception, match='nowhere'): clone(net, 2, sites=['nowhere'])
    with pytest.raises(Exception, match='no units'): clone(nn.Linear(3, 3), 2, examples=torch.randn(2, 3))
    assert net.sizes() == dict(hidden_sizes=(6, 8))

def test_r2_of_perfect_clones():
    "1 in every layer and every aggregate; near 0 for unrelated units"
    net, x = shaken('cnn', 'batch'), images(n=16)
    c = clone(net, 2)
    hs = {k: h for k, h in hooked(net, x, False).items() if k in c.layers}
    assert all(clone_r2(h, c.layers[k]) > 1 - 1e-12 for k, h in hs.items()) and clone_r2(hs, c.layers) > 1 - 1e-12
    assert clone_r2(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), 2).abs() < .05

OPTIMIZERS = dict(sgd=lambda p: torch.optim.SGD(p, .05), momentum=lambda p: torch.optim.SGD(p, .05, momentum=.9),
                  decay=lambda p: torch.optim.SGD(p, .05, weight_decay=.01), adam=lambda p: torch.optim.Adam(p, 1e-3),
                  rmsprop=lambda p: torch.optim.RMSprop(p, 1e-3), adam_l2=lambda p: torch.optim.Adam(p, 1e-2, weight_decay=.01))

def trained(kind, factor, optimizer, steps, norm='none', name='mlp', seed=0, **options):
    "Deviation from the manifold after every so many steps of full-batch training"
    net = shaken(name, norm, seed, **options)
    c, g = scatter(clone(net, factor), kind), torch.Generator().manual_seed(seed)
    x, y, opt, out = images(n=16), torch.randint(0, 5, (16,), generator=g), optimizer(net.parameters()), {0: deviation(c, kind)}
    net.train()
    for i in range(max(steps)):
        opt.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); opt.step()
        if i + 1 in steps: out[i + 1] = deviation(c, kind)
    return out

@pytest.mark.parametrize('name', [k for k in OPTIMIZERS])
@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_copies_stay(name, norm):
    assert trained('block', 2, OPTIMIZERS[name], [300], norm)[300] < 1e-10

@pytest.mark.parametrize('name, norm', [('cnn', 'batch'), ('resnet', 'batch'), ('vit', 'layer')])
@pytest.mark.parametrize('how', ['sgd', 'adam'])
def test_copies_stay_elsewhere(name, norm, how):
    assert trained('block', 2, OPTIMIZERS[how], [8], norm, name)[8] < 1e-12

def test_equitable_starts():
    "Row and column sums stay without any weight being constant in its block; what leaves is L2 inside of Adam"
    for how in OPTIMIZERS:
        out = trained('both', 3, OPTIMIZERS[how], [1, 20])
        assert out[0] < 1e-12 and (out[1] > 1e-5 if how == 'adam_l2' else out[20] < 1e-12), (how, out)
    c = scatter(clone(shaken('mlp', 'none'), 3), 'both')
    assert deviation(c, 'block') > .1 and deviation(c, 'both') < 1e-12
    for kind in ('row', 'column'):
        out = trained(kind, 3, OPTIMIZERS['sgd'], [1])
        assert out[0] < 1e-12 and out[1] > 1e-6

@pytest.mark.parametrize('name, norm', [('mlp', 'layer'), ('cnn', 'batch'), ('resnet', 'group'), ('vit', 'layer')])
def test_row_equitable_keeps_the_function(name, norm):
    base, x = shaken(name, norm), images()
    for kind in ('row', 'both'):
        net = copy.deepcopy(base)
        c = scatter(clone(net, 3), kind, size=1.)
        assert difference(net, base, x) < 1e-11 and deviation(c, 'block') > .01 and deviation(c, 'row') < 1e-11

def test_ways_out():
    "One noisy step or dropout leaves; no noise is SGD bit for bit"
    for how in (dict(noise=.01), dict(noise=.01, per='element'), dict(noise=.01, noise_decay=0.)):
        torch.manual_seed(0)
        assert trained('block', 2, lambda p, how=how: NoisySGD(p, .05, **how), [1])[1] > 1e-6
    torch.manual_seed(0)
    assert trained('block', 2, OPTIMIZERS['sgd'], [1], dropout=.2)[1] > 1e-6
    nets = [shaken('mlp', 'batch') for _ in range(2)]
    for net, opt in zip(nets, (lambda p: NoisySGD(p, .05, noise=0.), OPTIMIZERS['sgd']), strict=True):
        clone(net, 2)
        opt, x, y = opt(net.parameters()), images(n=8), torch.arange(8) % 5
        for _ in range(20): opt.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); opt.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))

def test_starts_are_checked():
    c = clone(shaken('mlp', 'none'), 2)
    for f in (scatter, deviation):
        with pytest.raises(ValueError, match='kind'): f(c, 'diagonal')

# Expand: base and clone side by side

def small_data(): return get_data('digits').subset(train=129, test=64)

def trainer(callbacks, name='mlp', **options):
    data = small_data()
    net = make_model(name, data.shape, 10, seed=0, **SMALL[name] | options.pop('model', dict(normalization='batch')))
    return Trainer(net, data, device='cpu', callbacks=callbacks, batch_size=32, **dict(optimizer='sgd', lr=.05) | options)

class Seen(Callback):
    def __init__(self): self.xs = []
    def before_step(self, t): self.xs.append(t.x.clone())

def test_same_batches():
    "Base and clone get the same batches in the same order, augmented ones too"
    seen, own, e = Seen(), Seen(), Expand([1], probe=16)
    t = trainer([e, own], augment=['rotation'])
    t.fit(1)
    e.base.callbacks.append(seen)
    own.xs.clear()
    t.fit(2)
    assert len(seen.xs) == len(own.xs) == 2*t.n_batches and all(torch.equal(a, b) for a, b in zip(seen.xs, own.xs, strict=True))

@pytest.mark.parametrize('options', [dict(), dict(optimizer='adam', lr=1e-3, schedule='cosine'), dict(model=dict(dropout=.1), momentum=.9)])
def test_base_is_unbroken(options):
    "The twin is what the network would have become, bit for bit"
    e = Expand([1, 3], probe=16)
    t, alone = trainer([e], **copy.deepcopy(options)).fit(4), trainer([], **copy.deepcopy(options)).fit(4)
    assert all(torch.equal(a, b) for a, b in zip(e.base.model.state_dict().values(), alone.model.state_dict().values(), strict=True))
    assert t.model.sizes()['hidden_sizes'] == (24, 32) and e.base.epoch == t.epoch == 4

def test_measuring_changes_nothing():
    nets = [trainer([Expand([1], probe=n, track_base=b)], optimizer='noisy_sgd').fit(3).model for n, b in ((32, True), (0, False))]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True))

def test_noise_starts_again():
    e = Expand([2], probe=0)
    t = trainer([e], optimizer='noisy_sgd', noise=.01, noise_decay=.5).fit(2)
    assert t.optimizer.param_groups[0]['noise'] == e.base.optimizer.param_groups[0]['noise'] == .01

def test_expand_at_once():
    "Before the first step"
    e = Expand([0], factor=3, probe=16)
    t = trainer([e]).fit(1)
    assert t.model.sizes()['hidden_sizes'] == (18, 24) and [r['epoch'] for r in e.rows.where(layer='all', metric='clone_r2')] == [0, 1]

def test_compare():
    data = small_data()
    net = make_model('vit', data.shape, 10, seed=0, embed_dim=8, depth=1, num_heads=2)
    base, c = copy.deepcopy(net), clone(net, 2)
    table = compare(c, base, data.probe(32))
    assert {r['layer'] for r in table} >= {'blocks.0.attn.q', 'blocks.0.mlp.act', 'patch', 'all'} and 'head' not in table.column('layer')
    ones = table.where(metric='clone_r2') + table.where(metric='backward_clone_r2') + table.where(metric='activation_similarity')
    assert all(abs(r['value'] - 1) < 1e-5 for r in ones)
    assert all(p.grad is None for p in net.parameters()) and not net.head._forward_hooks
    with pytest.raises(ValueError, match='layers'): compare(c, base, data.probe(32), layers='head')

class Experiment:
    "What `cloning` asks of an experiment"
    def __init__(self, folder, resume=None):
        self.folder, self.config, self.dry = folder, dict(resume=resume), False
        self.data = small_data()
        self.model = make_model('mlp', self.data.shape, 10, seed=0, hidden_sizes=(6, 6), normalization='batch', dropout=.1)
    def options(self, group): return dict(metrics_frequency=1, probe=32)
    def epochs(self, n): return n
    def growth(self): return None
    def trainer(self, **options):
        from plasticity.training import Checkpoint
        return Trainer(self.model, self.data, optimizer='noisy_sgd', lr=.05, momentum=.9, device='cpu',
                       callbacks=[Checkpoint(self.folder), *getattr(self, 'more', [])], **options)

class Stop(Callback):
    "Breaks off a run"
    order = 200
    def __init__(self, step): self.at = step
    def after_step(self, trainer): trainer._interrupted |= trainer.step == self.at

def test_command(tmp_path, monkeypatch):
    options = dict(initial_epochs=1, epochs_per_expansion=2, num_expansions=2, batch_size=32, no_augment=True)
    whole = cloning(Experiment(tmp_path/'whole'), **options)
    assert whole.epoch == 5 and whole.model.sizes()['hidden_sizes'] == (24, 24)
    rows = [json.loads(line) for line in (tmp_path/'whole'/'cloning.jsonl').read_text().splitlines()]
    seen = [(r['epoch'], r['expansions']) for r in rows if r['layer'] == 'all' and r['metric'] == 'clone_r2']
    assert seen == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    for stop in (2, 4, 6, 9, 17, 'base'):
        e = Experiment(tmp_path/f'{stop}')
        e.more = [Stop(stop)]
        with monkeypatch.context() as m:
            if stop == 'base': m.setattr(Until, 'after_step', lambda self, trainer: setattr(trainer, '_interrupted', trainer.step == 11))
            with pytest.raises(KeyboardInterrupt): cloning(e, **options)
        e = Experiment(tmp_path/f'{stop}', resume=str(tmp_path/f'{stop}'))
        e.more = [Stop(-1)]
        t = cloning(e, **options)
        for a, b in zip(whole.model.state_dict().values(), t.model.state_dict().values(), strict=True): assert torch.equal(a, b), stop
        again = [json.loads(line) for line in (tmp_path/f'{stop}'/'cloning.jsonl').read_text().splitlines()]
        assert again == rows, stop

def test_escape():
    "One run, and what it reports"
    data = small_data()
    small = dict(hidden_sizes=(6, 6), normalization='batch')
    out = escape(data, 'mlp', small, (1, 2), optimizer='sgd', lr=.05, device='cpu', every=1, probe=32)
    assert out['clone_r2'] > 1 - 1e-6 and out['deviation'] < 1e-6 and out['base_epochs'] == 1 and out['epochs'] == 3
    assert out['r2'][0] == [1, 2, 3] and {'base_loss', 'clone_test_accuracy', 'base_effective_rank', 'clone_r2_joudaki'} <= out.keys()
    assert json.loads(json.dumps(out)) == out
    noisy = escape(data, 'mlp', small, (1, 1), optimizer='noisy_sgd', lr=.05, device='cpu', probe=32)
    assert noisy['clone_r2'] < 1 and noisy['deviation'] > 1e-6

def test_paths():
    'Twins stay one point, and drift with noise'
    gap = {}
    for how in ('sgd', 'noisy_sgd'):
        p = Paths('layers.1.act', (1, 3), probe=32)
        trainer([Expand([1], probe=0), p], optimizer=how).fit(3)
        xy = p.project()['xy']
        assert xy.shape == (2, 16, 2) and (xy[0, ::2] - xy[0, 1::2]).abs().max() < 1e-5
        gap[how] = (xy[1, ::2] - xy[1, 1::2]).norm(dim=-1).max()
    assert gap['sgd'] < 1e-4 < gap['noisy_sgd']

def test_the_star_brings_what_the_page_says():
    names = {}
    exec('from plasticity.cloning import *', names)
    assert {'clone', 'Cloned', 'Expand', 'compare'} <= set(names)

@pytest.mark.parametrize('options, name', [(dict(factor=1), 'factor'), (dict(factor=2.), 'factor'), (dict(heads='foo'), 'heads'),
                                           (dict(at=3), 'at')])
def test_wrong_words_fail_before_the_base_is_trained(options, name):
    with pytest.raises(ValueError, match=f'^{name}: got'): Expand(**dict(at=[1]) | options)

class _ChannelsFirst(nn.Module):
    "Units in the middle, an activation that is measured, and a layer that the loss does not see"
    def __init__(self):
        super().__init__()
        self.c, self.act, self.o, self.aux = nn.Conv1d(2, 6, 3, padding=1), nn.GELU(), nn.Linear(6, 3), nn.Linear(6, 4)
    def forward(self, x):
        h = self.act(self.c(x))
        self.aux(h.mean(-1))
        return self.o(h.mean(-1))

class _Recurrent(nn.Module):
    "A layer that gives a pair"
    def __init__(self):
        super().__init__()
        self.i, self.r, self.o = nn.Linear(5, 8), nn.LSTM(8, 9, batch_first=True), nn.Linear(9, 3)
    def forward(self, x): return self.o(self.r(self.i(x).relu())[0][:, -1])

def test_features_of_layers_of_every_kind():
    torch.manual_seed(0)
    y = torch.randint(3, (4,))
    one = _ChannelsFirst()
    got = features(one, torch.randn(4, 2, 7), y, ['c', 'act', 'aux'])
    assert [got[k][0].shape[1] for k in ('c', 'act', 'aux')] == [6, 6, 4] and not got['aux'][1].any() and got['act'][1].any()
    two = _Recurrent()
    h, g = features(two, torch.randn(4, 6, 5), y, ['r'])['r']
    assert h.shape == g.shape == (24, 9) and (g.view(4, 6, 9)[:, :-1] == 0).all() and g.view(4, 6, 9)[:, -1].any()
    assert not any(m._forward_hooks for net in (one, two) for m in net.modules())
    cloned = clone(_ChannelsFirst().eval(), 2, examples=torch.randn(4, 2, 7))
    rows = compare(cloned, None, (torch.randn(4, 2, 7), y))
    assert [r['value'] for r in rows.where(metric='clone_r2')] == [pytest.approx(1)]*len(rows.where(metric='clone_r2'))
