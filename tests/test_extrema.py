"The thirteen rules of extrema-routed growth, the seed's snippets, and growth that happens whole or not at all"
import copy, math, os, pickle

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from plasticity.credits import PHASES, GrowthScheduler, spikes
from plasticity.data import get_data
from plasticity.edits import edit, replay
from plasticity.extrema import Growth, MultiScaleNetwork, apply_growth, create_multi_scale_network
from plasticity.routing import ROUTERS, ConnectionRouter, Proposal, activity, find_extrema, make_router
from plasticity.sparse_network import MinimalNetwork, Sprout
from plasticity.training import Checkpoint, Trainer

EXAMPLES = int(os.environ.get('PLASTICITY_EXAMPLES', 0)) # 1000 and more for a longer look at random networks

README = '''
import torch

# Create a multi-scale network
network = create_multi_scale_network(
    input_size=784,      # MNIST: 28x28 flattened
    hidden_sizes=[256, 128],
    output_size=10,      # 10 classes
    sparsity=0.0001,     # 0.01% initial connectivity
    activation='tanh'
)

# Check initial connectivity
stats = network.network.get_connectivity_stats()
print(f"Initial connectivity: {stats['connectivity_ratio']:.6f}")
print(f"Total connections: {stats['total_active_connections']}")

# Forward pass
x = torch.randn(32, 784)
output = network(x)
print(f"Output shape: {output.shape}")
import torch.nn as nn
import torch.optim as optim

# Setup training
optimizer = optim.Adam(network.parameters(), lr=0.001)
criterion = nn.CrossEntropyLoss()

# Training loop with automatic growth
for epoch in range(50):
    epoch_stats = network.train_epoch(
        train_loader, optimizer, criterion, epoch
    )
    
    if epoch_stats['growth_events'] > 0:
        print(f"Growth at epoch {epoch}: "
              f"{epoch_stats['connections_added']} connections added")
'''

def test_the_snippets_of_the_readme_run(capsys):
    torch.manual_seed(0)
    made = torch.utils.data.TensorDataset(torch.randn(640, 784), torch.randint(10, (640,)))
    space = dict(train_loader=torch.utils.data.DataLoader(made, 64, shuffle=True))
    exec('from plasticity.extrema import create_multi_scale_network\n' + README, space)  # noqa: S102
    out = capsys.readouterr().out
    net = space['network']
    assert 'Output shape: torch.Size([32, 10])' in out and 'Total connections: ' in out and space['epoch_stats']['epoch'] == 49
    assert net.network.n_links - space['stats']['total_active_connections'] == sum(e['connections_added'] for e in net.growth_log)
    assert out.count('Growth at epoch') == len(net.growth_log)

# ---- rule 1: the start

sizes_ = st.lists(st.integers(1, 30), min_size=2, max_size=6)

@settings(max_examples=150, deadline=None)
@given(sizes_, st.sampled_from([1e-4, .001, .02, .1, .5, 1.]), st.sampled_from(['tanh', 'sigmoid', 'relu']), st.integers(0, 999))
def test_start(sizes, density, activation, seed):
    net = MinimalNetwork(sizes, density, activation, seed=seed)
    want = sum(max(1, int(a*b*density)) for a, b in zip(sizes, sizes[1:], strict=False))
    stats = net.get_connectivity_stats()
    assert net.n_links == want + net.links_added == stats['total_active_connections']
    assert stats['outputs_reached'] == sizes[-1]
    x = torch.randn(5, sizes[0])
    y = net(x)
    assert torch.allclose(y, net.trace(x)[-1], atol=1e-5) and y.isfinite().all()
    moved = torch.zeros(sizes[-1], dtype=torch.bool)                          # every output really moves with some input
    base = net.trace(torch.zeros(1, sizes[0]))[-1]
    for k in range(sizes[0]): moved |= (net.trace(torch.eye(sizes[0])[k:k + 1]*.5)[-1] - base)[0].abs() > 0
    if activation != 'relu' and len(sizes) < 5: assert moved.all()

def test_at_one_in_ten_thousand_every_network_of_twenty_learns_something():
    for seed in range(20):
        net = MinimalNetwork([784, 256, 128, 10], 1e-4, seed=seed)
        x = torch.randn(64, 784, generator=torch.Generator().manual_seed(seed))
        nn.functional.cross_entropy(net(x), torch.arange(64) % 10).backward()
        assert net.links['0_1'].values.grad.abs().sum() > 0 and net.n_links == 24 + net.links_added

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=5), st.floats(.05, 1), st.sampled_from(['tanh', 'sigmoid', 'relu']),
       st.integers(0, 99), st.sampled_from(['auto', 'gather']), st.integers(-1, 3))
