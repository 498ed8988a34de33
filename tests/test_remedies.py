"Remedies: hand-computed steps, members against single networks, all models"
import copy, inspect, math

import pytest
from hypothesis import given, settings, strategies as st
import torch
import torch.nn.functional as F
from torch import nn

from plasticity.data import Data, get_data
from plasticity.edits import Widen
from plasticity.models import CNN, MLP, ResNet, ViT
from plasticity.population import Population, Step, member_optimizer, own_orders
from plasticity.remedies import (REMEDIES, UPGD, ContinualBackprop, CReLU, HareTortoise, HeadReset, L2Init, ReDo, SelfNormalizedResets,
                                 ShrinkPerturb, SpectralRegularization, Switch, WeightClip, WeightDecay, concat_relu, make_remedy, owed,
                                 switch_norm, unit_utility)
from plasticity.replacement import Replace, sites
from plasticity.results import seeded
from plasticity.sparse import random_layer
from plasticity.training import Callback, Trainer, make_optimizer
from plasticity.units import units

DIGITS = get_data('digits')

def net(seed=0, widths=(8, 8), **options):
    with seeded(seed, 'model'): return MLP(DIGITS.shape, 10, widths, **options)

def trained(model, *callbacks, steps=20, optimizer='adam', seed=0, lr=1e-2, batch_size=32, **options):
    return Trainer(model, DIGITS, optimizer, lr=lr, batch_size=batch_size, callbacks=list(callbacks), eval_every=0, seed=seed, device='cpu',
                   **options).fit(steps=steps)

def one_step(model, remedy, x, y, optimizer='sgd', **options):
    "A training step by hand with a remedy; gives the optimizer"
    opt = make_optimizer(optimizer, model.parameters(), lr=.1, **options)
    remedy.attach(model, opt)
    F.cross_entropy(model.train()(x), y).backward()
    opt.step()
    return opt

# ------------------------------------------------------------------ continual backprop

def test_continual_backprop_by_hand():
    "One replacement, every number of it: utility, which unit, incoming, outgoing, next bias, moments, age"
    m, x, y = net(widths=(4,)), torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    first = m.layers[0].linear
    h = F.relu(x @ first.weight.detach().T + first.bias.detach())       # activations come before the step, outgoing weights after it
    cb = ContinualBackprop(rate=.25, maturity=0, examples=x[:2])
    opt = one_step(m, cb, x, y, 'adam')
    before = copy.deepcopy(m.state_dict())
    utility = h.abs().mean(0)*before['head.weight'].abs().sum(0)
    cb.after_step()
    k = utility.argmin().item()
    assert cb.log[-1]['units'] == [k] and cb.log[-1]['group'] == 'layers.0.linear'
    after = m.state_dict()
    others = [i for i in range(4) if i != k]
    assert torch.equal(after['layers.0.linear.weight'][others], before['layers.0.linear.weight'][others])
    assert (after['layers.0.linear.weight'][k] != before['layers.0.linear.weight'][k]).all()
    assert after['layers.0.linear.bias'][k] == 0
    assert (after['head.weight'][:, k] == 0).all() and torch.equal(after['head.weight'][:, others], before['head.weight'][:, others])
    assert torch.allclose(after['head.bias'], before['head.bias'] + before['head.weight'][:, k]*h.mean(0)[k], atol=1e-6)
    for p, at in ((m.layers[0].linear.weight, (k,)), (m.layers[0].linear.bias, (k,)), (m.head.weight, (slice(None), k))):
        for s in ('exp_avg', 'exp_avg_sq'):
            assert (opt.state[p][s][at] == 0).all()
            assert opt.state[p][s].abs().sum() > 0 or p.ndim == 1
    state = cb.state['layers.0.linear']
    assert state['age'][0].tolist() == [0. if i == k else 1. for i in range(4)] and state['replaced'].tolist() == [1]

def test_utility_and_mean_are_bias_corrected():
    "After t steps the running averages divided by 1 - decay^t are the weighted means that they stand for"
    m, seen, weights = net(widths=(5,)), [], []
    class Watch(ContinualBackprop):
        def observe(self):
            super().observe()
            seen.append(self.seen(self.sites[0])[0].clone()); weights.append(self.outgoing(self.sites[0])[0].clone())
    cb = Watch(rate=1e-9, decay=.9)
    trained(m, cb, steps=7)
    w = torch.tensor([.9**(6 - i) for i in range(7)])
    want = sum(a*s[1]*o for a, s, o in zip(w, seen, weights, strict=True))/w.sum()
    mean = sum(a*s[0] for a, s in zip(w, seen, strict=True))/w.sum()
    state, fade = cb.state['layers.0.linear'], 1 - .9**7
    assert torch.allclose(state['utility'][0]/fade, want, rtol=1e-4) and torch.allclose(state['mean'][0]/fade, mean, rtol=1e-4)

@pytest.mark.parametrize('rate, every', [(.01, 1), (.003, 1), (.01, 5), (.3, 1)])
def test_replacement_accumulates_to_rate_x_units_x_steps(rate, every):
    cb = ContinualBackprop(rate=rate, maturity=0, every=every)
    trained(net(widths=(10, 6)), cb, steps=50)
    for name, n in (('layers.0.linear', 10), ('layers.1.linear', 6)):
        got, exposed = cb.state[name]['replaced'].item(), cb.state[name]['exposed'].item()
        assert got == math.floor(rate*exposed*(1 + 1e-6))
        assert got == sum(len(r['units']) for r in cb.log if r['group'] == name)
        assert abs(got - rate*n*50) <= 1 + rate*n*every + .1*rate*n*50  # fresh units do not count in the step they are replaced
    assert owed(torch.tensor(1e-4).double(), torch.tensor(10_000), torch.tensor(0)) == 1

