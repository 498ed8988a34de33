"Pruning: units for real, weights as masks; criteria by hand; what is saved"
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plasticity.data import Data
from plasticity.depth import twin_attention
from plasticity.edits import Widen, edit
from plasticity.models import make_model, num_parameters
from plasticity.pruning import CRITERIA, IterativePruning, Masks, chosen, importance, macs, prune_units, pruned_like, weak_units
from plasticity.results import generator
from plasticity.training import Trainer
from plasticity.units import EditError, units

torch.set_num_threads(1)
MADE = dict(mlp=((12,), dict(hidden_sizes=(10, 8))), cnn=((3, 8, 8), dict(channels=(4, 6), hidden_sizes=(8,), normalization='batch')),
            resnet=((3, 8, 8), dict(channels=4, blocks=(1, 1))), vit=((3, 8, 8), dict(embed_dim=16, depth=2, num_heads=4, patch_size=4)))

def built(name, seed=0):
    shape, options = MADE[name]
    m, g = make_model(name, shape, 5, seed=seed, **options), generator(seed, 'weights')
    with torch.no_grad():
        for p in m.parameters(): p.add_(.1*torch.randn(p.shape, generator=g))
    x = torch.randn(16, *shape, generator=generator(seed, 'x'))
    m.train()
    for _ in range(3): m(x)                                                                  # running statistics
    return m.eval(), x

def batch(x, seed=0): return x, torch.randint(5, (len(x),), generator=generator(seed, 'y'))

@pytest.mark.parametrize('name', MADE)
@pytest.mark.parametrize('criterion', ['magnitude', 'outgoing', 'activation', 'taylor', 'group'])
def test_pruned_equals_masked(name, criterion):
    m, x = built(name)
    scores = importance(m, x, criterion, data=batch(x))
    gone = chosen(scores, .5)
    masked, _ = built(name)
    with torch.no_grad():
        for g in units(masked, x):
            for t, d in g.consumers if g.name in gone else ():
                masked.get_parameter(t).index_fill_(d, g.maps[t, d][gone[g.name]].flatten(), 0.)
    before = num_parameters(m)
    prune_units(m, x, .5, criterion, data=batch(x))
    with torch.no_grad(): a, b = m(x), masked(x)
    assert gone and num_parameters(m) < .8*before
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('name', MADE)
def test_a_unit_that_nothing_reads_goes_without_a_trace(name):
    m, x = built(name)
    opt = torch.optim.Adam(m.parameters())
    F.cross_entropy(m(x), batch(x)[1]).backward(); opt.step()
    g = next(g for g in units(m, x) if 'prune' not in g.blocked and g.axis == 'unit')
    with torch.no_grad():
        for t, d in g.consumers: m.get_parameter(t).index_fill_(d, g.maps[t, d][0], 0.)
        before, size = m(x), num_parameters(m)
    held = lambda: sum(v.numel() for s in opt.state.values() for v in s.values() if v.dim())
    state, own = held(), 0
    for p, dims in {t: [d for u, d in g.maps if u == t] for t in g.tensors}.items():
        if p not in dict(m.named_parameters()): continue
        shape = m.get_parameter(p).shape
        left = math.prod(n - (g.maps[p, d].shape[1] if d in dims else 0) for d, n in enumerate(shape))
        own += math.prod(shape) - left
    prune_units(m, x, index={g.name: [0]}, optimizer=opt)
    with torch.no_grad(): assert (m(x) - before).abs().max() <= 1e-6
    assert size - num_parameters(m) == own and state - held() == 2*own