def test_the_program_has_the_gradients_of_the_layers(sizes, density, activation, seed, mode, lost):
    net = MinimalNetwork(sizes, density, activation, seed=seed, mode=mode).double()
    with torch.no_grad(): net.bias.normal_()
    free = [(p, m) for p, m in net.links.items() if m.density < 1]
    for p, m in free[::2]:
        k = (~m.mask()).nonzero()[:1].T
        with edit(net, None, torch.randn(3, sizes[0]).double(), check=False) as e: e.connect(f'links.{p}', *k, [.3])
    if (m := net.links[f'{lost}_{lost + 1}'] if 0 <= lost < len(sizes) - 1 else None) and m.n_links: m.disconnect(*m.links()[:2])
    x, t = torch.randn(4, sizes[0]).double(), torch.randn(4, sizes[-1]).double()
    kind, full = net._program()['kind'], any(m.full for m in net.links.values())
    assert kind == 'matrices' or kind == ('small' if mode == 'auto' and not full else 'lists')
    grads = []
    for f in (net, lambda v: net.trace(v)[-1]):
        net.zero_grad(); (f(x)*t).sum().backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()])
    assert torch.allclose(net(x), net.trace(x)[-1]) and all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))

# ---- rule 2: spikes

@pytest.mark.parametrize('kind', ['normal', 'uniform', 'exponential', 'lognormal', 'student'])
def test_spikes_of_stationary_noise_are_under_five_in_a_hundred(kind):
    g = torch.Generator().manual_seed(7)
    n = torch.randn(8019, generator=g)
    x = dict(normal=5 + n, uniform=torch.rand(8019, generator=g), exponential=-torch.rand(8019, generator=g).log(), lognormal=n.exp(),
             student=n/torch.randn(3, 8019, generator=g).square().mean(0).sqrt())[kind]
    assert spikes(x).double().mean() < .05

def test_threefold_steps_are_seen():
    g, level, noise = torch.Generator().manual_seed(3), 0, 0
    for _ in range(100):
        x = 1 + .1*torch.randn(120, generator=g)
        a, b = x.clone(), x.clone()
        a[100:] *= 3; b[100:] = 1 + 3*(b[100:] - 1)
        level += bool(spikes(a[81:]).any()); noise += bool(spikes(b[81:]).any())
    assert level > 95 and noise > 75

def test_spikes_edge_cases():
    assert len(spikes([])) == len(spikes([1.]*19)) == 0
    assert not spikes([1.]*20).any() and not spikes([float('nan')]*20).any()
    x = [1.]*10 + [1., 5.]*5
    assert spikes(x).all() and not spikes([1., 1.2]*10).any()

def test_spikes_one_by_one_and_together_are_the_same():
    x = torch.randn(300, generator=torch.Generator().manual_seed(1)).exp()
    a, b = GrowthScheduler(), GrowthScheduler()
    for v in x: a.add_gradient_norm(v)
    for part in x.split([7, 93, 1, 199]): b.add_gradient_norms(part)
    assert a.state_dict() == b.state_dict() and a.credits == 10*a.spike_count > 0

# ---- rule 3: extrema

def _seen(mean, zero): return [dict(mean=torch.tensor(m), zero=torch.tensor(z)) for m, z in zip(mean, zero, strict=True)]

def test_extrema_thresholds_are_strict():
    m = [.96, -.96, .95, .5, .05, .049, -.049, 0.]
    e = find_extrema(_seen([[0.]*20, m, m], [[0.]*20, [0.]*8, [0.]*8]))
    assert [sorted(e[1][k].tolist()) for k in ('high', 'low', 'quiet')] == [[0, 1], [5, 6, 7], [2, 3, 4]]
    assert len(e[2]['high']) == len(e[2]['low']) == 0
    mean, zero = torch.arange(40.).tolist(), [.95]*3 + [.9]*37
    e = find_extrema(_seen([mean, mean, [0.]], [[0.]*40, zero, [0.]]), 'relu')
    assert sorted(e[1]['high'].tolist()) == [38, 39] and sorted(e[1]['low'].tolist()) == [0, 1, 2] and e[0]['high'].tolist() == [39, 38]

def test_extrema_are_over_the_window_not_one_batch():
    net = MinimalNetwork([3, 2, 1], 1.)
    with torch.no_grad(): net.links['0_1'].values.fill_(5.)
    up, down = torch.ones(4, 3)*5, -torch.ones(4, 3)*5
    assert len(find_extrema(activity(net, [up]))[1]['high']) == 2
    assert len(find_extrema(activity(net, [up, down]))[1]['low']) == 2

# ---- rules 4, 5, 7, 9: routing

def masks(net): return {k: m.mask().clone() for k, m in (*net.links.items(), *net.memory.items())}

def forced(net, seed):
    "Extrema as they may come: random high and low units everywhere"
    g = torch.Generator().manual_seed(seed)
    out = []
    for k, n in enumerate(net.layer_sizes):
        kind = torch.randint(4, (n,), generator=g)
        high, low = kind == 0, (kind == 1) | (kind == 2)
        if k == 0: low[:] = False
        if k == len(net.layer_sizes) - 1: high[:] = low[:] = False
        at = lambda m: m.nonzero()[:, 0]
        out.append(dict(high=at(high), low=at(low), quiet=at(~(high | low))))
    return out