def test_fresh_units_are_protected_until_mature():
    cb = ContinualBackprop(rate=.2, maturity=9)
    trained(net(widths=(10,)), cb, steps=60)
    last = {}
    for r in cb.log:
        for u in r['units']:
            assert r['step'] - last.get(u, 0) > 9
            last[u] = r['step']
    assert len(cb.log) > 5

def test_fresh_weights_are_drawn_like_the_start():
    m = net(widths=(200,))
    sd = m.layers[0].linear.weight.std().item()
    cb = ContinualBackprop(rate=1., maturity=0)
    trained(m, cb, steps=1)
    w = m.layers[0].linear.weight
    assert cb.state['layers.0.linear']['replaced'].item() == 200 and (m.head.weight == 0).all()
    assert abs(w.std().item()/sd - 1) < .02 and abs(w.mean().item()) < .02*sd
    assert len(w[:, 0].unique()) == 200

def test_adaptable_utility_by_hand():
    h, w_in, w_out = torch.tensor([[1., 0.], [3., 0.]]), torch.tensor([[2., -2.], [1., 0.]]), torch.tensor([[1., 5.], [-2., 5.]])
    off = (h - h.mean(0)).abs().mean(0)
    assert unit_utility(off, w_out.abs().sum(0), w_in.abs().mean(1)).tolist() == [1.*3/2, 0.]
    from plasticity.slow_regression import Learners, replace
    s = Learners(['continual backprop'], 1, [0])
    h = torch.rand(1, 5)
    replace(s, h)
    want = unit_utility((h - s.mean/(1 - .99)).abs(), s.v.abs(), s.w[:, :, :-1].abs().mean(2))
    assert torch.allclose(s.utility/.01, want, atol=1e-4)  # one definition: the slowly-changing problem's is the same

def test_a_refusal_names_what_and_why():
    with pytest.raises(ValueError, match='layer_norm over these units'): trained(net(normalization='layer'), ReDo(), steps=1)
    with pytest.raises(ValueError, match='rate'): trained(net(), ContinualBackprop(rate=2.), steps=1)
    with pytest.raises(ValueError, match='contribution'): ContinualBackprop(utility='contribute')
    with pytest.raises(ValueError, match='number of steps'): ContinualBackprop(every='task')
    with pytest.raises(ValueError, match='every'): ReDo(every=0)
    with pytest.raises(ValueError, match='continual_backprop'): make_remedy('continual_backpro')
    vit = ViT((1, 8, 8), 10, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match='heads are no units'): sites(vit, torch.randn(2, 1, 8, 8), 'blocks.0.attn.heads')

# ------------------------------------------------------------------ the other unit remedies

def test_redo_by_hand():
    m, x, y = net(widths=(4,)), torch.randn(6, 64).abs(), torch.arange(6)
    with torch.no_grad(): m.layers[0].linear.weight[2] = -1.  # silent on positive inputs
    r = ReDo(threshold=.1, every=1, examples=x[:2])
    opt = one_step(m, r, x, y, 'adam')
    before = copy.deepcopy(m.state_dict())
    r.observe()
    score = r.scores(r.sites[0])[0]
    seen = r.seen(r.sites[0])[0, 1]
    assert torch.allclose(score, seen/seen.mean()) and score[2] == 0
    r.act()
    assert r.log[-1]['units'] == [i for i in range(4) if score[i] <= .1] and 2 in r.log[-1]['units']
    gone = r.log[-1]['units']
    after = m.state_dict()
    assert (after['head.weight'][:, gone] == 0).all() and torch.equal(after['head.bias'], before['head.bias'])
    assert (after['layers.0.linear.weight'][gone] != before['layers.0.linear.weight'][gone]).all()
    assert (opt.state[m.head.weight]['exp_avg'][:, gone] == 0).all()

def test_self_normalised_resets_by_hand():
    "A unit that fires at every second step is replaced after k silent ones where .5^k <= level"
    m = net(widths=(3,))
    r = SelfNormalizedResets(level=.06, every=1, least=2, most=50, examples=torch.randn(2, 64))
    r.attach(m, torch.optim.SGD(m.parameters(), lr=.1))
    state = r.state['layers.0.linear']
    def tell(*fired):
        r.sites[0].calls = [torch.tensor([[list(map(float, fired))]])]
        r.after_step()
    for i in range(20): tell(1, i % 2, 0)
    assert state['gap'][0, :2].tolist() == [1., 2.] and not r.log
    for _ in range(3): tell(1, 0, 0)
    assert not r.log                                                    # .5^3 = .125
    tell(1, 0, 0); tell(1, 0, 0)
    assert [q['units'] for q in r.log] == [[1]] and r.log[0]['step'] in (24, 25)  # .5^5 = .03, .5^4 = .0625
    for _ in range(30): tell(1, 1, 0)
    assert [q['units'] for q in r.log] == [[1], [2]]                    # never fired: `most`

# ------------------------------------------------------------------ weights

