"Edge cases of chapter 13b"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from plasticity.aging import (_spearman, Counted, Learner, age_rows, correlations, member_activations, member_report, member_rows, packed,
                              rounded, spearman, unpacked)
from plasticity.member_optimizers import MemberAdam, MemberSGD
from plasticity.metrics import dead_fraction, duplicate_fraction, effective_rank, rank_at, report
from plasticity.models import make_model
from plasticity.population import Population
from plasticity.results import generator

torch.set_num_threads(1)
SMALL = dict(mlp=dict(hidden_sizes=(12, 9)), cnn=dict(channels=(4, 6), hidden_sizes=(9,)), resnet=dict(channels=4, blocks=(1, 1)),
             vit=dict(embed_dim=8, depth=2, num_heads=2, patch_size=4))

def made(name, n=2, norm='none'):
    return Population(lambda: make_model(name, (3, 8, 8), 5, normalization=norm, **SMALL[name]), n, engine='vmap')

def draw(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, 'x'))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs):
    x, y = zip(*pairs, strict=True)
    mine, theirs = spearman(x, y), spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else math.nan
    assert abs(mine - theirs) < 1e-9 or math.isnan(mine) and math.isnan(theirs)

@pytest.mark.parametrize('norm', ['none', 'batch', 'layer'])
@pytest.mark.parametrize('name', SMALL)
def test_every_member_is_reported_as_alone(name, norm):
    pop, x, y = made(name, norm=norm), draw(20, 3, 8, 8), torch.arange(20) % 5
    for p in pop.parameters(): p.data += .1*torch.randn(p.shape, generator=generator(1))
    out = member_report(pop, x, y, start=[p.detach().clone() for p in pop.parameters()])
    for i in range(2):
        net = pop.member(i)
        rows = report(net, (x, y), layers='*act', definitions=['dead_fraction', 'duplicate_fraction', 'effective_rank'])
        for mine, theirs in (('dead', 'dead_fraction'), ('duplicates', 'duplicate_fraction'), ('effective_units', 'effective_rank')):
            v = rows.where(metric=theirs).column('value')
            assert abs(out[mine][i].item() - sum(v)/len(v)) < 1e-3, mine
        loss = torch.nn.functional.cross_entropy(net.eval()(x), y)
        assert abs(loss.item() - out['new_loss'][i].item()) < 1e-4
        grads = torch.autograd.grad(loss, list(net.parameters()))
        assert abs(sum(g.pow(2).sum() for g in grads).sqrt().item()/out['new_gradient'][i].item() - 1) < 1e-3
    assert out['distance'].abs().max() == 0

def test_reporting_changes_nothing():
    pop, x, y = made('resnet', norm='batch'), draw(6, 3, 8, 8), torch.arange(6) % 5
    pop(x)
    before = {k: v.clone() for k, v in pop.state_dict().items()}
    member_report(pop, x, y)
    assert pop.net.training and all(torch.equal(v, before[k]) for k, v in pop.state_dict().items())
    assert not any(m._forward_hooks for m in pop.net.modules()) and all(p.grad is None for p in pop.parameters())

def test_own_inputs():
    pop, x, y = made('mlp', 3), draw(3, 10, 3, 8, 8), torch.arange(30).view(3, 10) % 5
    own = member_report(pop, x, y, own=True)
    for i in range(3):
        shared = member_report(pop, x[i], y[i])
        assert all(abs(own[k][i] - shared[k][i]) < 1e-4 for k in own)

def test_rows_of_maps_are_dead_only_where_no_position_is_active():
    h = torch.zeros(2, 10, 3, 4, 4)
    h[0, :, 1, 2, 3] = 1.
    rows = member_rows(torch.nn.ReLU(), h)
    assert dead_fraction(rows).tolist() == pytest.approx([2/3, 1.])
    assert rows.x.shape == (2, 160, 3) and member_rows(torch.nn.ReLU(), h, rows=7).x.shape == (2, 7, 3)
    tokens = member_rows(torch.nn.GELU(), torch.randn(2, 5, 7, 3))
    assert tokens.x.shape == (2, 35, 3) and torch.equal(tokens.top, tokens.x.abs())
    for f in (duplicate_fraction, effective_rank, rank_at): assert f(tokens).shape == (2,)