def test_link_back_once():
    "A link back that is there, or proposed already, is not proposed again"
    from plasticity.routing import _Routing
    net, rule, g = MinimalNetwork([2, 3, 3, 2], .5, seed=0), make_router('extrema', reciprocal=1), torch.Generator().manual_seed(0)
    made = lambda: _Routing(net, forced(net, 0), rule, g)
    first = made()
    for _ in range(2): first.back(2, 1, 1, 0)
    assert [l[:4] for l in first.out.links] == [(2, 1, 1, 0)]
    apply_growth(net, None, first.out, torch.randn(6, 2, generator=g), g=g, check=False)
    again = made()
    again.back(2, 1, 1, 0)
    assert not again.out.links and masks(net)['2_1'].sum() == 1

@settings(max_examples=max(300, EXAMPLES), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.floats(.01, .6), st.sampled_from(['tanh', 'sigmoid', 'relu']),
       st.sampled_from(['extrema', 'extrema', 'extrema', 'random', 'gradient', 'set']), st.integers(0, 10**6), st.integers(1, 2),
       st.sampled_from([None, 1, 3]))
def test_events_keep_every_number(sizes, density, activation, name, seed, events, structures):
    net = MinimalNetwork(sizes, density, activation, seed=seed)
    g, router = torch.Generator().manual_seed(seed), make_router(name)
    made = [torch.zeros(n) for n in sizes]                                    # incoming links by growth, counted here
    for _ in range(events):
        n_in = net.layer_sizes[0]
        window = [(torch.randn(6, n_in, generator=g), torch.randint(sizes[-1], (6,), generator=g)) for _ in range(2)]
        extrema, before, old_sizes, old = forced(net, seed), masks(net), list(net.layer_sizes), copy.deepcopy(net)
        p = router.propose(net, extrema, structures, g, window)
        if not p: continue
        record = apply_growth(net, None, p, window[0][0], g=g, check=False)
        after = masks(net)
        claimed = {(i, s, j, t) for i, s, j, t, _ in p.links}
        new, gone = set(), set()
        for k, m in after.items():
            i, j = map(int, k.split('_'))
            b = torch.zeros_like(m); b[:before[k].shape[0], :before[k].shape[1]] = before[k]
            new |= {(i, s, j, t) for t, s in (m & ~b).nonzero().tolist()}
            gone |= {(i, s, j, t) for t, s in (b & ~m).nonzero().tolist()}
        assert len(claimed) == len(p.links) and gone <= set(p.remove) and new <= claimed
        assert len(new) - len(gone) == len(p.links) - len(p.remove)
        if name != 'set': assert new == claimed and not gone
        assert net.n_links == sum(int(m.sum()) for m in after.values())
        assert structures is None or p.structures <= structures
        for k, m in old.links.items() if name != 'set' else ():               # no trained link was written over
            w = net.links[k].matrix().detach()[:m.out_features, :m.in_features]
            assert torch.equal(w[m.mask()], m.matrix()[m.mask()])
        if name == 'extrema':
            for (i, u), targets in p.routed.items():
                assert u in extrema[i]['high'].tolist() and 1 <= len(targets) <= 4 and all(1 <= j - i <= 3 for j, _ in targets)
                assert all(t not in extrema[j]['high'].tolist() for j, t in targets)
            cloned = {}
            for layer, unit, m, _ in p.clones: cloned.setdefault((layer, m), set()).add(unit); assert abs(layer - m) == 1
            assert all(len(v) <= 5 for v in cloned.values())
            for i, _, j, t, _ in p.links:
                if i < j and t < old_sizes[j]: made[j][t] += 1
            for j in range(1, len(sizes)): made[j] = torch.cat([made[j], torch.zeros(net.layer_sizes[j] - len(made[j]))])
            assert all(m.max() <= 5 for m in made[1:])
        x = torch.randn(3, n_in, generator=g)
        assert net(x).isfinite().all() and torch.allclose(net(x), net.trace(x)[-1], atol=1e-4)
        assert net.get_connectivity_stats()['outputs_reached'] == sizes[-1]
    if p:
        replay(net, record.inverse())
        both = zip(net.links.parameters(), old.links.parameters(), strict=True)
        assert net.layer_sizes == old.layer_sizes and all(torch.equal(a, b) for a, b in both)

def test_one_target_at_each_distance_then_fill():
    net = MinimalNetwork([4, 30, 30, 30, 30, 5], .01)
    none = torch.tensor([], dtype=torch.long)
    e = [dict(high=none, low=torch.arange(n), quiet=none) for n in net.layer_sizes]
    e[1] = dict(high=torch.tensor([7]), low=torch.arange(7), quiet=torch.arange(8, 30))
    p = ConnectionRouter(clones=0, reciprocal=0).propose(net, e)
    assert sorted(j for j, _ in p.routed[1, 7]) == [2, 2, 3, 4] and len(p.links) == 4