def test_criteria_by_hand():
    m, x = built('mlp')
    x, y = batch(x)
    w, b, v = m.layers[0].linear.weight, m.layers[0].linear.bias, m.layers[1].linear.weight
    h = F.relu(F.linear(x, w, b)).detach()
    name = units(m, x)[0].name
    s = {c: importance(m, x, c, data=(x, y))[name] for c in CRITERIA}
    torch.testing.assert_close(s['magnitude'], w.norm(dim=1)); torch.testing.assert_close(s['outgoing'], v.norm(dim=0))
    torch.testing.assert_close(s['activation'], h.abs().mean(0))
    torch.testing.assert_close(s['group'], (w.square().sum(1) + b.square() + v.square().sum(0)).sqrt())
    z = h.clone().requires_grad_()
    loss = F.cross_entropy(m.head(m.layers[1](z)), y)
    g, = torch.autograd.grad(loss, z)
    torch.testing.assert_close(s['taylor'], (g*h).sum(0).abs())

def test_taylor_is_the_change_of_the_loss_to_first_order():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(32, 4).double(), torch.randint(3, (32,))
    with torch.no_grad(): m[2].weight *= 1e-3
    s = importance(m, x, 'taylor', data=(x, y))
    base, name = F.cross_entropy(m(x), y), units(m, x)[0].name
    for u in range(6):
        kept = m[2].weight.detach().clone()
        with torch.no_grad(): m[2].weight[:, u] = 0
        change = (F.cross_entropy(m(x), y) - base).abs().item()
        with torch.no_grad(): m[2].weight.copy_(kept)
        assert abs(change - s[name][u].item()) < 1e-6

def test_global_takes_the_weakest_of_all_layers_and_leaves_one():
    scores = dict(a=torch.tensor([1., 1., 1., 1.]), b=torch.tensor([1e-3, 2., 2.]))
    assert {k: v.tolist() for k, v in chosen(scores, 1/7, 'global').items()} == dict(b=[0])
    gone = chosen(dict(a=torch.ones(4)*1e-9, b=torch.ones(4)), .9, 'global', relative=False)
    assert len(gone['a']) == 3 and len(gone['b']) == 3
    assert {k: len(v) for k, v in chosen(scores, .5).items()} == dict(a=2, b=1)
    for wrong in (-.1, 1.): 
        with pytest.raises(ValueError, match='ratio'): chosen(scores, wrong)
    with pytest.raises(ValueError, match='scope'): chosen(scores, .5, 'everywhere')

def test_wrong_criterion_and_missing_data_are_told():
    m, x = built('mlp')
    with pytest.raises(ValueError, match='criterion'): importance(m, x, 'magnitud')
    with pytest.raises(ValueError, match='data'): importance(m, x, 'taylor')
    assert set(importance(m, x, lambda g, e: torch.arange(float(g.n)))) == {g.name for g in units(m, x)}

def test_weak_units_are_those_without_a_strong_outgoing_weight():
    m, x = built('mlp')
    g = units(m, x)[0]
    with torch.no_grad(): m.layers[1].linear.weight[:, [2, 5]] = 1e-4
    assert weak_units(m, x, .01)[g.name].tolist() == [2, 5]
    assert all(len(v) < units(m, x)[k].n for k, v in weak_units(m, x, 1e9).items())            # one stays

def test_masks_save_nothing_and_say_so():
    m, x = built('mlp')
    masks = Masks(m, share=.6)
    n = num_parameters(m)
    zeros = sum((p == 0).sum().item() for k, p in m.named_parameters() if p.dim() > 1)
    total = sum(p.numel() for k, p in m.named_parameters() if p.dim() > 1)
    assert abs(zeros/total - .6) < .02 and num_parameters(m) == n and 'saves nothing' in repr(masks)
    assert masks.zeros == zeros and Masks(built('mlp')[0], threshold=.05).zeros > 0

@pytest.mark.parametrize('scope', ['global', 'layer'])
def test_masks_take_the_smallest(scope):
    m, _ = built('mlp')
    old = {k: p.detach().clone() for k, p in m.named_parameters() if p.dim() > 1}
    Masks(m, share=.5, scope=scope)
    if scope == 'layer':
        for k in old: assert abs((m.get_parameter(k) == 0).float().mean().item() - .5) < .02
    else:
        flat = torch.cat([w.abs().flatten() for w in old.values()])
        cut = flat.sort().values[round(.5*len(flat)) - 1]
        for k, w in old.items(): assert torch.equal(m.get_parameter(k) == 0, w.abs() <= cut)

