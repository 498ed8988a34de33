"Many networks trained as one"
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.continual import continual
from plasticity.data import get_data
from plasticity.member_optimizers import MemberAdam, MemberAdamW, MemberSGD, clip_members, hashed_normal, mix
from plasticity.models import CNN, MLP
from plasticity.population import MemberMonitors, Population, PopulationTrainer, Step, own_orders
from plasticity.results import seeded
from plasticity.sparse import random_layer
from plasticity.streams import make_stream
from plasticity.training import Callback, NoisySGD, Trainer

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

@pytest.fixture(scope='module')
def data(): return get_data('digits').subset(train=150, test=60)

MODELS = dict(
    mlp=lambda: MLP(64, 10, hidden_sizes=(23, 17)),
    layer_norm=lambda: MLP(64, 10, hidden_sizes=(23,), normalization='layer', activation='tanh'),
    batch_norm=lambda: MLP(64, 10, hidden_sizes=(23,), normalization='batch'),
    dropout=lambda: MLP(64, 10, hidden_sizes=(23,), dropout=.3),
    cnn=lambda: CNN((1, 8, 8), 10, channels=(4, 6), hidden_sizes=(9,)))

def made(make, seed):
    with seeded(seed, 'model'): return make()

def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

def largest_gap(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))

def train(data, make, seeds, optimizer='sgd', engine='auto', epochs=2, own=True, **options):
    pop = Population(make, seeds=seeds, engine=engine)
    t = PopulationTrainer(pop, own_orders(data, pop) if own else data, optimizer, batch_size=16, device='cpu', **options)
    t.fit(epochs)
    return t

def alone(data, make, seed, optimizer='sgd', epochs=2, **options):
    t = Trainer(made(make, seed), data, optimizer, batch_size=16, device='cpu', seed=seed, **options)
    return t.fit(epochs)

# bit for bit on the CPU ---------------------------------------------------

@pytest.mark.parametrize('model', MODELS)
def test_member_is_the_network_alone(data, model):
    t = train(data, MODELS[model], [3, 8, 1], lr=.05, momentum=.9)
    for i, seed in enumerate([3, 8, 1]):
        one = alone(data, MODELS[model], seed, lr=.05, momentum=.9)
        assert same(t.model.member(i), one.model)
        for key in ('loss', 'accuracy'):
            many = dict(loss='losses', accuracy='accuracies')[key]
            assert [r[many][i] for r in t.history] == [r[key] for r in one.history]

OPTIONS = dict(
    sgd=dict(lr=[.1, .01, .03], momentum=[0., .9, .5], weight_decay=[0., 1e-2, 1e-3]),
    nesterov=dict(optimizer='sgd', lr=.05, momentum=.9, nesterov=True),
    schedule=dict(optimizer='sgd', lr=[.1, .01, .03], schedule='cosine', warmup=3),
    adam=dict(lr=[1e-2, 1e-3, 3e-3], weight_decay=[0., 0., .1]),
    adamw=dict(lr=[1e-2, 1e-3, 3e-3], weight_decay=.1),
    noisy_sgd=dict(lr=.05, noise=[.01, .1, .03]),
    clip=dict(optimizer='sgd', lr=.1, clip=.5),
    accumulate=dict(optimizer='sgd', lr=.1, accumulate=3))

@pytest.mark.parametrize('name', OPTIONS)
def test_settings_are_each_members_own(data, name):
    options = dict(optimizer=name) | OPTIONS[name]
    t = train(data, MODELS['mlp'], [0, 1, 2], **options)
    for i in range(3):
        mine = {k: v[i] if isinstance(v, list) else v for k, v in options.items()}
        assert same(t.model.member(i), alone(data, MODELS['mlp'], i, **mine).model)

@pytest.mark.parametrize('model', ['mlp', 'dropout'])
def test_neighbours_do_not_matter(data, model):
    runs = [train(data, MODELS[model], s, lr=.05) for s in ([4], [4, 5], [9, 2, 7, 4])]
    a, b, c = runs[0].model.member(0), runs[1].model.member(0), runs[2].model.member(3)
    assert same(a, b) and same(a, c)