def test_reciprocal_links_come_one_time_in_five_and_only_to_neighbours():
    net, n = MinimalNetwork([4, 200, 200, 200, 5], .001), 200
    none = torch.tensor([], dtype=torch.long)
    e = [dict(high=torch.arange(n) if k == 1 else none, low=torch.arange(v) if 1 < k < 4 else none, quiet=none)
         for k, v in enumerate(net.layer_sizes)]
    p = ConnectionRouter(clones=0).propose(net, e)
    back, near = [v for v in p.links if v[0] > v[2]], [v for v in p.links if v[2] - v[0] == 1]
    assert all(i - j == 1 for i, _, j, _, _ in back) and .14 < len(back)/len(near) < .26
    x = torch.randn(3, 5, 4)
    apply_growth(net, None, p, x[:, 0], check=False)
    y = net(x)
    assert y.shape == (3, 5, 5) and y.isfinite().all() and torch.allclose(y[:, 0], net(x[:, 0]), atol=1e-6)
    with torch.no_grad(): net.memory['2_1'].values.fill_(3.)
    assert not torch.allclose(net(x)[:, 1:], torch.stack([net(x[:, t]) for t in range(1, 5)], 1), atol=1e-4)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-6)                  # the memory starts empty for every sequence

def test_clones_have_seven_tenths_of_the_weights():
    net = MinimalNetwork([6, 5, 5, 5, 3], .6, seed=1)
    none = torch.tensor([], dtype=torch.long)
    e = [dict(high=none, low=torch.arange(n) if k else none, quiet=none) for k, n in enumerate(net.layer_sizes)]
    e[2]['high'] = torch.tensor([1])
    old = {k: m.matrix().detach().clone() for k, m in net.links.items()}
    p = ConnectionRouter(reciprocal=0).propose(net, e)
    assert {(m, layer, u) for layer, u, m, _ in p.clones} == {(1, 2, 1), (3, 2, 1)}
    apply_growth(net, None, p, torch.randn(2, 6))
    assert net.layer_sizes == [6, 6, 5, 6, 3]
    below = net.links['1_3'].matrix()[:5, 5], old['2_3'][:, 1]                # its targets, by a skip link
    above = net.links['1_3'].matrix()[5, :5], old['1_2'][1]
    for got, want in (below, above):
        at = got != 0
        assert at.any() and torch.allclose(got[at], .7*want[at])

@pytest.mark.parametrize('scale', [.1, 0.])
def test_new_weights(scale):
    net = MinimalNetwork([200, 150, 100, 10], .05)
    p = ConnectionRouter(clones=0, reciprocal=0).propose(net, forced(net, 0), g=torch.Generator().manual_seed(0))
    x, trained = torch.randn(9, 200), net.bias.data.normal_()
    y = net(x).detach()
    apply_growth(net, None, p, x, scale=scale)
    if not scale: assert torch.equal(net(x), y) or torch.allclose(net(x), y, atol=1e-6)
    fan = {j: sum(m.fan_in() for k, m in net.links.items() if k.endswith(f'_{j}')) for j in (1, 2, 3)}
    z = torch.stack([net.links[f'{i}_{j}'].matrix()[t, s]*math.sqrt(fan[j][t]/2) for i, s, j, t, _ in p.links])
    assert trained is not None and abs(z.std() - scale) < .012

def test_perturbing_a_high_unit_moves_exactly_its_targets():
    for seed in range(5):
        net = MinimalNetwork([20, 15, 12, 10, 6], .05, seed=seed); x = torch.randn(7, 20)
        p = ConnectionRouter(clones=0, reciprocal=0).propose(net, forced(net, seed), g=torch.Generator().manual_seed(seed))
        def moved(source, net=net, x=x):
            a, b = net.trace(x), net.trace(x, poke=(*source, 1.))
            return {(j, int(t)) for j in range(source[0] + 1, 5) for t in ((a[j] - b[j]).abs().amax(0) > 0).nonzero()}
        already = {s: moved(s) for s in p.routed}
        apply_growth(net, None, p, x)
        assert p.routed and all(moved(s) == already[s] | set(t) for s, t in p.routed.items())

def test_growth_is_atomic(monkeypatch):
    net = MinimalNetwork([20, 15, 12, 6], .1); x = torch.randn(7, 20)
    adam = torch.optim.Adam(net.parameters()); net(x).square().sum().backward(); adam.step()
    p = ConnectionRouter().propose(net, forced(net, 1))
    there = net.links['2_3'].links()
    p.links.append((2, int(there[1][0]), 3, int(there[0][0]), .5))           # the last edit cannot be done: the link exists
    before = copy.deepcopy((net.state_dict(), adam.state_dict()['state'])); y = net(x).detach()
    with pytest.raises(ValueError): apply_growth(net, adam, p, x)
    assert torch.equal(net(x), y) and all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    for a, b in zip(adam.state_dict()['state'].values(), before[1].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ('exp_avg', 'exp_avg_sq'))

@pytest.mark.parametrize('mode', ['gather', 'auto'])
def test_sprouts_keep_function_moments_and_refuse(mode):
    net = MinimalNetwork([6, 5, 4, 3], .8, mode=mode); x = torch.randn(8, 6); adam = torch.optim.Adam(net.parameters())
    net(x).square().sum().backward(); adam.step(); y, m = net(x).detach(), adam.state[net.bias]['exp_avg'].clone()
    Sprout(1, 2, [.5, -1.]).apply(net, adam, x)
    assert net.links['0_1'].full == (mode == 'auto') and net.bias[5:7].tolist() == [.5, -1.]
    assert torch.allclose(net(x), y, atol=1e-6) and (torch.equal(net(x), y) or mode == 'auto') # a wider product may round otherwise
    assert torch.equal(adam.state[net.bias]['exp_avg'][[*range(5), *range(7, 14)]], m)
    for bad in (Sprout(0), Sprout(3), Sprout(1, 0), Sprout(1, 2, [1.])):
        with pytest.raises(ValueError): bad.apply(net, adam, x)
    full = MinimalNetwork([6, 5, 3], 1.); y = full(x).detach()
    Sprout(1).apply(full, None, x)
    assert torch.allclose(full(x), y, atol=1e-6) and full.links['0_1'].n_links == 30