@pytest.mark.parametrize('start', ['copy', 'zero'])
def test_masks_stay_through_training_and_edits(start):
    x = torch.randn(64, 12, generator=generator(0, 'd')); y = (x[:, 0] > 0).long()
    m, masks = built('mlp')[0], None
    m.train(); masks = Masks(m, share=.5)
    t = Trainer(m, Data('d', x, y, x, y), batch_size=16, device='cpu', lr=.01, callbacks=[masks]).fit(1)
    before = masks.zeros
    assert sum((m.get_parameter(k) == 0).sum().item() for k in masks.gone) == before
    with edit(m, t.optimizer, x[:2], ema=[masks.gone]) as e: e.do(Widen('layers.0.linear', 2, source=[-1], start=start))
    w = m.layers[0].linear.weight
    if start == 'zero': assert masks.zeros == before and not masks.gone['layers.0.linear.weight'][-2:].isinf().any()
    t.fit(1)
    assert torch.equal(w[:10] == 0, masks.gone['layers.0.linear.weight'][:10].isinf())
    if start == 'zero': assert (m.layers[1].linear.weight[:, -2:] != 0).all()                  # new links are free

@pytest.mark.parametrize(('depth', 'want', 'params'), [(18, (1822177768, 487.2), 11689512)])
def test_macs_of_resnet18_before_and_after(depth, want, params):
    m = make_model('resnet', (3, 224, 224), 1000, seed=0, depth=depth).eval()
    x = torch.zeros(1, 3, 224, 224)
    assert macs(m, x) == want[0] and num_parameters(m) == params
    prune_units(m, x[..., :64, :64], .5)
    assert abs(macs(m, x)/1e6 - want[1]) < .05 and abs(num_parameters(m)/1e6 - 3.056) < .0005

def test_macs_agree_with_torch_pruning():
    tp = pytest.importorskip('torch_pruning')
    for name in ('mlp', 'cnn', 'resnet'):
        m, x = built(name)
        assert macs(m, x[:1]) == tp.utils.count_ops_and_params(m, x[:1])[0], name

def test_iterative_pruning_ends_at_the_ratio_and_recovers():
    x = torch.randn(256, 12, generator=generator(0, 'd')); y = (x[:, 0]*x[:, 1] > 0).long()
    m = make_model('mlp', 12, 2, seed=0, hidden_sizes=(40, 20))
    c = IterativePruning(.5, rounds=5, every=10)
    t = Trainer(m, Data('d', x, y, x, y), batch_size=32, device='cpu', lr=.01, callbacks=[c]).fit(20)
    assert m.sizes()['hidden_sizes'] == (20, 10) and [e['step'] for e in c.events] == [10, 20, 30, 40, 50]
    assert t.history.last('loss', split='train') < t.history[1]['loss']

def test_pruned_like_gives_the_small_network_fresh():
    m, x = built('resnet')
    prune_units(m, x, .5)
    fresh = pruned_like(m)
    assert num_parameters(fresh) == num_parameters(m) and not torch.equal(fresh.head.weight, m.head.weight)

def test_where_nothing_can_go_the_reason_is_told():
    m, x = make_model('mlp', 12, 3, seed=0, hidden_sizes=(9, 7), normalization='layer'), torch.randn(4, 12)
    with pytest.raises(EditError, match='layers.0.linear: MixedUnits.*approx=True'): prune_units(m, x, .5)
    assert num_parameters(m) == num_parameters(make_model('mlp', 12, 3, hidden_sizes=(9, 7), normalization='layer'))
    prune_units(m, x, .5, approx=True)
    assert m.sizes()['hidden_sizes'] == (5, 4)

@pytest.mark.parametrize(('options', 'name'), [
    (dict(ratio='a'), 'ratio'), (dict(rounds=0), 'rounds'), (dict(criterion='tailor'), 'criterion'), (dict(scope='all'), 'scope'),
    (dict(at_least=0), 'at_least'), (dict(every=0), 'every')])