def test_l2_init_and_weight_decay_by_hand():
    x, y = torch.randn(6, 64), torch.arange(6)
    for remedy, extra in ((L2Init(.3), lambda p, p0: .6*(p - p0)), (WeightDecay(.3, decoupled=False), lambda p, p0: .3*p)):
        m = net(); first = [p.detach().clone() for p in m.parameters()]
        opt = one_step(m, remedy, x, y)
        second = [p.detach().clone() for p in m.parameters()]
        opt.zero_grad(); F.cross_entropy(m(x), y).backward()
        grads = [p.grad.clone() for p in m.parameters()]
        opt.step()
        for p, p1, p0, g in zip(m.parameters(), second, first, grads, strict=True):
            assert torch.allclose(p, p1 - .1*(g + extra(p1, p0)), atol=1e-7)
        remedy.detach()
        assert not opt._optimizer_step_pre_hooks

def test_decoupled_weight_decay_is_adamw():
    a, b = net(), net()
    trained(a, WeightDecay(.1), optimizer='adam'); trained(b, optimizer='adamw', weight_decay=.1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

def test_shrink_and_perturb_by_hand():
    m = net(widths=(64, 64)); before = [p.detach().clone() for p in m.parameters()]
    r = ShrinkPerturb(shrink=.5, noise=.01, every=3)
    r.attach(m, torch.optim.SGD(m.parameters(), lr=.1))
    r.after_step(); r.after_step()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True))
    r.after_step()
    z = torch.cat([((p - .5*q)/.01).flatten() for p, q in zip(m.parameters(), before, strict=True)])
    assert abs(z.mean()) < .05 and abs(z.std() - 1) < .05
    once = [p.detach().clone() for p in m.parameters()]
    r.after_step(steps=3)
    again = torch.cat([((p - .5*q)/.01).flatten() for p, q in zip(m.parameters(), once, strict=True)])
    assert abs(torch.corrcoef(torch.stack([z, again]))[0, 1]) < .05   # other noise each time

def test_spectral_regularisation_by_hand():
    m, x, y = net(widths=(16,)), torch.randn(6, 64), torch.arange(6)
    with torch.no_grad(): m.head.bias.fill_(.5)
    plain = net(widths=(16,)); plain.load_state_dict(m.state_dict())
    F.cross_entropy(plain(x), y).backward()
    one_step(m, SpectralRegularization(.1, iterations=200), x, y)
    penalty = sum((torch.linalg.matrix_norm(w, 2)**2 - 1)**2 for w in (plain.layers[0].linear.weight, plain.head.weight))
    (.1*(penalty + plain.head.bias.square().sum() + plain.layers[0].linear.bias.square().sum())).backward()
    for p, q in zip(m.parameters(), plain.parameters(), strict=True): assert torch.allclose(p, q - .1*q.grad, atol=1e-5)

def test_weight_clipping_by_hand():
    m = nn.Sequential(nn.Linear(400, 100), nn.ReLU(), nn.Linear(100, 10))
    r = WeightClip(bound=1.5)
    r.attach(m, torch.optim.SGD(m.parameters(), lr=.1))
    assert abs(r.limits['0.weight'].item()*20 - 1) < .02               # PyTorch draws from +-1/sqrt(400)
    with torch.no_grad(): m[0].weight[0, 0], m[0].bias[3], m[0].weight[1, 1] = 7., -7., .001
    r.after_step()
    limit = 1.5*r.limits['0.weight'].item()
    assert m[0].weight[0, 0].item() == pytest.approx(limit) and m[0].bias[3].item() == pytest.approx(-limit)
    assert m[0].weight[1, 1].item() == pytest.approx(.001)

def test_hare_and_tortoise_by_hand():
    m = net(); first = [p.detach().clone() for p in m.parameters()]
    r = HareTortoise(decay=.75, every=2)
    r.attach(m, torch.optim.SGD(m.parameters(), lr=.1))
    slow = first
    for _ in range(2):
        with torch.no_grad():
            for p in m.parameters(): p += 1
        now = [p.detach().clone() for p in m.parameters()]
        slow = [.75*s + .25*p for s, p in zip(slow, now, strict=True)]
        r.after_step()
    assert all(torch.allclose(p, s, atol=1e-6) for p, s in zip(m.parameters(), slow, strict=True))

def test_head_reset():
    m = net(widths=(64,)); bias = m.head.bias.detach().clone()
    r = HeadReset(every=5)
    t = trained(m, r, steps=4)
    body, head = m.layers[0].linear.weight.detach().clone(), m.head.weight.detach().clone()
    r.attach(m, t.optimizer)
    r.after_step()
    assert torch.equal(m.layers[0].linear.weight, body) and (m.head.weight != head).all() and torch.equal(m.head.bias, bias)
    assert abs(m.head.weight.std()/r.first['head.weight'].std() - 1) < .1
    assert (t.optimizer.state[m.head.weight]['exp_avg'] == 0).all() and (t.optimizer.state[m.layers[0].linear.weight]['exp_avg'] != 0).any()
    with pytest.raises(ValueError, match='head'): HeadReset(layer='hea').attach(m, t.optimizer)

def test_upgd_by_hand():
    w = nn.Parameter(torch.tensor([1., -2., 3.])); opt = UPGD([w], lr=.1, decay=.5, noise=0., weight_decay=.1)
    u = torch.zeros(3)
    for t, g in enumerate(([-1., .5, 0.], [-2., 1., 1.]), 1):
        g, before = torch.tensor(g), w.detach().clone()
        w.grad = g.clone()
        opt.step()
        u = .5*u + .5*(-g*before)
        scaled = torch.sigmoid((u/(1 - .5**t))/(u/(1 - .5**t)).max())
        assert torch.allclose(w, before*(1 - .01) - .1*g*(1 - scaled))
    m = net()
    assert trained(m, optimizer='upgd', steps=60).history is not None