# ---- rules 6, 7, 10, 11: economy, limits, rest, phases

def test_economy():
    s = GrowthScheduler()
    s.credits = 90
    assert not s.should_grow() and s.add_boundary() and s.credits == 170 and s.should_grow()
    assert not s.add_boundary()
    for e in (49, 50): s.update_epoch(e); assert s.add_boundary() == (e == 50)
    s.grown(50)
    assert s.credits == 0 and s.left == 0 and s.price == 100
    s.credits = 1000
    for e in range(51, 61): s.update_epoch(e); assert not s.should_grow()
    s.update_epoch(61); assert not s.should_grow()                            # no room in this phase
    s.update_epoch(100); assert s.should_grow() and s.left == 200
    for helped, price in ((True, 90), (False, 99)): s.judge(helped); assert math.isclose(s.price, price)
    for _ in range(50): s.judge(True)
    assert math.isclose(s.price, 50)
    assert GrowthScheduler(limits=False).left is None

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 30), st.integers(1, 60)), min_size=1, max_size=40))
def test_limits_and_rest_hold_for_any_sequence(steps):
    s, grown = GrowthScheduler(), []
    for epoch, found, wanted in sorted(steps):
        s.update_epoch(epoch)
        before = s.credits
        s.credits += 10*found
        assert s.phase == ('coarse' if epoch < 50 else 'medium' if epoch < 100 else 'fine')
        if s.should_grow():
            n = min(wanted, s.left)
            s.grown(n); grown.append((epoch, n)); assert s.credits == 0
        else: assert s.credits == before + 10*found
    assert all(b[0] - a[0] > 10 for a, b in zip(grown, grown[1:], strict=False))
    for _, (start, limit) in PHASES.items():
        end = min([f for f, _ in PHASES.values() if f > start], default=10**9)
        assert sum(n for e, n in grown if start <= e < end) <= limit

# ---- the policy on the trainer

def small(): return get_data('digits').subset(train=320, test=100)
def quick(**k): return GrowthScheduler(stabilization_epochs=1, growth_threshold=1, **k)

@pytest.mark.parametrize('router', ROUTERS)
@pytest.mark.parametrize('activation', ['tanh', 'sigmoid', 'relu'])
def test_grows_on_the_trainer_with_any_router(router, activation):
    net = MinimalNetwork([64, 20, 16, 10], .05, activation); start = net.n_links
    growth, heard = Growth(router, quick(limits=False)), []
    class Ear:
        order = 0
        def on_growth(self, trainer, event, record): heard.append((event, record))
    growth.scheduler.credits = 100
    t = Trainer(net, small(), lr=.01, device='cpu', callbacks=[growth, Ear()]).fit(6)
    assert net.n_links - start == growth.connections_added == sum(e['links_after'] - e['links_before'] for e in growth.events)
    assert [e for e, _ in heard] == growth.events and (router == 'none') == (not heard) and len(growth.rows) == 6
    for p, s in t.optimizer.state.items(): assert s['exp_avg'].shape == p.shape
    if router == 'none': assert growth.scheduler.credits >= 100 and growth.refused         # a refused growth keeps its credits

def test_follows_another_run_exactly():
    nets, logs = [], []
    for router in ('extrema', 'random', 'gradient'):
        net = MinimalNetwork([64, 20, 16, 10], .05, seed=3)
        g = Growth(router, quick(limits=False), follow=logs[0] if logs else None)
        g.scheduler.credits = 100
        Trainer(net, small(), lr=.01, device='cpu', callbacks=[g], eval_every=0).fit(6)
        nets.append(net); logs.append(g.events)
    assert logs[0] and all([(e['epoch'], sorted(map(str, e['pairs'])), e['units']) for e in v] ==
                           [(e['epoch'], sorted(map(str, e['pairs'])), e['units']) for e in logs[0]] for v in logs)
    assert len({n.n_links for n in nets}) == 1 and len({tuple(n.layer_sizes) for n in nets}) == 1

@pytest.mark.parametrize('router', ROUTERS)
def test_layers_that_grow_dense_take_all_their_links(router):
    net = MinimalNetwork([64, 20, 16, 10], .25, dense_from=.257); start, x = net.n_links, torch.randn(5, 64)
    growth = Growth(router, quick(limits=False)); growth.scheduler.credits = 1000
    Trainer(net, small(), lr=.01, device='cpu', callbacks=[growth]).fit(6)
    near = [m for m in net.links.values() if m.density > .256]
    assert all(m.density == 1 for m in near) and bool(near) == (router != 'none') and not net.thick()
    assert net.n_links - start == growth.connections_added and all(e['connections_added'] == e['links_after'] - e['links_before']
                                                                   for e in growth.events)
    assert net(x).shape == (5, 10) and net.get_connectivity_stats()['outputs_reached'] == 10