def test_a_diverging_neighbour_does_not_matter(data):
    t = train(data, MODELS['mlp'], [0, 1], lr=[1e9, .05], epochs=1)
    assert not all(p.isfinite().all() for p in t.model.member(0).parameters())
    assert same(t.model.member(1), alone(data, MODELS['mlp'], 1, lr=.05, epochs=1).model)

def test_shared_orders(data):
    t = train(data, MODELS['mlp'], [0, 1], lr=.05, own=False, seed=11)
    one = Trainer(made(MODELS['mlp'], 1), data, 'sgd', lr=.05, batch_size=16, device='cpu', seed=11).fit(2)
    assert same(t.model.member(1), one.model)

# the fast engine: float noise ------------------------------------------------

@pytest.mark.parametrize('model, optimizer', [('mlp', 'sgd'), ('layer_norm', 'sgd'), ('batch_norm', 'sgd'), ('cnn', 'sgd'),
                                              ('mlp', 'adam'), ('cnn', 'adam')])
def test_vmapped_members_are_close(data, model, optimizer):
    t = train(data, MODELS[model], [3, 8], optimizer, 'vmap', epochs=1, lr=.01)
    for i, seed in enumerate([3, 8]):
        one, start = alone(data, MODELS[model], seed, optimizer, epochs=1, lr=.01).model, made(MODELS[model], seed)
        assert t.model.running == 'vmap'
        moved = largest_gap(start, one)
        assert largest_gap(t.model.member(i), one) < 1e-3*moved

def test_vmapped_neighbours_do_not_matter_beyond_noise(data):
    a, b = train(data, MODELS['mlp'], [4], 'sgd', 'vmap', lr=.05), train(data, MODELS['mlp'], [9, 2, 7, 4], 'sgd', 'vmap', lr=.05)
    assert largest_gap(a.model.member(0), b.model.member(3)) < 1e-5

def test_vmapped_noise_does_not_depend_on_neighbours(data):
    a, b = (train(data, MODELS['mlp'], s, 'sgd', 'vmap', lr=.01, noise=.1, epochs=1) for s in ([4], [9, 4]))
    c = train(data, MODELS['mlp'], [4], 'sgd', 'vmap', lr=.01, epochs=1)
    assert largest_gap(a.model.member(0), b.model.member(1)) < 1e-5 < 1e-3 < largest_gap(a.model, c.model)

# optimizers --------------------------------------------------------------------

setting = st.lists(st.floats(0, 1), min_size=3, max_size=3)

@settings(deadline=None, max_examples=30)
@given(lr=setting, momentum=setting, decay=setting, nesterov=st.booleans(), seed=st.integers(0, 99))
def test_sgd_is_torchs(lr, momentum, decay, nesterov, seed):
    check(lambda p: MemberSGD(p, lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov), seed,
          lambda p, i: torch.optim.SGD(p, lr[i], momentum[i], weight_decay=decay[i], nesterov=nesterov and momentum[i] > 0))

@settings(deadline=None, max_examples=30)
@given(lr=setting, decay=setting, decoupled=st.booleans(), seed=st.integers(0, 99))
def test_adam_is_torchs(lr, decay, decoupled, seed):
    ours, theirs = (MemberAdamW, torch.optim.AdamW) if decoupled else (MemberAdam, torch.optim.Adam)
    check(lambda p: ours(p, lr=lr, weight_decay=decay), seed, lambda p, i: theirs(p, lr[i], weight_decay=decay[i]))

