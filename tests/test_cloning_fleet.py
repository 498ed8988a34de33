"Fleets: networks side by side are what they would be alone; the race from start to end"
import copy, json, time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.cloning import deviation
from plasticity.data import Data, get_data
from plasticity.fleet import Clock, FleetSGD, FleetTrainer, Orders, Watch, clones, products, race
from plasticity.models import make_model
from plasticity.results import generator
from plasticity.training import Trainer

torch.set_num_threads(1)

SMALL = dict(mlp=dict(hidden_sizes=(6, 8), normalization='batch'), cnn=dict(channels=(4, 4), hidden_sizes=(6,), normalization='batch'),
             resnet=dict(depth=10, channels=4, blocks=(1, 1)), vit=dict(embed_dim=8, depth=1, num_heads=2))

def images(n=96, test=32, seed=0):
    g = generator(seed, 'images')
    def part(n): return torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8), torch.randint(0, 5, (n,), generator=g)
    return Data('images', *part(n), *part(test), augment=('crop', 'flip'))

@settings(max_examples=25, deadline=None)
@given(n=st.integers(10, 90), size=st.integers(1, 10), ahead=st.integers(1, 5), start=st.integers(0, 3), epoch=st.integers(0, 3))
def test_orders(n, size, ahead, start, epoch):
    "Each seed's full batches, augmented, from any batch on"
    d, seeds = images(n, 8), (2, 7)
    o = Orders(d, seeds, ahead)
    got = list(o.batches(size, epoch=epoch, start=min(start, o.n_batches(size)), augment=True))
    assert len(got) == o.n_batches(size) - min(start, o.n_batches(size)) and o.n_batches(size) == n//size
    for i, s in enumerate(seeds):
        alone = [b for b in d.batches(size, seed=s, epoch=epoch, augment=True) if len(b[1]) == size][start:]
        assert all(torch.equal(g[0][i], a[0]) and torch.equal(g[1][i], a[1]) for g, a in zip(got, alone, strict=True))
    assert [len(y) for _, y in o.batches(3, 'test', shuffle=False)] == [3, 3, 2]

@pytest.mark.parametrize('name', SMALL)
def test_as_alone(name):
    "A network of a fleet ends where a trainer of its own ends"
    d, seeds = images(), (1, 4)
    def make(s, **options): return make_model(name, d.shape, d.num_classes, seed=s, **SMALL[name] | options)
    shapes = [dict(), dict(activation='tanh'), dict()]
    f = FleetTrainer([make(s, **o) for s, o in enumerate(shapes)], Orders(d, seeds), [dict(lr=.1), dict(lr=.02), dict(lr=.1)], [0, 1, 1],
                     batch_size=32, augment=True, device='cpu').fit(2)
    test = f.evaluate()
    for i, o in enumerate(shapes):
        t = Trainer(make(i, **o), d, 'sgd', lr=[.1, .02, .1][i], batch_size=32, augment=True, seed=seeds[[0, 1, 1][i]], device='cpu').fit(2)
        for a, b in zip(f.model[i].state_dict().values(), t.model.state_dict().values(), strict=True): torch.testing.assert_close(a, b)
        row = next(r for r in t.history[::-1] if r['split'] == 'train')
        assert f.history.last('losses')[i] == pytest.approx(row['loss'], rel=1e-5)
        assert f.history.last('accuracies')[i] == row['accuracy']
        assert test['accuracies'][i] == t.evaluate()['accuracy'] and test['losses'][i] == pytest.approx(t.evaluate()['loss'], rel=1e-4)

def test_noise():
    "Mean and size of the noise, tensor by tensor; it decays; without noise the step is SGD's, bit for bit"
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100).to(memory_format=torch.contiguous_format))
    grads = [torch.randn(p.shape, generator=g)*(i + 1) for i, p in enumerate(net.parameters())]
    opt, before = FleetSGD([net], [dict(lr=.5, noise=.02, noise_decay=.9)]), copy.deepcopy(net)
    with torch.random.fork_rng(): torch.manual_seed(3); opt.update(0, grads)
    for p, q, d in zip(net.parameters(), before.parameters(), grads, strict=True):
        z = ((q - p)/.5 - d)/(.02*d.norm())
        assert abs(z.mean()) < 5/z.numel()**.5 and abs(z.std() - 1) < 4/z.numel()**.5
    assert opt.param_groups[0]['left'].item() == pytest.approx(.018)
    plain, other = copy.deepcopy(before), copy.deepcopy(before)
    for p, d in zip(plain.parameters(), grads, strict=True): p.grad = d.clone()
    torch.optim.SGD(plain.parameters(), lr=.1).step()
    FleetSGD([other], [dict(lr=.1)]).update(0, grads)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))