def test_crelu():
    x = torch.randn(4, 64)
    m = net(); plain = copy.deepcopy(m)
    concat_relu(m, x)
    assert m.layers[1].linear.weight.shape == (8, 16) and m.head.weight.shape == (10, 16)
    h = x
    for layer in (m.layers[0].linear, m.layers[1].linear):
        z = layer(h); h = torch.cat([z.relu(), (-z).relu()], 1)
    assert torch.allclose(m(x), m.head(h)) and torch.equal(m.layers[1].linear.weight[:, :8], plain.layers[1].linear.weight*.5**.5)
    assert isinstance(m.layers[0].act, CReLU)
    images = torch.randn(2, 1, 8, 8)
    cnn = concat_relu(CNN((1, 8, 8), 10, (4, 4), (8,)), images)
    cnn(images).sum().backward()
    res = concat_relu(ResNet((1, 8, 8), 10, channels=4, blocks=(1, 1)), images)
    res(images).sum().backward()
    with pytest.raises(ValueError, match='no ReLU of this ViT'):
        concat_relu(ViT((1, 8, 8), 10, patch_size=4, embed_dim=16, depth=1, num_heads=2), images)

def test_switched_norm():
    x = torch.randn(5, 64)
    m = net(normalization='layer', bias=True)
    on, off = switch_norm(copy.deepcopy(m), True), switch_norm(copy.deepcopy(m), False)
    plain = net(bias=True); plain.load_state_dict({k: v for k, v in m.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(on(x), m(x)) and torch.equal(off(x), plain(x)) and isinstance(on.layers[0].norm, Switch)
    with pytest.raises(ValueError, match='no norm'): switch_norm(plain, True)

# ------------------------------------------------------------------ all models

IMAGES = dict(cnn=lambda: CNN((1, 8, 8), 10, (4, 4), (8,)), resnet=lambda: ResNet((1, 8, 8), 10, channels=4, blocks=(1, 1)),
              vit=lambda: ViT((1, 8, 8), 10, patch_size=4, embed_dim=16, depth=1, num_heads=2), mlp=lambda: MLP((1, 8, 8), 10, (8,)))
FAST = dict(continual_backprop=dict(rate=.05, maturity=1), redo=dict(threshold=1., every=2), snr=dict(least=1, most=3, every=1),
            head_reset=dict(every=2), hare_tortoise=dict(every=2))

@pytest.mark.parametrize('model', IMAGES)
@pytest.mark.parametrize('remedy', REMEDIES)
def test_every_remedy_on_every_model(model, remedy):
    "Some steps, finite weights; what replaces units leaves a function in which nothing reads them"
    with seeded(0): m = IMAGES[model]()
    data = images()
    r = make_remedy(remedy, **FAST.get(remedy, {}))
    Trainer(m, data, 'adam', lr=1e-3, batch_size=16, callbacks=[r], eval_every=0, device='cpu').fit(steps=6)
    assert all(p.isfinite().all() for p in m.parameters())
    if remedy in ('continual_backprop', 'redo'): assert sum(len(q['units']) for q in r.log) > 0

def images():
    from plasticity.data import Data
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (64, 1, 8, 8), generator=g, dtype=torch.uint8), torch.randint(10, (64,), generator=g)
    return Data('noise', x, y, x, y, None, torch.tensor([.5]), torch.tensor([.25]))

@pytest.mark.parametrize('model', ['cnn', 'resnet', 'vit'])
def test_replace_equals_reset_where_the_values_are_the_same(model):
    "The function after a replacement is that of a network in which the unit's readers are zero and the bias is compensated"
    with seeded(0): m = IMAGES[model]()
    x = torch.randn(3, 1, 8, 8)
    for s in sites(m, x):
        values = {}
        for (t, d), pos in s.made.items():
            values[t] = m.state_dict()[t].movedim(d, 0)[pos[[1]].reshape(-1)].clone()
        Replace(s.group, [1], [.25], 'zero', values=values).apply(m, None, x)  # tried: raises where the promise is broken

# ------------------------------------------------------------------ members

ARMS = dict(
    continual_backprop=(ContinualBackprop, dict(rate=[0., .02, .04]), dict(maturity=5)),
    adaptable=(ContinualBackprop, dict(rate=[.01, .02, 0.]), dict(maturity=5, utility='adaptable')),
    slower=(ContinualBackprop, dict(rate=[.03, .02, .01]), dict(maturity=5, every=6)),
    redo=(ReDo, dict(threshold=[-1., .5, .2]), dict(every=10)),
    snr=(SelfNormalizedResets, dict(level=[0., .3, .2]), dict(every=2, least=2, most=9)),
    l2_init=(L2Init, dict(strength=[0., 1e-2, 1e-3]), {}),
    weight_decay=(WeightDecay, dict(strength=[0., 1e-1, 1e-3]), {}),
    shrink_perturb=(ShrinkPerturb, dict(shrink=[1., .99, .999], noise=[0., .01, .001]), {}),
    weight_clip=(WeightClip, dict(bound=[math.inf, .5, 1.]), {}),
    hare_tortoise=(HareTortoise, {}, dict(decay=.9, every=7)),
    head_reset=(HeadReset, {}, dict(every=7)))

@pytest.mark.parametrize('engine', ['loop', 'vmap'])
@pytest.mark.parametrize('arm', ARMS)
def test_a_member_equals_the_network_alone(arm, engine):
    "Bit for bit in the loop; vmapped, to float noise over the first steps"
    make, own, shared = ARMS[arm]
    seeds, steps = [1, 5, 3], 30 if engine == 'loop' else 12
    pop = Population(lambda s: MLP(DIGITS.shape, 10, (8, 8)), seeds=seeds, engine=engine)
    r = make(**{k: torch.tensor(v) for k, v in own.items()}, **shared)
    Trainer(pop, own_orders(DIGITS, pop), 'adam', lr=1e-2, batch_size=32, callbacks=[r], eval_every=0, device='cpu').fit(steps=steps)
    changed = 0
    for i, s in enumerate(seeds):
        m = net(s)
        alone = make(**{k: v[i] for k, v in own.items()}, **shared)
        trained(m, alone, seed=s, steps=steps)
        off = max((p - q).abs().max().item() for p, q in zip(m.parameters(), pop.member(i).parameters(), strict=True))
        assert off <= (0 if engine == 'loop' else 1e-4)
        changed += len(getattr(alone, 'log', [1]))
    assert changed

def test_neighbours_do_not_matter():
    def weights(seeds, rates):
        pop = Population(lambda s: MLP(DIGITS.shape, 10, (8,)), seeds=seeds)
        r = ContinualBackprop(rate=torch.tensor(rates), maturity=3)
        Trainer(pop, own_orders(DIGITS, pop), 'sgd', lr=.1, batch_size=32, callbacks=[r], eval_every=0, device='cpu').fit(steps=25)
        return [p.detach().clone() for p in pop.member(seeds.index(4)).parameters()]
    a, b = weights([4], [.05]), weights([7, 8, 4, 9], [.2, 0., .05, .01])
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

def test_several_remedies_in_one_step():
    "Arms side by side through `Step`, several steps a call; the members of each arm alone are touched by it"
    pop = Population(lambda s: MLP(64, 10, (8,)), seeds=[0]*4, engine='vmap')
    opt, x = member_optimizer('adam', pop, lr=1e-2), torch.randn(2, 64)
    arms = [L2Init([0, 0, .1, 0]), ContinualBackprop([0, .1, 0, 0], maturity=1, every=5, examples=x),
            ReDo([-1, -1, -1, .8], every=5, examples=x)]
    for r in arms: r.attach(pop, opt)
    step, g = Step(pop, opt, F.cross_entropy, steps=5), torch.Generator().manual_seed(0)
    for _ in range(6):
        step(torch.randn(5, 16, 64, generator=g), torch.randint(10, (5, 16), generator=g))
        for r in arms[1:]: r.after_step(steps=5)
    assert arms[1].state['layers.0.linear']['replaced'].tolist()[0] > 5 and arms[2].state['layers.0.linear']['replaced'].tolist()[0] > 0
    for r in arms: r.detach()
    assert len(opt.state) == 4 and opt.joined == []

def test_arms_of_one_kind_add_up_and_two_fits_are_one():
    "Two L2 inits and two unit remedies, each for its own member"
    def run(*fits):
        pop = Population(lambda s: MLP(DIGITS.shape, 10, (8,)), seeds=[0, 1])
        arms = [L2Init([.1, 0.]), L2Init([0., .3]), ContinualBackprop([.1, 0.], maturity=2), ContinualBackprop([0., .2], maturity=2)]
        t = Trainer(pop, own_orders(DIGITS, pop), 'adam', lr=1e-2, batch_size=32, callbacks=arms, eval_every=0, device='cpu')
        for n in fits: t.fit(steps=n)
        return t, pop, arms
    (t, a, arms), (_, b, _) = run(16), run(7, 9)
    assert [v.tolist() for _, _, v in t.optimizer.pulls.values()] == [[.2, 0.], [0., .6]]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(r.state['layers.0.linear']['replaced'].item() > 5 for r in arms[2:])
    for i, (l, r) in enumerate(((.1, .1), (.3, .2))):
        m = net(i, (8,))
        trained(m, L2Init(l), ContinualBackprop(r, maturity=2), seed=i, steps=16)
        assert all(torch.equal(p, q) for p, q in zip(m.parameters(), a.member(i).parameters(), strict=True))

def test_a_population_goes_on_from_a_checkpoint(tmp_path):
    def make():
        pop = Population(lambda s: MLP(DIGITS.shape, 10, (8,)), seeds=[0, 1])
        return Trainer(pop, own_orders(DIGITS, pop), 'adam', lr=1e-2, batch_size=32, eval_every=0, device='cpu',
                       callbacks=[L2Init([.1, 0.]), ContinualBackprop([.1, .05], maturity=2), ShrinkPerturb([1., .99], [0., .01])])
    whole = make().fit(steps=14)
    make().fit(steps=7).save(tmp_path)
    second = make().load(tmp_path); second.fit(steps=7)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True))

