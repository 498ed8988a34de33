"Cloning: exact for every model, norm and factor; what stays on the manifold and what leaves it"
import copy

import pytest
import torch
from torch import nn

from plasticity.cloning import clone
from plasticity.edits import EditRecord, replay
from plasticity.metrics import clone_r2
from plasticity.models import make_model
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