def check(many, seed, one, steps=4):
    g = torch.Generator().manual_seed(seed)
    stacked = [nn.Parameter(torch.randn(3, *s, generator=g)) for s in ((7, 5), (5,), ())]
    singles = [[nn.Parameter(p[i].detach().clone()) for p in stacked] for i in range(3)]
    a, bs = many(stacked), [one(s, i) for i, s in enumerate(singles)]
    for _ in range(steps):
        for j, p in enumerate(stacked):
            p.grad = torch.randn(p.shape, generator=g)
            for i in range(3): singles[i][j].grad = p.grad[i].clone()
        a.step()
        for b in bs: b.step()
    for j, p in enumerate(stacked):
        for i in range(3): assert torch.equal(p[i], singles[i][j])

def test_l2_init_by_hand():
    p = nn.Parameter(torch.tensor([[1.], [2.]]))
    opt = MemberSGD([p], lr=.1, l2_init=[0., .5])
    for _ in range(2): p.grad = torch.ones(2, 1); opt.step()
    assert torch.allclose(p.flatten(), torch.tensor([.8, 2 - .1 - .1*(1 - .5*.1)]))

def test_noise_per_tensor_and_element():
    for per in ('tensor', 'element'):
        pop = Population(lambda: nn.Linear(3, 2), 2)
        one = pop.member(1)
        for p in pop.parameters(): p.grad = torch.ones_like(p)*2
        for p in one.parameters(): p.grad = torch.ones_like(p)*2
        with seeded(1, 'fit'): NoisySGD(one.parameters(), lr=.1, noise=.3, noise_decay=1., per=per).step()
        MemberSGD(pop.parameters(), lr=.1, noise=.3, per=per, population=pop).step()
        assert same(pop.member(1), one)

def test_settings_that_make_no_sense():
    p = [nn.Parameter(torch.zeros(3, 2))]
    with pytest.raises(ValueError, match='lr: got shape'): MemberSGD(p, lr=[.1, .2])
    for bad in (float('nan'), float('inf')):
        for lr in (bad, [.1, bad, .1]):
            with pytest.raises(ValueError, match=f'lr: got {bad}'): MemberSGD(p, lr=lr)
    with pytest.raises(ValueError, match='momentum: got -1'): MemberSGD(p, lr=.1, momentum=[0, 0, -1])
    with pytest.raises(ValueError, match='betas'): MemberAdam(p, betas=(.9, 1.))
    with pytest.raises(ValueError, match='stacked'): MemberSGD([*p, nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="per: got 'row'"): MemberSGD(p, per='row')

def test_clip_is_per_member():
    g = [[torch.randn(4, 3, 2), None], [torch.randn(4, 5)*torch.tensor([[1e6], [1.], [1e-3], [1.]])]]
    out = clip_members(g, 1.)
    for i in range(4):
        ps = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5))]
        ps[0].grad, ps[1].grad = g[0][0][i].clone(), g[1][0][i].clone()
        nn.utils.clip_grad_norm_(ps, 1., foreach=False)
        assert torch.equal(out[0][0][i], ps[0].grad) and torch.equal(out[1][0][i], ps[1].grad)

def test_hash_fills_its_range():
    h = mix(torch.arange(200_000))
    assert h.min() >= 0 and h.max() < 2**32 and h.unique().numel() == 200_000
    bits = torch.stack([(h >> k & 1).float().mean() for k in range(32)])
    assert (bits - .5).abs().max() < .01
    a, b = hashed_normal(torch.tensor([5]), 3, (1000,)), hashed_normal(torch.tensor([9, 5]), 3, (1000,))
    assert torch.equal(a[0], b[1]) and not torch.equal(a[0], b[0]) and not torch.equal(a, hashed_normal(torch.tensor([5]), 4, (1000,)))

# members --------------------------------------------------------------------