def test_a_layer_pattern_without_a_module():
    with pytest.raises(ValueError, match='matches no module'): member_activations(made('mlp'), draw(2, 3, 8, 8), layers='nothing*')

@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('own', [False, True])
def test_counted_steps_train_as_plain_ones(steps, own):
    from plasticity.population import Step
    shape = (12, 2, 4) if own else (12, 4)
    x, y = draw(*shape, 3, 8, 8), torch.randint(5, shape, generator=generator(3))
    a, b = made('mlp'), made('mlp')
    learner = Learner(a, lambda p: MemberAdam(p.parameters(), lr=.01), steps=steps, own=own)
    got = learner.learn(lambda i, j: (x[i:j], y[i:j]) if steps > 1 else (x[i], y[i]), 12)
    plain = Step(b, MemberAdam(b.parameters(), lr=.01), own=own)
    want = torch.stack([plain(u, v) for u, v in zip(x, y, strict=True)])
    assert torch.allclose(got['losses'], want) and got['losses'].shape == got['hits'].shape == (12, 2)
    first = a.net.training and learner.reset().population(x[0], own=own)
    hits = (first.argmax(-1) == y[0]).float().mean(-1)
    assert torch.allclose(hits, got['hits'][0]) and learner.done == 0

def test_hits_are_counted_among_the_classes_of_a_mask():
    mask = torch.tensor([-math.inf, 0, 0, -math.inf, -math.inf])
    pop = made('mlp')
    step = Counted(pop, MemberSGD(pop.parameters(), lr=0.), lambda o, y: torch.nn.functional.cross_entropy(o + mask, y), lambda o: o + mask)
    x = draw(50, 3, 8, 8)
    one, two = (step(x, torch.full((50,), c)) for c in (1, 2))
    assert torch.allclose(one[1] + two[1], torch.ones(2)) and torch.isfinite(one[0]).all()

def test_l2_init_keeps_its_anchor_when_put_back():
    pop, x, y = made('mlp'), draw(8, 3, 8, 8), torch.arange(8) % 5
    learner = Learner(pop, lambda p: MemberAdam(p.parameters(), lr=.1, l2_init=.5))
    first = learner.learn(lambda i, j: (x, y), 4)['losses']
    assert torch.equal(learner.reset().learn(lambda i, j: (x, y), 4)['losses'], first)

def test_steps_that_do_not_divide():
    learner = Learner(made('mlp'), lambda p: MemberSGD(p.parameters(), lr=.1), steps=3)
    with pytest.raises(ValueError, match='multiple of 3'): learner.learn(None, 4)

def test_after_is_called_between_calls():
    seen = []
    learner = Learner(made('mlp'), lambda p: MemberSGD(p.parameters(), lr=.1), lambda who, done: seen.append(done), steps=2)
    x, y = draw(2, 4, 3, 8, 8), torch.zeros(2, 4, dtype=torch.long)
    learner.learn(lambda i, j: (x, y), 6)
    assert seen == [2, 4, 6]