@pytest.mark.parametrize('density', [.2, .25, .6, 1.])
def test_drawn_dense(density):
    plain, net = (MinimalNetwork([12, 9, 7, 3], density, seed=1, dense_from=d) for d in (None, .25))
    x = torch.randn(4, 12)
    assert torch.allclose(plain(x), net(x), atol=1e-6) and (net.n_links == 12*9 + 9*7 + 7*3) == (density >= .25)
    made = create_multi_scale_network(12, [9, 7], 3, sparsity=density, seed=1, dense_from=.25)
    assert torch.equal(made(x), net(x))
    other = MinimalNetwork([12, 9, 7, 3], .05); other.load_state_dict(net.state_dict())
    assert torch.allclose(other(x), net(x), atol=1e-6) and other.n_links == net.n_links

def test_resumed_from_the_last_step_of_an_epoch(tmp_path):
    def make():
        g = Growth(scheduler=GrowthScheduler(growth_threshold=1, stabilization_epochs=0, limits=False)); g.scheduler.credits = 50
        return Trainer(MinimalNetwork([64, 20, 16, 10], .1), get_data('digits').subset(train=320, test=100), device='cpu', callbacks=[g])
    whole, part, save = make().fit(3), make(), Checkpoint(tmp_path, every=5)
    save.after_epoch = save.after_fit = lambda trainer: None
    part.callbacks.append(save); part.fit(steps=5)
    on = make(); on.callbacks.append(Checkpoint(tmp_path/'on')); on.load(tmp_path); on.goal = ['epoch', 3]
    assert on.step == on.batch == 5 and on.epoch == 0
    on.fit()
    assert all(map(torch.equal, whole.model.parameters(), on.model.parameters())) and len(on.callbacks[0].events) > 0

def test_a_record_holds_what_growth_may_still_add():
    net = MinimalNetwork([64, 20, 16, 10], .1, seed=0); start = copy.deepcopy(net)
    for seed in range(3):
        ext = find_extrema(activity(net, [(torch.randn(32, 64), None)]), 'tanh')
        p = ConnectionRouter().propose(net, ext, None, torch.Generator().manual_seed(seed))
        record = apply_growth(net, None, p, torch.randn(4, 64))
        before, load = copy.deepcopy(start), start.load.clone()
        replay(start, record)
        assert torch.equal(start.load, net.load) and net.load.sum() > load.sum() and start.layer_sizes == net.layer_sizes
        replay(start, record.inverse())
        assert torch.equal(start.load, load) and all(map(torch.equal, before.state_dict().values(), start.state_dict().values()))
        replay(start, record)

@pytest.mark.parametrize('density', [.05, .1, .45, .6, 1.])
def test_who_only_reads_changes_no_bit(density):
    net, x = MinimalNetwork([64, 24, 16, 10], density, seed=0), torch.randn(9, 64)
    def grads():
        net.zero_grad(); net(x).square().sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]
    seen, a = [], grads()
    def hook(module, args, out): seen.append(out)
    hook.reads = True
    handle = net.acts[0].register_forward_hook(hook); b = grads(); handle.remove()
    assert all(map(torch.equal, a, b)) and len(seen) == 1 and torch.allclose(seen[0], net.trace(x)[1], atol=1e-6)
    for mode in ('auto', 'gather', 'csr', 'dense'):
        for n in (9, 1): MinimalNetwork([64, 24, 16, 10], density, mode=mode)(x[:n]).sub_(1.).sum().backward() # the output is the caller's
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x)) and len(pickle.dumps(net)) < 30000
    net.acts[0] = nn.ReLU()
    assert torch.equal(net(x), net.trace(x)[-1])

def test_a_state_that_does_not_fit_changes_nothing():
    net, x = MinimalNetwork([12, 9, 3], .3), torch.randn(2, 12); y = net(x)
    whole = MinimalNetwork([12, 8, 3], .3).state_dict()
    for state, says in ((MinimalNetwork([12, 9, 7, 3], .3).state_dict(), r'got 4 layers, \[12, 9, 7, 3\], takes 3'),
                        ({k: v for k, v in whole.items() if k != 'links.0_1.values'}, 'got no links.0_1.values between 12 and 8 units'),
                        ({k: v for k, v in whole.items() if k != 'load'}, 'got no load of 11 units')):
        with pytest.raises(ValueError, match=f'state_dict: {says}'): net.load_state_dict(state)
        assert torch.equal(net(x), y) and net.layer_sizes == [12, 9, 3]
    net.load_state_dict(whole); assert net.layer_sizes == [12, 8, 3] and net(x).shape == (2, 3)

def test_resumed_like_unbroken(tmp_path):
    def make():
        g = Growth('extrema', quick(limits=False)); g.scheduler.credits = 50
        return Trainer(MinimalNetwork([64, 20, 16, 10], .05), small(), lr=.01, device='cpu', callbacks=[g]), g
    (a, ga), (b, _) = make(), make()
    a.fit(6); b.fit(3); b.save(tmp_path)
    c, gc = make()
    c.load(tmp_path).fit(3)
    assert ga.events and ga.events == gc.events and list(ga.rows) == list(gc.rows)
    assert all(torch.equal(v, c.model.state_dict()[k]) for k, v in a.model.state_dict().items())