def test_members_in_and_out():
    pop = Population(MODELS['batch_norm'], 3)
    m = pop.member(1)
    assert len(pop) == 3 and len(list(pop)) == 3 and same(m, made(MODELS['batch_norm'], 1)) and m.training
    with torch.no_grad():
        for p in m.parameters(): p.add_(1)
    m.layers[0].norm.running_mean.fill_(7)
    assert not same(m, pop.member(1))
    before = pop.member(2)
    pop.set_member(1, m)
    assert same(pop.member(1), m) and same(pop.member(2), before)
    pop.eval()
    assert not any(k.training for k in pop.member(0).modules())
    with pytest.raises(IndexError, match='member from 0 to 2'): pop.member(3)
    with pytest.raises(ValueError, match='layers.0.linear.weight is'):
        pop.set_member(0, MLP(64, 10, hidden_sizes=(24,), normalization='batch'))

def test_tied_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)
        def forward(self, x): return self.b(torch.tanh(self.a(x)))
    x, y = torch.randn(6, 4), torch.arange(6) % 4
    for engine in ('loop', 'vmap'):
        pop = Population(Tied, 2, engine=engine)
        ones = list(pop)
        Step(pop, MemberSGD(pop.parameters(), lr=.1))(x, y)
        for i, m in enumerate(ones):
            assert m.b.weight is m.a.weight and not m.a.bias.requires_grad
            F.cross_entropy(m(x), y).backward(); torch.optim.SGD([p for p in m.parameters() if p.requires_grad], .1).step()
            assert largest_gap(m, pop.member(i)) < 1e-6

def test_own_orders_through_a_stream(data, tmp_path):
    "Tasks made of data with own orders hold what the kind makes of it; orders stay from task to task, and on resume"
    pop = Population(MODELS['mlp'], seeds=[3, 8])
    own = own_orders(data, pop)
    for kind in ('permuted', 'random_labels', 'classes'):
        task, plain = make_stream(kind, own, tasks=2)[1].data, make_stream(kind, data, tasks=2)[1].data
        assert torch.equal(task.x_train, plain.x_train) and torch.equal(task.y_train, plain.y_train) and own.seeds == task.seeds
    assert own.data is data and len(data.x_train) == 150
    stream, options = make_stream('permuted', data, tasks=2), dict(batch_size=16, device='cpu', eval_every=0)
    def begin(): return PopulationTrainer(Population(MODELS['mlp'], seeds=[3, 8]), own_orders(data, pop), **options)
    whole = continual(begin(), stream, 2).trainer
    class Stop(Callback):
        order, at = 95, 1
        def after_epoch(self, trainer): trainer.stop = trainer.stop or trainer.epoch == self.at
    cut = begin()
    continual(cut, stream, 2, callbacks=[Stop()])
    cut.save(tmp_path)
    on = Stop()
    on.at = None
    resumed = continual(begin(), stream, 2, callbacks=[on], resume=tmp_path).trainer
    for i, seed in enumerate([3, 8]):
        one = continual(Trainer(made(MODELS['mlp'], seed), data, seed=seed, **options), stream, 2).trainer
        assert same(whole.model.member(i), one.model) and same(resumed.model.member(i), one.model)

def test_what_cannot_be_a_population():
    with pytest.raises(ValueError, match='n: got None'): Population(MODELS['mlp'])
    with pytest.raises(ValueError, match='n: got 0'): Population(MODELS['mlp'], 0)
    with pytest.raises(ValueError, match="engine: got 'vmpa'; did you mean 'vmap'"): Population(MODELS['mlp'], 2, engine='vmpa')
    with pytest.raises(ValueError, match='member 1 differs'): Population([MLP(4, 2, hidden_sizes=(3,)), MLP(4, 2, hidden_sizes=(5,))])
    with pytest.raises(ValueError, match='without parameters'): Population(nn.ReLU, 2)
    with pytest.raises(ValueError, match='takes as many'): Population(MODELS['mlp'], 3, seeds=[1, 2])
    with pytest.raises(TypeError, match='takes 2 arguments'): Population(lambda a, b: MLP(4, 2), 2)
    assert same(Population(lambda seed: made(MODELS['mlp'], seed), seeds=[5, 6]).member(1), made(MODELS['mlp'], 6))