def test_units_are_found_again_after_another_edit():
    from plasticity.edits import Widen
    from plasticity.training import Callback
    class Grow(Callback):
        def after_step(self, t):
            if t.step == 10: t.loss = t.logits = None; Widen('layers.0.linear', 4).apply(t.model, t.optimizer, DIGITS.probe(4)[0])
    m, cb = net(widths=(8,)), ContinualBackprop(.2, maturity=6)
    trained(m, cb, Grow(), steps=25)
    assert m.layers[0].linear.weight.shape[0] == 12 and cb.sites[0].n == 12
    assert max(u for r in cb.log if r['step'] > 16 for u in r['units']) > 7

def test_members_refuse_what_they_cannot():
    pop = Population(lambda: MLP(64, 10, (8,)), 2)
    opt = member_optimizer('sgd', pop, lr=.1)
    with pytest.raises(ValueError, match='one network'): SpectralRegularization().attach(pop, opt)
    with pytest.raises(ValueError, match='takes a number or one for each of 2'): ContinualBackprop(torch.ones(3)).attach(pop, opt)

def test_units_of_a_switched_population_are_found_in_a_plain_model():
    def make(s): return switch_norm(MLP(DIGITS.shape, 10, (8, 8), normalization='layer', bias=True), s == 1)
    pop = Population(make, seeds=[0, 1], engine='vmap')
    with pytest.raises(ValueError, match='can be replaced'):
        ContinualBackprop([.1, 0.], examples=torch.randn(2, 64)).attach(pop, member_optimizer('adam', pop))
    cb = ContinualBackprop([.1, 0.], maturity=1, like=MLP(DIGITS.shape, 10, (8, 8), bias=True))
    t = Trainer(pop, DIGITS, 'adam', batch_size=32, callbacks=[cb], eval_every=0, device='cpu').fit(steps=10)
    assert cb.state['layers.0.linear']['replaced'].item() > 3 and t.step == 10