def test_iterative_pruning_looks_at_its_arguments(options, name):
    with pytest.raises(ValueError, match=f'^{name}: got'): IterativePruning(**options)

def test_masks_and_weak_units_look_at_their_arguments():
    m, x = built('mlp')
    for name, f in dict(share=lambda: Masks(m, share='a'), threshold=lambda: Masks(m, threshold=-1.)).items():
        with pytest.raises(ValueError, match=f'^{name}: got'): f()
    with pytest.raises(ValueError, match='^threshold: got'): weak_units(m, x, 'a')
    with pytest.raises(ValueError, match='^at_least: got'): chosen(dict(a=torch.ones(3)), .5, at_least=0)

class Read(nn.Module):
    "Units that a buffer reads"
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.register_buffer('w', torch.randn(3, 10, generator=generator(0, 'w')))
    def forward(self, x): return F.linear(self.a(x).relu(), self.w)

def test_a_buffer_reads_units_too():
    m, x = Read(), torch.randn(16, 6)
    assert weak_units(m, x, .01) == {}
    m.w[:, [2, 7]] = 1e-4
    (name, gone), = weak_units(m, x, .01).items()
    assert gone.tolist() == [2, 7]
    torch.testing.assert_close(importance(m, x, 'outgoing')[name], m.w.norm(dim=0))
    h = m.a(x).relu().detach().requires_grad_()
    g, = torch.autograd.grad(F.linear(h, m.w).square().mean(), h)
    s = importance(m, x, 'taylor', data=(x, torch.zeros(16, 3)))[name]
    torch.testing.assert_close(s, (g*h).sum(0).abs()); assert not m.w.requires_grad

def test_frozen_weights_have_a_taylor_importance():
    m, x = built('mlp')
    a = importance(m, x, 'taylor', data=batch(x))
    m.layers[1].requires_grad_(False)
    b = importance(m, x, 'taylor', data=batch(x))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert [n for n, p in m.named_parameters() if not p.requires_grad] == ['layers.1.linear.weight', 'layers.1.linear.bias']

def test_macs_of_attention_and_recurrent_layers():
    t, e, f = 5, 32, 64
    layer, x = nn.TransformerEncoderLayer(e, 4, f, batch_first=True), torch.randn(2, t, e)
    assert macs(layer, x) == t*(3*e*e + 3*e + e*e + e + e*f + f + f*e + e + 4*e)
    assert macs(twin_attention(layer), x) == t*(3*e*e + 3*e + e*e + e + e*f + f + f*e + e + 4*e)
    class Across(nn.Module):
        def __init__(self): super().__init__(); self.att = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, bias=False, batch_first=True)
        def forward(self, q, k, v): return self.att(value=v, key=k, query=q)[0]
    assert macs(Across(), (torch.randn(1, 4, 8), torch.randn(1, 6, 3), torch.randn(1, 6, 5))) == 4*8*8 + 6*8*3 + 6*8*5 + 4*8*8
    class Last(nn.Module):
        def __init__(self, **options): super().__init__(); self.rnn = nn.LSTM(8, 16, batch_first=True, **options)
        def forward(self, x): return self.rnn(x)[0][:, -1]
    assert macs(Last(), torch.randn(2, 7, 8)) == 7*4*16*(8 + 16 + 2)
    assert macs(Last(bidirectional=True, num_layers=2), torch.randn(2, 7, 8)) == 7*2*4*16*(8 + 16 + 2 + 32 + 16 + 2)

def test_iterative_pruning_of_all_layers_together():
    x = torch.randn(64, 12, generator=generator(0, 'd')); y = (x[:, 0] > 0).long()
    m = make_model('mlp', 12, 2, seed=0, hidden_sizes=(40, 20))
    c = IterativePruning(.5, rounds=3, every=2, scope='global')
    Trainer(m, Data('d', x, y, x, y), batch_size=32, device='cpu', callbacks=[c]).fit(4)
    assert sum(m.sizes()['hidden_sizes']) == 30