def test_same_seed_same_bits_and_measuring_changes_nothing():
    from plasticity.monitors import Monitor
    states = []
    for watch in (False, False, True):
        net = MinimalNetwork([64, 20, 16, 10], .05)
        more = [Monitor(net)] if watch else []
        t = Trainer(net, small(), lr=.01, device='cpu', callbacks=[Growth(scheduler=quick(limits=False)), *more])
        t.fit(4); states.append(net.state_dict())
    for k, v in states[0].items(): assert torch.equal(v, states[1][k]) and torch.allclose(v.float(), states[2][k].float(), atol=1e-4)

def test_ends_without_extrema():
    net = MinimalNetwork([64, 20, 10], .01)
    t = Trainer(net, small(), lr=1e-6, device='cpu', callbacks=[Growth('none', patience=3)]).fit(20)
    assert t.epoch == 3

def test_multi_scale_network_on_loaders():
    data = torch.utils.data.TensorDataset(torch.randn(200, 1, 8, 8), torch.randint(10, (200,)))
    net = create_multi_scale_network(64, [20], 10, sparsity=.1, activation='relu', scheduler=quick())
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    sched = torch.optim.lr_scheduler.StepLR(opt, 1, .5)
    for e in range(3):
        s = net.train_epoch(torch.utils.data.DataLoader(data, 32), opt, nn.CrossEntropyLoss(), e); sched.step()
        assert math.isclose(opt.param_groups[0]['lr'], .1*.5**(e + 1)) and s['growth_events'] in (0, 1)
    r = net.evaluate(torch.utils.data.DataLoader(data, 50), nn.CrossEntropyLoss())
    assert 0 <= r['performance'] <= 1 and isinstance(net, MultiScaleNetwork)
    net.train_epoch([(torch.randn(9, 64), torch.randint(10, (9,)))], opt, nn.CrossEntropyLoss(), 3)
    net.train_epoch(((torch.randn(9, 64), torch.randint(10, (9,))) for _ in range(2)), opt, nn.CrossEntropyLoss(), 4)

def test_errors_name_the_argument():
    for call, match in ((lambda: MinimalNetwork([5]), 'layer_sizes'), (lambda: MinimalNetwork([5, 2], 0), 'sparsity'),
                        (lambda: MinimalNetwork([5, 2], dense_from=0), 'dense_from: got 0'),
                        (lambda: MinimalNetwork([5, 2], dense_from=40), 'dense_from: got 40'),
                        (lambda: Growth(patience=-3), 'patience: got -3, takes a whole number from 0'),
                        (lambda: Growth(window=0), 'window: got 0'),
                        (lambda: Growth(scale=float('nan')), 'scale: got nan'),
                        (lambda: MinimalNetwork(5), 'layer_sizes: got 5'), (lambda: MinimalNetwork([5, 2.5]), 'layer_sizes'),
                        (lambda: MinimalNetwork([5, 2], sparsity='a'), "sparsity: got 'a'"),
                        (lambda: MinimalNetwork([5, 2], dense_from='a'), "dense_from: got 'a'"),
                        (lambda: create_multi_scale_network(64, 48, 10), 'hidden_sizes: got 48'),
                        (lambda: Growth(scheduler=3), 'scheduler: got a int'), (lambda: Growth(follow=3), 'follow: got 3'),
                        (lambda: apply_growth(nn.Linear(2, 2), None, Proposal(), torch.randn(1, 2)), 'model: got a Linear'),
                        (lambda: apply_growth(MinimalNetwork([5, 2]), None, 3, torch.randn(1, 5)), 'proposal: got a int'),
                        (lambda: GrowthScheduler(threshold='a'), "threshold: got 'a'"),
                        (lambda: GrowthScheduler(window=2.5), 'window: got 2.5'),
                        (lambda: ConnectionRouter(reciprocal=2), 'reciprocal: got 2'),
                        (lambda: ConnectionRouter(reach=1.5), 'reach: got 1.5'),
                        (lambda: ConnectionRouter(clone_factor='a'), "clone_factor: got 'a'"),
                        (lambda: Growth(3), 'router: got a int'), (lambda: ConnectionRouter(clones=-1), 'clones: got -1'),
                        (lambda: GrowthScheduler(spike_credits=-1), 'spike_credits: got -1'),
                        (lambda: GrowthScheduler(growth_threshold='a'), "growth_threshold: got 'a'"),
                        (lambda: MinimalNetwork([5, 2], activation='gelu'), 'activation'), (lambda: make_router('extreme'), 'extrema'),
                        (lambda: ConnectionRouter(reach=4), 'reach'), (lambda: MinimalNetwork([5, 2])(torch.randn(3, 4)), 'x: got'),
                        (lambda: activity(MinimalNetwork([5, 2]), []), 'window')):
        with pytest.raises((ValueError, TypeError), match=match): call()
    with pytest.raises(TypeError, match='MinimalNetwork'):
        Trainer(nn.Linear(64, 10), small(), device='cpu', callbacks=[Growth()]).fit(1)