def test_correlations():
    rows = [dict(run=i//3, arm=i % 2, a=float(i), b=1., gap=-float(i)) for i in range(12)]
    t = correlations(rows, ['b', 'a'], repeats=20)
    assert t[0]['metric'] == 'a' and t[0]['rho'] == pytest.approx(-1) and t[0]['runs'] == 4 and math.isnan(t[1]['rho'])
    assert t[0]['low'] == pytest.approx(-1) and t[0]['high'] == pytest.approx(-1)
    shifted = [r | dict(a=r['a'] + 100*r['arm']) for r in rows]
    a, b = (correlations(r, ['a'], within=('arm',), repeats=5)[0]['rho'] for r in (shifted, rows))
    assert a == pytest.approx(b)
    with pytest.raises(ValueError, match="no 'ded'"): correlations([dict(dead=1, gap=1, run=1)], ['ded'])
    with pytest.raises(ValueError, match='got none'): correlations([], ['a'])

def test_runs_are_drawn_whole():
    g = generator(0)
    rows = [dict(run=i, a=v, gap=v + .1*torch.rand(1, generator=g).item()) for i, v in enumerate(torch.rand(10, generator=g).tolist())]
    many = [r | dict(age=k) for r in rows for k in range(10)]
    one, ten = correlations(rows, ['a'])[0], correlations(many, ['a'])[0]
    assert ten['low'] == pytest.approx(one['low'], abs=.1) and ten['points'] == 100 and ten['runs'] == 10

def test_rows_of_an_age():
    rows = age_rows(3, dict(dead=torch.tensor([.1, .2])), torch.tensor([.5, .6]), torch.tensor([.7, .6]), ['a', 'b'])
    assert [r['arm'] for r in rows] == ['a', 'b'] and rows[0]['gap'] == pytest.approx(-.2) and rows[1]['dead'] == pytest.approx(.2)

def test_rows_survive_packing():
    rows = [dict(run=i, arm='a', dead=i/3, on=True) for i in range(3)]
    back = unpacked(packed(rows))
    assert [r['run'] for r in back] == [0, 1, 2] and back[1]['dead'] == pytest.approx(1/3, abs=1e-5) and back[0]['on'] is True
    assert rounded(torch.tensor([[1/3]]), 2) == [[.33]] and rounded(dict(a=(1, None))) == dict(a=[1, None])
    assert math.isnan(rounded(math.nan))
    with pytest.raises(ValueError, match='keys differ'): packed([dict(a=1), dict(b=1)])

@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=3, max_size=12))
def test_counting_twice_is_drawing_twice(points):
    x, y, w = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    if w.sum() < 2: return
    weighted, drawn = _spearman(x, y, w).item(), spearman(x.repeat_interleave(w.long()), y.repeat_interleave(w.long()))
    assert abs(weighted - drawn) < 1e-9 or math.isnan(weighted) and math.isnan(drawn)

def test_a_member_that_diverged_stops_nobody():
    pop, x, y = made('mlp'), draw(20, 3, 8, 8), torch.arange(20) % 5
    alone = member_report(pop, x, y)
    next(pop.parameters()).data[0].fill_(math.nan)
    out = member_report(pop, x, y)
    assert all(out[k][1] == pytest.approx(alone[k][1].item()) for k in out) and out['new_loss'][0].isnan()
    rows = [dict(run=i, a=math.nan if i == 3 else float(i), gap=float(i)) for i in range(6)]
    assert correlations(rows, ['a'], repeats=5)[0]['points'] == 5
    with pytest.raises(ValueError, match='none is finite'): correlations(rows[3:4], ['a'])

class _Sequence(torch.nn.Module):
    "Units in the middle: (samples, units, positions)"
    def __init__(self):
        super().__init__()
        self.c, self.act, self.o = torch.nn.Conv1d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Linear(4, 3)
    def forward(self, x): return self.o(self.act(self.c(x)).mean(2))

def test_units_after_a_convolution_over_time():
    pop = Population(_Sequence, seeds=[0, 1])
    with torch.no_grad():
        for n, p in pop.net.named_parameters():
            if n.endswith('c.bias'): p[:, :2] = -100  # two of four
    x, y = draw(32, 2, 20), torch.zeros(32, dtype=torch.long)
    assert member_report(pop, x, y)['dead'].tolist() == [.5, .5]
    assert [r['value'] for r in report(pop.member(0), (x, y), layers='*act').where(metric='dead_fraction', layer='act')] == [.5]