def test_members_that_compute_otherwise_are_refused():
    "Activations, options and what learns are member 0's for all: what differs there is named"
    def net(act, p=0., frozen=False):
        m = nn.Sequential(nn.Linear(6, 4), act, nn.Dropout(p), nn.Linear(4, 2))
        m[0].weight.requires_grad_(not frozen)
        return m
    for a, b, off in ((net(nn.ReLU()), net(nn.Tanh()), '1.type .Tanh, not ReLU'),
                      (net(nn.LeakyReLU(.1)), net(nn.LeakyReLU(.9)), '1.negative_slope'),
                      (net(nn.ReLU(), .1), net(nn.ReLU(), .9), '2.p'),
                      (net(nn.ReLU()), net(nn.ReLU(), frozen=True), 'requires_grad of 0.weight'),
                      *((MLP(6, 2, (3,)), MLP(6, 2, (3,), activation=k), 'layers.0.act.type') for k in ('tanh', 'gelu'))):
        with pytest.raises(ValueError, match=f'member 1 differs from member 0 in {off}'): Population([a, b])
    pop = Population([net(nn.ReLU(), .1) for _ in range(2)])
    with pytest.raises(ValueError, match='2.p is 0.9'): pop.set_member(1, net(nn.ReLU(), .9))
    pop.net[0].weight.requires_grad_(False)
    pop.set_member(0, pop.member(1).eval())
    sparse = Population([random_layer(6, 5, .7, seed=s) for s in range(2)])
    assert torch.equal(sparse(torch.eye(6))[1], random_layer(6, 5, .7, seed=1)(torch.eye(6)))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)
    def forward(self, x): return self.head(self.rnn(x.view(len(x), 8, 8))[0][:, -1])

class Branching(nn.Module):
    def __init__(self): super().__init__(); self.head = nn.Linear(64, 10)
    def forward(self, x):
        h = self.head(x.flatten(1))
        return h if h.sum() > 0 else -h

class Peeking(nn.Module):
    "Gives other numbers when it sees a batched tensor"
    def __init__(self): super().__init__(); self.head = nn.Linear(64, 10)
    def forward(self, x): return self.head(x.flatten(1))*(2 if torch._C._functorch.is_batchedtensor(self.head.weight) else 1)

@pytest.mark.parametrize('model, why', [(Recurrent, 'Batching rule'), (Branching, 'control flow'), (Peeking, 'other outputs')])
@pytest.mark.parametrize('engine', ['auto', 'vmap'])
def test_plain_loop_says_why(data, model, why, engine):
    with pytest.warns(UserWarning, match=why): t = train(data, model, [0, 1], engine=engine, epochs=1, lr=.05)
    assert t.model.running == 'loop' and why in repr(t.model)
    assert same(t.model.member(1), alone(data, model, 1, epochs=1, lr=.05).model)

def test_trying_leaves_no_trace():
    for make in (MODELS['batch_norm'], MODELS['dropout']):
        pop, x = Population(make, 2, engine='vmap'), torch.randn(5, 64)
        before, state = [m for m in pop], torch.get_rng_state()
        pop._try(x, False)
        assert torch.equal(state, torch.get_rng_state()) and all(same(a, b) for a, b in zip(before, pop, strict=True)) and pop.training

# in the loop ----------------------------------------------------------------

RESUMED = [('dropout', 'adam', 'loop'), ('batch_norm', 'noisy_sgd', 'loop'), ('dropout', 'adam', 'vmap')]

@pytest.mark.parametrize('model, optimizer, engine', RESUMED)
def test_stopped_and_resumed(data, tmp_path, model, optimizer, engine):
    def new():
        pop = Population(MODELS[model], 2, engine=engine)
        return PopulationTrainer(pop, own_orders(data, pop), optimizer, lr=[.01, .02], batch_size=16, device='cpu')
    through, stopped = new(), new()
    through.fit(2)
    stopped.fit(epochs=2, steps=7).save(tmp_path)
    resumed = new()
    resumed.load(tmp_path).fit()
    assert same(through.model, resumed.model) and list(through.history) == list(resumed.history)

