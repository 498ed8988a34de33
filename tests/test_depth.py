"Depth and heads: twins, insertion"
import copy, itertools

import pytest
import torch
from torch import nn

from plasticity.depth import Residual, TwinAttention, deeper, identity_layer, silence, twin_attention
from plasticity.edits import edit, replay
from plasticity.surgery import Surgeon
from plasticity.units import units

@pytest.fixture(autouse=True)
def slow_path():
    "The original without its fused inference kernel, which rounds differently"
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(was)

def masks(B, L, S, H):
    hidden = torch.zeros(B, S, dtype=torch.bool); hidden[0, -1] = True
    causal = torch.triu(torch.ones(L, S, dtype=torch.bool), 1)
    each = torch.randn(B * H, L, S)
    for padding, mask in itertools.product((None, hidden, torch.zeros(B, S).masked_fill(hidden, float('-inf'))),
                                           (None, causal, causal * -3., each)):
        yield dict(key_padding_mask=padding, attn_mask=mask)
    yield dict(attn_mask=causal, is_causal=True)

@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('options',
                         [{}, dict(bias=False), dict(add_bias_kv=True), dict(add_zero_attn=True),
                          dict(add_bias_kv=True, add_zero_attn=True),
                                     dict(kdim=10, vdim=6), dict(kdim=10, vdim=6, bias=False, add_zero_attn=True)], ids=str)
def test_a_twin_is_its_original(options, batch_first):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).eval(); twin = TwinAttention(mha)
    assert {k: v.data_ptr() for k, v in mha.state_dict().items()} == {k: v.data_ptr() for k, v in twin.state_dict().items()}
    B, L, S = 2, 5, 7
    q, k, v = torch.randn(B, L, 12), torch.randn(B, S, options.get('kdim', 12)), torch.randn(B, S, options.get('vdim', 12))
    inputs = [(q, k, v, S)] if 'kdim' in options else [(q, k, v, S), (q, q, q, L), (q, k, k, S)]
    for *qkv, keys in inputs:
        if not batch_first:
            swapped = {id(t): t.transpose(0, 1) for t in qkv}; qkv = [swapped[id(t)] for t in qkv]
        for kw, weights, average in itertools.product(masks(B, L, keys, 3), (True, False), (True, False)):
            kw = dict(kw, need_weights=weights, average_attn_weights=average)
            for a, b in zip(mha(*qkv, **kw), twin(*qkv, **kw), strict=True):
                assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())
    single = [t[0] for t in (q, k, v)]
    assert torch.equal(mha(*single)[0], twin(*single)[0]) and mha(*single)[1].shape == twin(*single)[1].shape

@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_encoders_with_twins(norm_first, training):
    torch.manual_seed(0)
    enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, dropout=0., batch_first=True, norm_first=norm_first), 2,
                                enable_nested_tensor=False).train(training)
    x, mask = torch.randn(2, 5, 12), nn.Transformer.generate_square_subsequent_mask(5)
    y = enc(x), enc(x, mask=mask, is_causal=True)
    names = list(enc.state_dict())
    twin_attention(enc)
    assert torch.equal(enc(x), y[0]) and torch.equal(enc(x, mask=mask, is_causal=True), y[1]) and list(enc.state_dict()) == names

def test_gradients_and_optimizer_do_not_notice_a_twin():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0., batch_first=True), nn.Linear(8, 2)); other = copy.deepcopy(net)
    opt, same = (torch.optim.Adam(m.parameters()) for m in (net, other)); x = torch.randn(3, 4, 8)
    for i in range(4):
        if i == 2: twin_attention(net)
        for m, o in ((net, opt), (other, same)): o.zero_grad(); m(x).square().mean().backward(); o.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))

def test_heads_of_a_twin_are_units():
    torch.manual_seed(0)
    enc = twin_attention(nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), 2,
                                               enable_nested_tensor=False).eval().double())
    x = torch.randn(2, 5, 12).double(); y = enc(x).detach()
    heads = [g for g in units(enc, x) if g.axis == 'head']
    assert [g.n for g in heads] == [3, 3]
    with edit(enc, None, x) as e: e.widen(heads[0], 2); e.clone(heads[1], 2)
    assert torch.allclose(enc(x), y, atol=1e-12) and [m.num_heads for m in enc.modules() if isinstance(m, TwinAttention)] == [5, 6]
    masked = copy.deepcopy(enc)
    with torch.no_grad(): masked.layers[0].self_attn.out_proj.weight[:, 4:8] = 0
    with edit(enc, None, x) as f: f.prune(units(enc, x)[heads[0].name], [1])
    assert torch.allclose(enc(x), masked(x), atol=1e-12)
    for r in (f.record, e.record): replay(enc, r.inverse())
    assert torch.equal(enc(x), y)