# ------------------------------------------------------------------ going on

@pytest.mark.parametrize('remedy', REMEDIES)
def test_a_stopped_run_ends_like_an_unbroken_one(remedy, tmp_path):
    def make(): return Trainer(net(), DIGITS, 'adam', lr=1e-2, batch_size=32, eval_every=0, device='cpu',
                               callbacks=[make_remedy(remedy, **FAST.get(remedy, {}))])
    whole = make().fit(steps=14)
    first = make().fit(steps=7); first.save(tmp_path)
    second = make().load(tmp_path); second.fit(steps=7)
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True): assert torch.equal(p, q)

def test_a_replacement_can_be_undone_and_is_plain_data():
    m = net(); cb = ContinualBackprop(rate=.3, maturity=0)
    t = trained(m, cb, steps=1)
    body, _ = cb.record.to_json()
    assert body['edits'][0]['edit']['edit'] == 'Replace' and t.step == 1
    from plasticity.edits import replay
    now = m.layers[1].linear.weight.detach().clone()
    replay(m, cb.record.inverse())
    assert not torch.equal(m.layers[1].linear.weight, now)

@pytest.mark.parametrize('remedy', REMEDIES)
def test_two_fits_are_one(remedy):
    def make(): return Trainer(net(), DIGITS, 'adam', lr=1e-2, batch_size=32, eval_every=0, device='cpu',
                               callbacks=[make_remedy(remedy, **FAST.get(remedy, {}))])
    once, twice = make().fit(steps=12), make().fit(steps=5).fit(steps=7)
    for p, q in zip(once.model.parameters(), twice.model.parameters(), strict=True): assert torch.equal(p, q)

def test_a_dead_network_is_revived():
    "Silenced by its biases before the remedy came: fresh biases are zero, norms the identity"
    m = net(widths=(8,))
    with torch.no_grad(): m.layers[0].linear.bias.fill_(-100.)
    trained(m, ReDo(threshold=0., every=5), steps=6)
    assert ((m.layers(DIGITS.probe()[0].flatten(1)) > 0).float().mean(0) > 0).all()
    b = net(widths=(8,), normalization='batch')
    with torch.no_grad(): b.layers[0].norm.bias.fill_(-100.)
    r = ReDo(threshold=0., every=5)
    trained(b, r, steps=5)
    n = b.layers[0].norm
    assert (n.bias == 0).all() and (n.weight == 1).all() and (n.running_mean == 0).all() and (n.running_var == 1).all()
    assert r.log[0]['units'] == list(range(8))

@settings(max_examples=50, deadline=None)
@given(rate=st.floats(1e-6, 1.), units=st.integers(1, 200), steps=st.integers(1, 400))
def test_what_is_owed_adds_up(rate, units, steps):
    "Paid step by step, in float32 or as a decimal, it is rate x units x steps to within one"
    done = torch.tensor([0, 0])
    for t in range(1, steps + 1):
        due = owed(torch.tensor([rate, torch.tensor(rate).item()], dtype=torch.float64), torch.tensor([units*t]*2), done)
        assert (due >= 0).all()
        done = done + due
    assert ((done - rate*units*steps).abs() <= 1).all()

# ------------------------------------------------------------------ what was found in use

def two(a=64, b=10):
    "A plain network of two layers"
    with seeded(0, 'model'): return nn.Sequential(nn.Flatten(), nn.Linear(a, 8), nn.ReLU(), nn.Linear(8, b))

def test_upgd_before_any_weight_is_useful():
    "Zero gradients or zero weights have no utility: every weight takes half a step, none becomes NaN"
    for zero in (True, False):
        m, x = two(), torch.randn(4, 64)
        if zero: nn.init.zeros_(m[3].weight); nn.init.zeros_(m[3].bias)
        opt, before = UPGD(m.parameters(), lr=.1, noise=0.), [p.detach().clone() for p in m.parameters()]
        (F.cross_entropy(m(x), torch.arange(4))*zero).backward()
        opt.step()
        assert all(p.isfinite().all() for p in m.parameters())
        if zero: assert torch.allclose(m[3].bias, before[3] - .1*.5*m[3].bias.grad)

@pytest.mark.parametrize('name', REMEDIES)
def test_a_second_network_starts_anew(name):
    "A remedy that has served one network does for the next, of another shape or of the same, what a new one does"
    options = dict(every=5) if name in ('redo', 'snr', 'hare_tortoise', 'head_reset') else {}
    if name == 'continual_backprop': options = dict(rate=.1, maturity=3)
    used = make_remedy(name, **options)
    trained(net(0, (8, 8)), used, steps=12)
    for seed, widths in ((1, (8, 8)), (2, (6,))):
        a, b = net(seed, widths), net(seed, widths)
        trained(a, used, steps=12); trained(b, make_remedy(name, **options), steps=12)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