def test_callbacks_and_rows(data):
    class Count(Callback):
        def __init__(self): self.events = []
        def after_forward(self, t): self.events.append(('forward', tuple(t.logits.shape)))
        def after_backward(self, t): self.events.append(('backward', tuple(t.model.net.head.weight.grad.shape)))
    c = Count()
    t = train(data, MODELS['mlp'], [0, 1], epochs=1, callbacks=[c], eval_every=0, lr=.1)
    assert c.events[:2] == [('forward', (2, 16, 10)), ('backward', (2, 10, 17))]
    row = t.history[-1]
    a, b = row['losses']
    assert row['loss'] == pytest.approx((a + b)/2) and row['loss_sd'] == pytest.approx(abs(a - b)/2)
    assert t.predict('test').shape == (2, 60, 10)
    for i in range(2): assert torch.equal(t.predict('test')[i], Trainer(t.model.member(i), data, device='cpu').predict('test'))

def test_regression():
    d = get_data('synthetic_regression').subset(train=100, test=20)
    t = train(d, lambda: MLP(d.shape, d.num_classes, hidden_sizes=(8,)), [0, 1], lr=.01)
    one = alone(d, lambda: MLP(d.shape, d.num_classes, hidden_sizes=(8,)), 1, lr=.01)
    assert same(t.model.member(1), one.model) and t.history[-1]['losses'][1] == one.history[-1]['loss']

def test_what_would_couple_members_is_refused(data):
    pop = Population(MODELS['mlp'], 2)
    with pytest.raises(ValueError, match='fp16'): PopulationTrainer(pop, data, precision='fp16', device='cpu')
    with pytest.raises(ValueError, match="no 'lbfgs'"): PopulationTrainer(pop, data, 'lbfgs', device='cpu')
    with pytest.raises(ValueError, match='optimizer: got'): PopulationTrainer(pop, data, torch.optim.LBFGS, device='cpu')
    with pytest.raises(TypeError, match='takes a Population'): PopulationTrainer(MODELS['mlp'](), data, device='cpu')
    with pytest.raises(ValueError, match='orders for 3 members'):
        PopulationTrainer(pop, own_orders(data, Population(MODELS['mlp'], 3)), device='cpu')

def test_several_steps_in_one_call():
    x, y = torch.randn(3, 8, 64), torch.randint(0, 10, (3, 8))
    a, b = Population(MODELS['mlp'], 2), Population(MODELS['mlp'], 2)
    one, three = Step(a, MemberAdam(a.parameters())), Step(b, MemberAdam(b.parameters()), steps=3)
    losses = torch.stack([one(u, v) for u, v in zip(x, y, strict=True)])
    assert torch.equal(three(x, y), losses) and same(a, b)

@cuda
@pytest.mark.parametrize('optimizer', [lambda p: MemberSGD(p, lr=[.1, .01], momentum=.9), lambda p: MemberAdam(p, lr=[1e-2, 1e-3])])
def test_captured_step_is_the_eager_step(optimizer):
    x, y = torch.randn(5, 8, 64, device='cuda'), torch.randint(0, 10, (5, 8), device='cuda')
    out = []
    for capture in (False, True):
        pop = Population(MODELS['batch_norm'], 2, device='cuda')
        step = Step(pop, optimizer(pop.parameters()), capture=capture)
        losses = [step(u, v).clone() for u, v in zip(x, y, strict=True)]
        out.append((torch.stack(losses), pop))
    assert torch.allclose(out[0][0], out[1][0], atol=1e-5) and largest_gap(out[0][1], out[1][1]) < 1e-5

@cuda
def test_captured_training_is_the_network_alone_up_to_noise(data):
    pop = Population(MODELS['mlp'], 3)
    t = PopulationTrainer(pop, own_orders(data, pop), 'sgd', lr=[.1, .05, .02], schedule='cosine', batch_size=16, device='cuda').fit(2)
    one = Trainer(made(MODELS['mlp'], 1), data, 'sgd', lr=.05, schedule='cosine', batch_size=16, device='cuda', seed=1).fit(2)
    assert t._steps and largest_gap(t.model.member(1), one.model) < 1e-4