def test_a_subclass_with_its_own_forward_is_left_alone():
    class Own(nn.MultiheadAttention):
        def forward(self, x): return x
    with pytest.raises(TypeError, match='own'): twin_attention(nn.Sequential(Own(4, 2)))
    with pytest.raises(TypeError, match='bool or floating'):
        TwinAttention(nn.MultiheadAttention(4, 2))(*[torch.randn(1, 3, 4)] * 3, attn_mask=torch.ones(3, 3).long())

@pytest.mark.parametrize('dims', [0, 1, 2, 3])
def test_new_layers_do_nothing(dims):
    x = torch.randn(2, *([4] + [5] * dims if dims else [3, 4]))
    assert torch.equal(identity_layer(4, dims)(x.relu()), x.relu()) and torch.equal(Residual(4, 6, nn.Tanh(), dims)(x), x)

@pytest.mark.parametrize('make,shape,at', [
    (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 1)), (2, 3, 6), '0'),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)), (2, 3, 6, 6), '0'),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)), (2, 3, 6, 6), '3'),
    (lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 2)), (2, 7, 4), '1'),
    (lambda: nn.ModuleDict(dict(a=nn.Linear(4, 5))) and Named(), (2, 4), 'a')])
def test_insertion_into_other_shapes(make, shape, at):
    torch.manual_seed(0); net = make().eval(); x = torch.randn(shape); y = net(x).detach()
    opt = torch.optim.SGD([dict(params=[p for p in net.parameters() if p.dim() > 1], weight_decay=.1),
                           dict(params=[p for p in net.parameters() if p.dim() < 2])], .1)
    s = Surgeon(net, opt); s.run(deeper(net, at, [((x,), {})]))
    assert torch.equal(net(x), y)
    assert all(p.dim() > 1 for p in opt.param_groups[0]['params']) and sum(len(g['params']) for g
                                                                           in opt.param_groups) == len(list(net.parameters()))
    s.rollback()
    assert torch.equal(net(x), y) and sum(len(g['params']) for g in opt.param_groups) == len(list(net.parameters()))

class Named(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
    def forward(self, x): return self.b(self.a(x).tanh())

def test_silence_leaves_what_it_cannot_silence():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh()); before = [p.clone() for p in block.parameters()]
    assert not silence(block, [((torch.randn(3, 4),), {})])
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), before, strict=True))

def test_a_layer_inserted_under_an_optimizer_that_makes_states_at_birth():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)); x = torch.randn(5, 3)
    opt = torch.optim.Adagrad(net.parameters(), initial_accumulator_value=.3); net(x).sum().backward(); opt.step()
    with edit(net, opt, x) as e: e.deepen('1')
    new = [p for n, p in net.named_parameters() if n.startswith('2.')]
    assert len(new) == 4 and all(torch.equal(opt.state[p]['sum'], torch.full_like(p, .3)) for p in new)
    net(x).sum().backward(); opt.step()
    replay(net, e.record.inverse(), opt)
    assert len(opt.state) == 4 and not any(p in opt.state for p in new)

class Wrapped(nn.Module):
    def __init__(self): super().__init__(); self.base, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.base(x))

@pytest.mark.parametrize('at', ['base.0', 'base'])
def test_a_layer_behind_frozen_ones_learns(at):
    "An optimizer that holds the head alone trains what is inserted behind the frozen base"
    torch.manual_seed(0)
    net, x = Wrapped(), torch.randn(5, 4)
    net.base.requires_grad_(False)
    opt = torch.optim.Adam([dict(params=[net.head.weight], weight_decay=.1), dict(params=[net.head.bias])])
    with edit(net, opt, x) as e: e.deepen(at)
    new = [p for n, p in net.named_parameters() if not n.startswith('head') and p.requires_grad]
    assert len(new) == 4 and [len(g['params']) for g in opt.param_groups] == [3, 3]
    before = [p.detach().clone() for p in new]
    for _ in range(2): opt.zero_grad(); net(x).square().sum().backward(); opt.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, new, strict=True))
    replay(net, e.record.inverse(), opt)
    assert [len(g['params']) for g in opt.param_groups] == [1, 1]

def test_parts_of_an_encoder_layer_that_may_run_fused_take_no_layer():
    x = torch.randn(2, 3, 8)
    for batch_first in (True, False):
        net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=batch_first)).eval()
        before, y = list(net.state_dict()), net(x)
        for at in ('0.linear1', '0.norm2', '0.dropout'):
            if batch_first:
                with pytest.raises(ValueError, match=f'at: .{at}.*behind .0'): edit(net, None, x).deepen(at)
                assert list(net.state_dict()) == before
        with edit(net, None, x) as e: e.deepen('0' if batch_first else '0.linear1')
        torch.backends.mha.set_fastpath_enabled(True)
        with torch.no_grad(): assert torch.allclose(net(x), y, atol=1e-5)