def test_layers_that_start_at_zero_or_have_one_weight():
    "Their limits and draws are those of PyTorch's own start"
    m = two()
    nn.init.zeros_(m[3].weight)
    clip = WeightClip()
    trained(m, clip, steps=20, lr=1.)
    assert torch.allclose(clip.limits['3.weight'], torch.tensor(8**-.5))
    assert math.isclose(m[3].weight.abs().max().item(), 2*8**-.5, rel_tol=1e-5)
    x = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    data = Data('line', x, x, x, x)
    for remedy in (WeightClip(), HeadReset(every=2), ReDo(threshold=1., every=3), ContinualBackprop(rate=.5, maturity=1)):
        m = nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(), nn.Linear(1, 1))
        Trainer(m, data, 'sgd', batch_size=8, callbacks=[remedy], eval_every=0, device='cpu').fit(3)
        assert all(p.isfinite().all() for p in m.parameters()), remedy
    m, head = two(), HeadReset(every=100)
    nn.init.zeros_(m[3].weight)
    trained(m, head, steps=5); head.m and head.act()
    assert m[3].weight.abs().max() == 0                                 # it started at zero

def test_noise_makes_no_links():
    m = random_layer(64, 10, .7)
    trained(nn.Sequential(nn.Flatten(), m), ShrinkPerturb(noise=.1), steps=3)
    assert m.full and m.matrix()[~m.mask()].abs().sum() == 0 < m.matrix()[m.mask()].abs().min()
    members = Population(lambda: nn.Sequential(nn.Flatten(), random_layer(64, 10, .7)), 2)
    Trainer(members, DIGITS, callbacks=[ShrinkPerturb(noise=.1)], eval_every=0, device='cpu').fit(steps=3)
    assert all((s[1].matrix()[~s[1].mask()] == 0).all() for s in members)

@pytest.mark.parametrize('make', [lambda: ReDo(every=1000), lambda: SelfNormalizedResets(every=1000), lambda: ContinualBackprop(rate=1e-6),
                                  lambda: ContinualBackprop(rate=1e-6, utility='adaptable')])
def test_accumulated_pieces_are_seen_together(make):
    "With accumulate=4 (pieces of 8, 8, 8 and 6 samples) a remedy sees the whole batch"
    whole, pieces = make(), make()
    for r, n in ((whole, 1), (pieces, 4)):
        trained(net(), r, steps=3, optimizer='sgd', lr=0., batch_size=30, accumulate=n)
    for name, s in whole.state.items():
        for k, v in s.items(): assert torch.allclose(v.float(), pieces.state[name][k].float(), rtol=1e-4, atol=1e-6), k
    pop, many = Population(net, seeds=[0]), make()
    Trainer(pop, own_orders(DIGITS, pop), 'sgd', lr=0., batch_size=30, accumulate=4, callbacks=[many], eval_every=0,
            device='cpu').fit(steps=3)
    one = make()
    trained(pop.member(0), one, steps=3, optimizer='sgd', lr=0., batch_size=30, accumulate=4)
    assert all(torch.equal(v, one.state[name][k]) for name, s in many.state.items() for k, v in s.items())

def test_several_units_due_at_once_bit_for_bit():
    "What several replaced units gave is added to the next bias in one rounding, alone and in a population"
    pop = Population(lambda: MLP(DIGITS.shape, 10, (32, 32)), seeds=[4])
    Trainer(pop, own_orders(DIGITS, pop), lr=1e-2, batch_size=32, callbacks=[ContinualBackprop(rate=.2, maturity=5)], eval_every=0,
            device='cpu').fit(steps=30)
    m, cb = net(4, (32, 32)), ContinualBackprop(rate=.2, maturity=5)
    trained(m, cb, seed=4, steps=30)
    assert max(len(r['units']) for r in cb.log) > 4
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), pop.member(0).parameters(), strict=True))

class Widened(Callback):
    order = 30
    def after_step(self, trainer):
        if trainer.step != 3: return
        trainer.loss, trainer.logits = trainer.loss.detach(), trainer.logits.detach()
        x = DIGITS.normalize(DIGITS.x_train[:2])
        Widen(units(trainer.model, x)[0].name, 3).apply(trainer.model, trainer.optimizer, x)

@pytest.mark.parametrize('name', REMEDIES)
def test_an_edit_may_change_a_width(name):
    m = two()
    r = make_remedy(name, **(dict(every=2) if name in ('redo', 'snr', 'hare_tortoise', 'head_reset') else {}))
    trained(m, r, Widened(), steps=8)
    assert m[1].out_features == 11 and all(p.isfinite().all() for p in m.parameters())
    if name == 'hare_tortoise': assert {k: v[0].shape for k, v in r.tortoise.items()} == {k: p.shape for k, p in m.named_parameters()}

def test_concat_relu_leaves_alone_what_it_cannot_change():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.ReLU()
        def forward(self, x): return self.c(self.act(self.b(self.act(self.a(x)))))
    m, x = Shared(), torch.randn(3, 6)
    before = m(x)
    with pytest.raises(ValueError, match='at work once'): concat_relu(m, x)
    assert torch.equal(m(x), before) and m.training
    m = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [i for i, k in enumerate(concat_relu(m, x)) if isinstance(k, CReLU)] == [4] and m(x).shape == (3, 3)

def test_models_without_plain_layers_are_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 10))
        def forward(self, x): return x.flatten(1) @ self.w
    for name in ('spectral', 'weight_clip', 'head_reset'):
        with pytest.raises(ValueError, match='this Bare has no linear or convolution layer'): trained(Bare(), make_remedy(name), steps=1)