def test_noise_in_any_layout():
    "Noise of gradients whose memory lies otherwise"
    net = nn.Conv2d(8, 8, 3, bias=False).to(memory_format=torch.channels_last)
    before, d = net.weight.detach().clone(), torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)
    FleetSGD([net], [dict(lr=1., noise=.01, noise_decay=0.)]).update(0, [d])
    z = (before - net.weight.detach() - d)/(.01*d.norm())
    assert .8 < z.std() < 1.2 and net.weight.is_contiguous(memory_format=torch.channels_last)
    for d in (torch.randn(6, 5).T, torch.ones(1).expand(5, 6)): # turned; every entry the same place
        lin = nn.Linear(6, 5, bias=False)
        FleetSGD([lin], [dict(lr=1., noise=.01, noise_decay=0.)]).update(0, [d])
        assert lin.weight.unique().numel() == 30

def test_one_noisy_step():
    "A decay of 0 leaves one noisy step"
    net, grads = nn.Linear(5, 5), [torch.ones(5, 5), torch.ones(5)]
    opt = FleetSGD([net], [dict(lr=1., noise=.1, noise_decay=0.)])
    opt.update(0, grads)
    assert (net.weight[0] - net.weight[1]).abs().max() > 0
    before = net.weight.detach().clone()
    opt.update(0, grads)
    assert torch.equal(net.weight, before - 1)