@pytest.mark.parametrize('router', ['extrema', 'random'])
def test_the_command_line(router, tmp_path):
    pytest.importorskip('hydra_zen')
    import json
    from plasticity.experiments import run_line
    folder = run_line('training=extrema', 'dataset=digits', 'training.epochs=2', 'training.sparsity=.02', 'training.hidden_sizes=[24,16]',
                      'training.activation=relu', 'optimizer.lr=.002', 'training.batch_size=128', 'device=cpu', 'logging.progress=false',
                      f'training.router={router}', 'metrics.metrics_frequency=0', f'hydra.run.dir={tmp_path}/run')
    out = json.loads((folder/'growth.json').read_text())
    start = sum(max(1, int(a*b*.02)) for a, b in ((64, 24), (24, 16), (16, 10)))
    c = out['connectivity']
    assert c['total_active_connections'] == start + c['links_added'] + sum(e['connections_added'] for e in out['events'])
    assert c['outputs_reached'] == 10 and len(out['rows']) == 2

@pytest.mark.parametrize('mode', ['csr', 'dense'])
def test_other_ways_compute_the_same_network(mode):
    x = torch.randn(9, 30)
    a, b = (MinimalNetwork([30, 20, 15, 5], .2, mode=m) for m in ('gather', mode))
    for net in (a, b): apply_growth(net, None, ConnectionRouter().propose(net, forced(net, 2)), x, g=torch.Generator().manual_seed(1))
    assert torch.allclose(a(x), b(x), atol=1e-6) and (b._program() is None) == (mode == 'csr')
    grads = []
    def seen(m): return m.values.grad[m.keys()] if m.full else m.values.grad
    for net in (a, b): net(x).square().sum().backward(); grads.append([seen(m) for m in net.links.values() if m.values.grad is not None])
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(*grads, strict=True))

@pytest.mark.parametrize('kind', ['on and off', 'nine in ten zero', 'clipped', 'rounded'])
def test_spikes_of_noise_with_repeated_values(kind):
    "Halves of equal values differ by round-off alone, which is no change"
    n = torch.randn(1519, generator=torch.Generator().manual_seed(2))
    x = {'on and off': (n < -1.3).float(), 'nine in ten zero': (n - 1.3).clamp(min=0), 'clipped': (1.4 + .5*n).clamp(max=1.),
         'rounded': (1 + .003*n).bfloat16()}[kind]
    for scale in (1., 1e-4, 3e5): assert spikes(scale*x.float()).double().mean() < .05

def test_loaders_of_every_kind():
    "A loader over a stream is gathered; no batches and batches that are no pairs are refused by name"
    x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    class Flow(IterableDataset):
        def __iter__(self): return iter(zip(x, y, strict=True))
    def net(): return create_multi_scale_network(6, [5], 3, sparsity=.5)
    def epoch(loader):
        n = net()
        return n.train_epoch(loader, torch.optim.SGD(n.parameters(), lr=.1), nn.CrossEntropyLoss(), 0)
    flow = epoch(DataLoader(Flow(), batch_size=8))
    pairs = iter([*zip(x.split(8), y.split(8), strict=True)])
    assert flow['loss'] == epoch(DataLoader(TensorDataset(x, y), batch_size=8))['loss'] == epoch(pairs)['loss']
    for empty in ([], DataLoader(TensorDataset(x[:0], y[:0])), iter(())):
        with pytest.raises(ValueError, match='loader: got no batches'): epoch(empty)
    with pytest.raises(TypeError, match='loader: got a dict as a batch, takes a pair'): epoch([dict(x=x, y=y)])
    with pytest.raises(ValueError, match='loader: got no batches'): net().evaluate([], nn.CrossEntropyLoss())

def test_an_epoch_without_gradients_of_links():
    net = create_multi_scale_network(6, [5], 3, sparsity=.3)
    for p in net.network.links.parameters(): p.requires_grad_(False)
    batch, opt = (torch.randn(8, 6), torch.randint(3, (8,))), torch.optim.SGD([net.network.bias], lr=.1)
    stats = net.train_epoch([batch, batch], opt, nn.CrossEntropyLoss(), 0)
    assert math.isfinite(stats['loss']) and stats['gradient_norm'] == 0

def test_activity_of_sequences_by_hand():
    net, x = MinimalNetwork([5, 9, 3], .5, seed=1), torch.randn(4, 6, 5)
    before, h = None, []
    for t in range(6): before = net.trace(x[:, t], before); h.append(before)
    for k, s in enumerate(activity(net, [x[:2], x[2:]])):
        v = torch.cat([step[k] for step in h])
        assert torch.allclose(s['mean'], v.mean(0), atol=1e-6) and torch.allclose(s['zero'], (v == 0).double().mean(0).to(s['zero']))
    net = create_multi_scale_network(5, [9, 7], 3, sparsity=.3)
    stats = net.train_epoch([(x, torch.randn(4, 6, 3))], torch.optim.SGD(net.parameters(), lr=.1), nn.MSELoss(), 0)
    assert math.isfinite(stats['loss'])