def test_monitors_change_nothing(data):
    for engine in ('loop', 'vmap'):
        plain, watched = (Population(MODELS['dropout'], 2, engine=engine) for _ in range(2))
        watch = MemberMonitors(watched, [1], every=4, layers='*.act')
        for pop, calls in ((plain, []), (watched, [watch])):
            PopulationTrainer(pop, own_orders(data, pop), 'sgd', lr=.05, batch_size=16, device='cpu', callbacks=calls).fit(1)
        assert same(plain, watched) and watch[1].measured == 3 and watch[1]['layers.0.act'].n == 48

def test_monitor_sees_the_member(data):
    from plasticity.monitors import Monitor
    pop, one = Population(MODELS['mlp'], seeds=[3, 8]), made(MODELS['mlp'], 8)
    watch, alone = MemberMonitors(pop, [1], every=2, layers='*.act'), Monitor(one, every=2, layers='*.act')
    PopulationTrainer(pop, own_orders(data, pop), 'sgd', lr=.05, batch_size=16, device='cpu', callbacks=[watch]).fit(1)
    Trainer(one, data, 'sgd', lr=.05, batch_size=16, device='cpu', seed=8, callbacks=[alone]).fit(1)
    a, b = watch[1]['layers.0.act'], alone['layers.0.act']
    assert a.n == b.n and torch.equal(a.sums[:6], b.sums[:6]) and torch.allclose(a.sums, b.sums)

def test_the_one_trainer_takes_a_population(data):
    pop = Population(MODELS['mlp'], 2)
    if '__new__' not in vars(Trainer): pytest.skip('Trainer does not ask for trainer_class')
    t = Trainer(pop, own_orders(data, pop), 'sgd', lr=[.05, .1], batch_size=16, device='cpu').fit(1)
    assert isinstance(t, PopulationTrainer) and type(Trainer(pop.member(0), data, device='cpu')) is Trainer
    assert same(pop.member(1), alone(data, MODELS['mlp'], 1, epochs=1, lr=.1).model)

def test_warnings_are_only_for_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Population(MODELS['mlp'], 2)(torch.randn(3, 64))

def test_a_member_goes_into_models_of_its_shape_alone(data):
    p = Population(lambda: MLP(64, 10, hidden_sizes=(1,)), 2)
    with pytest.raises(ValueError, match='into: its .* has another shape'): p.member(0, into=MLP(64, 10, hidden_sizes=(6,)))
    into = MLP(64, 10, hidden_sizes=(1,))
    assert p.member(1, into=into) is into and same(into, p.member(1))

class Words(nn.Module):
    def __init__(self): super().__init__(); self.e, self.head = nn.Embedding(17, 4, max_norm=1.), nn.Linear(256, 10)
    def forward(self, x): return self.head(self.e(x.flatten(1).long().clamp(0, 16)).flatten(1))

def test_embeddings_with_a_largest_norm(data):
    p = Population(Words, 2)
    PopulationTrainer(p, own_orders(data, p), 'sgd', lr=.1, batch_size=50, device='cpu').fit(2)
    for i in (0, 1):
        alone = made(Words, i)
        Trainer(alone, data, 'sgd', lr=.1, batch_size=50, device='cpu', seed=i).fit(2)
        assert same(alone, p.member(i))

def test_noise_makes_no_links():
    p = Population(lambda: nn.Sequential(nn.Flatten(), random_layer(64, 10, .7)), 2)
    d = get_data('digits').subset(train=60, test=20)
    PopulationTrainer(p, d, 'noisy_sgd', lr=.1, noise=.1, batch_size=20, device='cpu').fit(1)
    layer = p.member(0)[1]
    assert layer.full and not layer.values[~layer.present].any()