@pytest.mark.parametrize('name', SMALL)
def test_clones(name):
    "The repeated edit gives what the edit gives: the function stays and copies are copies"
    d = images()
    nets = [make_model(name, d.shape, d.num_classes, seed=s, **SMALL[name]).double() for s in range(3)]
    kept, x = copy.deepcopy(nets), d.normalize(d.x_train[:8]).double()
    for c, error in clones(nets, 2, x): assert error < 1e-12 and deviation(c) == 0
    for a, b in zip(nets, kept, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert len({c.model.head.weight[0, 0].item() for c, _ in clones(nets, 2, x)}) == 3

def test_race():
    "Three ways, two seeds: who stays, what is reported, and that it can be saved"
    arms = dict(sgd={}, noise=dict(noise=.01, noise_decay=.999), dropout=dict(options=dict(dropout=.2)),
                once=dict(noise=.01, noise_decay=0.))
    out = race(images(), 'cnn', SMALL['cnn'], arms, (0, 5), (1, 3), lr=.05, batch_size=32, augment=True, probe=32, device='cpu')
    rows = out['rows']
    assert [(r['arm'], r['seed']) for r in rows] == [(a, s) for a in arms for s in (0, 5)] and json.loads(json.dumps(out)) == out
    assert (out['base_epochs'], out['epochs'], out['base_steps'], out['steps'], out['engine']) == (1, 3, 3, 9, 'eager')
    for r in rows:
        assert r['start'] < 1e-5 and r['r2_epochs'] == [0, 1, 2, 3] and r['r2'][0] > 1 - 1e-6 and len(r['base_losses']) == 3
        assert (r['clone_r2'] > 1 - 1e-6) == (r['deviation'] < 1e-6) == (r['arm'] == 'sgd')
        assert r['r2'][-1] == pytest.approx(r['clone_r2'], abs=1e-6) and r['base_loss'] == pytest.approx(r['base_losses'][-1], abs=1e-3)
        assert r['clone_parameters'] > 2*r['base_parameters']
    assert abs(rows[0]['base_loss'] - rows[0]['clone_loss']) < .05 and rows[0]['base_loss'] != rows[1]['base_loss']

def test_same_seed_same_numbers():
    "A race is repeatable, and leaves global settings and random numbers alone"
    arms, state = dict(noise=dict(noise=.01, noise_decay=.9), dropout=dict(options=dict(dropout=.2))), torch.get_rng_state()
    def once(): return race(images(), 'mlp', SMALL['mlp'], arms, (3,), (1, 1), batch_size=32, probe=32, device='cpu')['rows']
    assert once() == once() and torch.equal(torch.get_rng_state(), state) and not torch.backends.cudnn.deterministic

def test_clock():
    "Stops before its end, with all networks at the same epoch"
    t, many = time.perf_counter(), (10**6, 10**6)
    out = race(get_data('spirals'), 'mlp', dict(hidden_sizes=(6,)), dict(sgd={}), (0, 1), many, seconds=.6, device='cpu', probe=32)
    assert time.perf_counter() - t < 5 and out['training_seconds'] < 2 and out['epochs'] > 1 and out['base_epochs'] > 0
    f = FleetTrainer([nn.Linear(2, 2)], Orders(get_data('spirals'), [0]), [{}], device='cpu', callbacks=[Clock(0.)]).fit(5)
    assert f.epoch == 1

def test_watch():
    "Measurements grow rarer"
    d = get_data('spirals')
    nets = [make_model('mlp', d.shape, 2, hidden_sizes=(4,), seed=0)]
    (c, _), = clones(nets, 2, d.normalize(d.x_train[:8]))
    w = Watch([c], [d.probe(16)], growth=2)
    FleetTrainer([*nets, c.model], Orders(d, [0]), [{}]*2, device='cpu', callbacks=[w], batch_size=400).fit(20)
    assert w.epochs == [0, 1, 2, 4, 8, 16] and all(abs(r[0][0] - 1) < 1e-6 for r in w.r2)

def test_wrong():
    d = get_data('spirals')
    def fleet(**options): return FleetTrainer([nn.Linear(2, 2)], Orders(d, [0]), [{}], **dict(device='cpu') | options)
    with pytest.raises(ValueError, match='engine'): fleet(engine='vmap')
    with pytest.raises(ValueError, match='precision'): fleet(precision='fp16')
    with pytest.raises(ValueError, match='samples'): fleet(batch_size=10**5)
    with pytest.raises(ValueError, match='settings'): FleetSGD([nn.Linear(2, 2)], [dict(momentum=.9)])

def test_bf16_and_regression():
    "Other precisions and tasks"
    d = get_data('synthetic_regression')
    f = FleetTrainer([nn.Linear(10, 1), nn.Linear(10, 1)], Orders(d, [0]), [dict(lr=.05)]*2, device='cpu', precision='bf16').fit(8)
    losses = f.history.column('losses')
    assert max(losses[-1]) < .3*min(losses[0]) and set(f.evaluate()) == {'losses'}
    with products('ieee'): assert torch.backends.cudnn.deterministic and torch.backends.cuda.matmul.fp32_precision == 'ieee'
    assert not torch.backends.cudnn.deterministic

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('engine', ['graph', 'chain', 'eager'])
def test_engines(engine):
    "A recorded step does what the eager one does"
    d, nets = images(), [make_model('cnn', (3, 8, 8), 5, seed=s, **SMALL['cnn']) for s in range(3)]
    alone = copy.deepcopy(nets)
    f = FleetTrainer(nets, Orders(d, [0]), [dict(lr=.05)]*3, engine=engine, batch_size=32, device='cuda').fit(3)
    assert f.engine == engine, f.reason
    ref = FleetTrainer(alone, Orders(d, [0]), [dict(lr=.05)]*3, batch_size=32, device='cpu').fit(3)
    for p, q in zip(f.model.parameters(), ref.model.parameters(), strict=True): torch.testing.assert_close(p.cpu(), q, rtol=1e-2, atol=1e-4)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name, precision', [('mlp', 'float32'), ('cnn', 'bf16'), ('resnet', 'bf16'), ('vit', 'bf16')])
def test_race_on_a_gpu(name, precision):
    "Recorded, in low precision: plain SGD stays, noise and dropout leave; the noise decays and differs from step to step"
    arms = dict(sgd={}, noise=dict(noise=.01, noise_decay=.99), dropout=dict(options=dict(dropout=.2)))
    layers = ['*.mlp.act', '*.attn.proj'] if name == 'vit' else '*.act'
    out = race(images(256), name, SMALL[name], arms, (0, 1), (2, 6), lr=.05, batch_size=32, augment=True, probe=32, layers=layers,
               precision=precision, device='cuda')
    assert out['engine'] == 'graph', out['reason']
    for r in out['rows']:
        assert r['start'] < 1e-4 and r['r2'][0] > 1 - 1e-5 and (r['clone_r2'] > 1 - 1e-5) == (r['arm'] == 'sgd'), r
        assert len(set(r['clone_losses'])) > 1

def test_products_leaves_no_mixed_settings():
    "PyTorch raises when it is asked for TF32 and cuDNN's kinds differ"
    for how in ('tf32', 'ieee'):
        before = torch.backends.cudnn.allow_tf32
        with products(how): assert torch.backends.cudnn.allow_tf32 == (how == 'tf32')
        assert torch.backends.cudnn.allow_tf32 == before