@pytest.mark.parametrize('make, message', [
    (lambda: L2Init(-1.), 'strength: got -1.0, takes 0 or more'), (lambda: WeightDecay(-1.), 'strength'),
    (lambda: WeightClip(0.), 'more than 0'),
    (lambda: SpectralRegularization(-1.), 'strength'), (lambda: SpectralRegularization(iterations=0), 'iterations: got 0, takes 1 or more'),
    (lambda: ShrinkPerturb(shrink=-.1), 'shrink: got -0.1, takes 0 or more'), (lambda: ShrinkPerturb(noise=-1.), 'noise'),
    (lambda: ContinualBackprop(rate=-1.), 'rate: got -1.0, takes 0 to 1'), (lambda: ContinualBackprop(decay=2.), 'decay'),
    (lambda: ReDo(decay=1.5), 'decay: got 1.5'), (lambda: ReDo(threshold=math.nan), 'threshold'),
    (lambda: SelfNormalizedResets(level=1.), 'level: got 1.0, takes 0 to 1'), (lambda: SelfNormalizedResets(window=0), 'window'),
    (lambda: UPGD(two().parameters(), lr=-1.), 'lr'), (lambda: UPGD(two().parameters(), decay=1.), 'decay'),
    (lambda: UPGD(two().parameters(), weight_decay=-1.), 'weight_decay: got -1.0, takes 0 or more')])
def test_settings_are_checked_where_they_are_given(make, message):
    with pytest.raises(ValueError, match=message): make()

@pytest.mark.parametrize('kind', [L2Init, WeightDecay, SpectralRegularization, ReDo, ContinualBackprop, WeightClip,
                                  SelfNormalizedResets, ShrinkPerturb])
def test_one_network_refuses_the_settings_of_members(kind):
    name = next(iter(inspect.signature(kind).parameters))
    with pytest.raises(ValueError, match=rf'{name}: got shape \(2,\), takes a number or one for each of 1 members'):
        trained(net(), kind([.1, .2]), steps=1)
    trained(net(), kind([.1]), steps=1)

def test_a_member_whose_level_is_zero_keeps_its_units():
    from plasticity.population import PopulationTrainer
    levels, make, d = [.01, 0., .01], lambda: MLP(DIGITS.shape, 10, (8, 8)), DIGITS.subset(train=96, test=20)
    snr = SelfNormalizedResets(levels, every=1, least=1, most=2)
    p = Population(make, 3)
    PopulationTrainer(p, own_orders(d, p), 'sgd', lr=.05, batch_size=16, device='cpu', callbacks=[snr]).fit(3)
    counts = sum(s['replaced'] for s in (snr.state if snr.state else snr.held[2]).values())
    assert counts[0] > 0 and counts[1] == 0 and counts[2] > 0
    with seeded(1, 'model'): alone = make()
    Trainer(alone, d, 'sgd', lr=.05, batch_size=16, device='cpu', seed=1).fit(3)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), p.member(1).parameters(), strict=True))

def test_concat_relu_keeps_mode_and_frozen_weights():
    m = net().eval()
    reader = [k for k, v in m.named_parameters() if v.ndim == 2][1]
    m.get_parameter(reader).requires_grad_(False)
    concat_relu(m, DIGITS.probe(2)[0])
    assert not m.training and not m.get_parameter(reader).requires_grad
    assert concat_relu(net().train(), DIGITS.probe(2)[0]).training

def alike(remedies, optimizer='sgd', **options):
    "Whether members with remedies become what each network alone becomes, bit for bit"
    make, d = lambda: MLP(DIGITS.shape, 10, (8, 8)), DIGITS.subset(train=96, test=20)
    options = dict(lr=.02, batch_size=16, device='cpu', eval_every=0) | options
    p = Population(make, 2)
    Trainer(p, own_orders(d, p), optimizer, callbacks=remedies(), **options).fit(2)
    for i in (0, 1):
        with seeded(i, 'model'): m = make()
        Trainer(m, d, optimizer, callbacks=remedies(), seed=i, **options).fit(2)
        if not all(torch.equal(a, b) for a, b in zip(m.parameters(), p.member(i).parameters(), strict=True)): return False
    return True

@pytest.mark.parametrize('optimizer, options', [
    ('sgd', dict(weight_decay=.03, clip=.1)), ('adamw', dict(weight_decay=.3)), ('noisy_sgd', dict(noise=.1, momentum=.9, clip=.5))])
@pytest.mark.parametrize('remedies', [
    lambda: [L2Init(.05)], lambda: [WeightDecay(.1)], lambda: [WeightDecay(.1, decoupled=False)],
    lambda: [L2Init(.05), WeightDecay(.1, decoupled=False)], lambda: [WeightDecay(.1), L2Init(.2)]])
def test_pulls_on_members_come_before_noise_and_decay(remedies, optimizer, options):
    assert alike(remedies, optimizer, **options)

@pytest.mark.parametrize('remedies', [
    lambda: [ReDo(.6, every=4), WeightClip(.05)], lambda: [ShrinkPerturb(.9, .05, every=3), HareTortoise(.9, every=5)],
    lambda: [ShrinkPerturb(.9, .05, every=3), ContinualBackprop(.3, maturity=1, utility='adaptable')],
    lambda: [HareTortoise(.9, every=5), WeightClip(.05), ReDo(.7, every=3), L2Init(.01)]])
def test_remedies_of_members_act_in_their_order(remedies):
    assert alike(remedies, 'adamw')
