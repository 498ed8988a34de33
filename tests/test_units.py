"""Units: maps checked by oracles that know nothing of labels, on the zoo and on torchvision's models; and the edges."""
import copy
import gc
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import zoo

import plasticity.units as U
from plasticity.labels import RULES, Call, Classes, Ledger, Trace, blocks
from plasticity.units import VERBS, MixedUnits, NoSuchGroup, UnseenParameters, WrappedModel, units

# name n axis, and what it can: widen, clone, prune, reset. Worked out by hand from the models.
EXPECT = dict(
    mlp='0 12 unit wcpr; 2 9 unit wcpr',
    one_unit='0 1 unit wcr; 2 5 unit wcpr',
    residual_mlp='stem 8 unit c; blocks.0.up 10 unit wcpr; blocks.1.up 10 unit wcpr',
    tied_autoencoder='enc 5 unit p',
    glu='gate 6 unit wcpr; down 8 unit wcpr; fused 6 unit wcpr',
    highway='inp 9 unit wcpr',
    batchnorm_mlp='0 10 unit wcpr; 4 6 unit wcpr',
    maxout_prelu='a 8 unit wcpr',
    raw_einsum='wq.heads 3 head wcpr; wq.head_dim 4 head_dim -; wv.head_dim 4 head_dim wcpr; w1 10 unit wcpr',
    control_flow='inp 7 unit wcpr',
    in_place='a 4 unit wcpr; b 5 unit wcpr',
    two_inputs='a 8 unit wcpr; b 8 unit wcpr; mix 5 unit wcpr',
    dict_input='emb 6 unit wcpr; dense 6 unit wcpr',
    keyword_input='fc 8 unit wcpr',
    multi_output='body 8 unit wcpr; b.0 5 unit wcpr',
    siamese='enc.0 9 unit wcpr; enc.2 5 unit wcpr',
    moe='inp 8 unit wcpr; router 3 unit -; experts.0.0 5 unit wcpr; experts.1.0 6 unit wcpr; experts.2.0 7 unit wcpr',
    user_parametrize='0 8 unit wcpr; 2 7 unit wcpr; 2.parametrizations.weight.0 3 unit wcpr',
    weight_norm='0 8 unit -; 2 7 unit wcpr',
    spectral_norm='0 8 unit -; 2 7 unit wcpr',
    vae='enc.0 9 unit wcpr; enc.2 4 unit wcpr; dec.0 8 unit wcpr',
    rnn='rnn 6 unit wcpr',
    lstm='rnn 5 unit wcpr',
    lstm_bidirectional='rnn 5 unit wcpr',
    gru='rnn 5 unit wcpr',
    cells='a 6 unit wcpr; b 5 unit wcpr',
    hand_lstm='x2g 5 unit wcpr',
    flatten_cnn='0 4 unit wcpr; 4 5 unit wcpr; 7 6 unit wcpr',
    batchnorm_resnet='stem.0 6 unit wcpr; a.0 6 unit wcpr; c.0 12 unit wcpr; d.0 12 unit wcpr',
    unet='d1 4 unit wcpr; d2 6 unit wcpr; mid 8 unit wcpr; up2 6 unit wcpr; u2 5 unit wcpr; u1 4 unit wcpr',
    densenet='stem 4 unit wcpr; layers.0.2 3 unit wcpr; layers.1.2 3 unit wcpr; layers.2.2 3 unit wcpr',
    depthwise='0 6 unit wcpr; 7 4 unit wcpr',
    grouped='0 2 unit wcpr; 0.groups 4 group wcpr; 2 3 unit wcpr; 4 5 unit wcpr',
    squeeze_excite='conv 6 unit wcpr; fc1 3 unit wcpr',
    pixel_shuffle='0 3 unit wcpr; 3 4 unit wcpr',
    channel_shuffle='a 4 unit wcpr; a.groups 2 group wcpr; b 4 unit wcpr; c 6 unit wcpr',
    transposed='fc 5 unit wcpr; up1 4 unit wcpr',
    transposed_depthwise='0 3 unit wcpr; 0.groups 2 group wcpr; 4 2 unit wcpr',
    convnext_block='stem 6 unit c; up 10 unit wcpr',
    inception='a 3 unit wcpr; b1 4 unit wcpr; b2 5 unit wcpr; p 2 unit wcpr',
    padded_channels='stem 4 unit wcpr; conv 4 unit wcpr',
    group_norm='0 2 unit c; 0.groups 4 group wcpr; 3 6 unit wcpr; 6 4 unit wcpr',
    conv1d_text='emb 6 unit wcpr; convs.0 4 unit wcpr; convs.1 4 unit wcpr',
    embedding_bag='bag 6 unit wcpr; fc 5 unit wcpr',
    attention='inp 12 unit wcpr; attn.q.head_dim 4 head_dim -; attn.heads 3 head wcpr; attn.v.head_dim 4 head_dim wcpr',
    t5_bias='inp 8 unit c; bias.heads 2 head wcpr; attn.q.head_dim 3 head_dim -; attn.v.head_dim 3 head_dim wcpr; ff1 10 unit wcpr',
    nanogpt='wte 8 unit -; qkv.head_dim 4 head_dim -; qkv.heads 2 head wcpr; fc 12 unit wcpr',
    gqa_rope='inp 8 unit c; q.head_dim 2 head_dim -; q.heads 2 head wcpr; kv.1.head_dim 4 head_dim wcpr; w1 10 unit wcpr',
    timm_vit='patch 8 unit c; qkv.head_dim 4 head_dim -; qkv.heads 2 head wcpr; fc1 10 unit wcpr',
    multihead_attention='inp 12 unit wcpr; mha.head_dim 4 head_dim -; mha.heads 3 head wcpr',
    transformer_encoder='0 12 unit c; 1.layers.0.self_attn.head_dim 4 head_dim -; 1.layers.0.self_attn.heads 3 head wcpr; '
        '1.layers.0.linear1 10 unit wcpr; 1.layers.1.self_attn.head_dim 4 head_dim -; '
        '1.layers.1.self_attn.heads 3 head wcpr; 1.layers.1.linear1 10 unit wcpr',
    mixer='patch 6 unit c; tok.0 7 unit wcpr; chan.0 9 unit wcpr',
    perceiver='k 6 unit wcpr; v 6 unit wcpr; mk 5 unit -',
)

def tensors(model): return dict([*model.named_parameters(), *model.named_buffers()])

class Permuted:
    "Inside, the units of a group are in another order, in all of their positions but those of `leave_out`"
    def __init__(self, model, group, perm,
                 leave_out=None): self.tensors, self.group, self.perm, self.out, self.old = tensors(model), group, perm, leave_out, []
    def __enter__(self):
        for (name, d), at in self.group.maps.items():
            if (name, d) == self.out: continue
            t = self.tensors[name]
            order = torch.arange(t.shape[d])
            order[at.flatten()] = at[self.perm].flatten()
            self.old.append((t, t.data))
            t.data = t.data.index_select(d, order)
    def __exit__(self, *_):
        for t, data in reversed(self.old): t.data = data

def order_of(n): # another order of n units, without a fixed point
    return torch.arange(n).roll(1)

@torch.no_grad()
def unmoved_by(model, x, group, leave_out=None):
    "How far the output moves when the units are permuted"
    y = zoo.call(model, x)
    with Permuted(model, group, order_of(group.n),
                  leave_out): return float((zoo.call(model, x) - y).abs().max() / y.abs().max().clamp(min=1e-30))

@torch.no_grad()
def independence(model, x, group, unit):
    "With a unit's readers at zero: (how far its makers move the output, how far the zeros did)"
    ts, old, y = tensors(model), [], zoo.call(model, x)
    def write(name, d, value):
        t, at = ts[name], group.maps[name, d][unit]
        old.append((t, t.data))
        t.data = t.data.clone()
        view = t.data.movedim(d, 0)
        view[at] = value(view[at])
    for k in group.consumers: write(*k, torch.zeros_like)
    masked = zoo.call(model, x)
    for k in group.maps:
        if k not in group.consumers and ts[k[0]].is_floating_point(): write(*k, lambda v: v.abs()*1.7 + .3)
    for k in group.consumers: write(*k, torch.zeros_like) # a tensor can be on both sides, in different dimensions
    moved = zoo.call(model, x)
    for t, data in reversed(old): t.data = data
    return float((moved - masked).abs().max()), float((masked - y).abs().max())

def summary(u): return '; '.join(f"{g.name} {g.n} {g.axis} {''.join(v[0] for v in g.can) or '-'}" for g in u)

# --- the zoo

def test_zoo_is_large(): assert len(zoo.names()) >= 32 and set(EXPECT) == set(zoo.names())

@pytest.mark.parametrize('name', zoo.names())
def test_groups(name):
    model, x = zoo.build(name)
    u = units(model, x)
    assert summary(u) == EXPECT[name]
    assert not u.unseen and not u.notes
    for g in u:
        for k, v in g.maps.items():
            assert v.shape[0] == g.n and v.dtype == torch.int64
            assert len(v.unique()) == v.numel() and v.max() < tensors(model)[k[0]].shape[k[1]]
        assert g.consumers <= set(g.maps) and g.emitters <= set(g.maps)
        assert set(g.blocked) <= set(VERBS) and all(e in vars(U) and r for e, r in g.blocked.values())

# tensors that really make no difference: keys' biases under a softmax, biases before a norm or a difference, dead ReLUs
INERT = dict(siamese={'enc.2.bias'}, attention={'attn.kk.bias'}, t5_bias={'attn.kk.bias'}, perceiver={'k.bias'},
             group_norm={'3.bias', '6.bias'},
             lstm_bidirectional={'rnn.weight_hh_l1_reverse'}, squeeze_excite={'fc2.weight', 'fc1.weight', 'fc1.bias'},
             unet={'u2.weight', 'u2.bias', 'u1.weight'})

NUMBERED = {('moe', 'router'), ('gqa_rope', 'q.head_dim')} # an expert's number, a rotation's frequency: not alike, and refused

@pytest.mark.parametrize('name', zoo.names())
def test_permuting_units_changes_nothing_and_needs_every_position(name):
    model, x = zoo.build(name)
    for g in units(model, x):
        if g.n == 1 or (name, g.name) in NUMBERED: continue
        assert unmoved_by(model, x, g) < 1e-10, g
        for k in g.maps:
            if k[0] not in INERT.get(name, ()): assert unmoved_by(model, x, g, leave_out=k) > 1e-9, (g, k)

@pytest.mark.parametrize('name', zoo.names())
def test_a_unit_that_nobody_reads_does_nothing(name):
    model, x = zoo.build(name)
    effect = 0.
    for g in units(model, x):
        if not g.consumers or set(g.flags) - {'depthwise', 'grouped'} or g.both: continue
        for unit in {0, g.n - 1}:
            moved, zeroed = independence(model, x, g, [unit])
            assert moved < 1e-10, g
            effect = max(effect, zeroed)
    assert effect > 1e-6 or name in ('tied_autoencoder',)

@pytest.mark.parametrize('name', ['mlp', 'residual_mlp', 'lstm', 'gru', 'flatten_cnn', 'unet', 'gqa_rope', 'moe', 'weight_norm',
                                  'transformer_encoder'])
@pytest.mark.parametrize('how', [torch.float32, torch.bfloat16, 'autocast'])
def test_dtypes_and_autocast_find_the_same(name, how):
    model, x = zoo.build(name, torch.float32 if how == 'autocast' else how)
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'): assert summary(units(model, x)) == EXPECT[name]

def test_inference_mode_finds_the_same():
    for name in ('mlp', 'flatten_cnn', 'gqa_rope', 'lstm'):
        model, x = zoo.build(name)
        with torch.inference_mode(): assert summary(units(model, x)) == EXPECT[name]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', zoo.names())
@pytest.mark.parametrize('how', [torch.float32, torch.bfloat16, 'autocast'])
def test_the_gpu_finds_the_same(name, how):
    model, x = zoo.build(name, torch.float32 if how == 'autocast' else how)
    model, x = model.cuda(), zoo.onto(x, 'cuda')
    rng = torch.cuda.get_rng_state()
    with torch.autocast('cuda', torch.bfloat16, enabled=how == 'autocast'): u = units(model, x)
    assert summary(u) == EXPECT[name] and not u.notes and torch.equal(torch.cuda.get_rng_state(), rng)

def test_a_softmax_in_float32_under_autocast(monkeypatch):
    "CUDA's autocast computes a softmax in float32; the model has to run with that, and the units are the same"
    own = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, 'softmax', lambda t, dim: own(t.float(), dim))
    model, x = zoo.build('moe', torch.float32)
    with torch.autocast('cpu', torch.bfloat16): u = units(model, x)
    assert summary(u) == EXPECT['moe'] and not u.notes

# --- nothing is changed

def snapshot(model):
    return dict(state={k: (id(v), v.clone(), v._version) for k, v in tensors(model).items()},
                grad=[(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
                train=[m.training for m in model.modules()], attrs=[{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()],
                rng=(torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())) # noqa: NPY002

@pytest.mark.parametrize('name', zoo.names())
def test_nothing_is_changed(name):
    model, x = zoo.build(name)
    for m in list(model.modules())[::2]: m.train()
    model.train()
    zoo.call(model, x).sum().backward()
    model.eval()
    for m in list(model.modules())[::2]: m.training = True
    hooks = [len(d) for d in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)]
    flags = (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled(),
             torch._C._get_cudnn_enabled(), torch.is_grad_enabled())
    a = snapshot(model)
    units(model, x)
    b = snapshot(model)
    for k, (i, v, version) in a['state'].items():
        j, w, now = b['state'][k]
        assert i == j and torch.equal(v, w) and version == now, k
    for (i, g), (j, h) in zip(a['grad'], b['grad'], strict=True): assert i == j and (g is h is None or torch.equal(g, h))
    assert a['train'] == b['train'] and a['attrs'] == b['attrs']
    assert torch.equal(a['rng'][0], b['rng'][0]) and a['rng'][1:] == b['rng'][1:]
    assert hooks == [len(d) for d in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)]
    assert flags == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled(),
                     torch._C._get_cudnn_enabled(), torch.is_grad_enabled())

class Restless(nn.Module):
    "Changes itself in every way a forward pass can"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls, self.log = nn.Linear(3, 4), nn.Linear(4, 2), 0, None
        self.register_buffer('mean', torch.zeros(4))
    def forward(self, x):
        h = self.a(x)
        self.calls += 1
        self.mean = .9*self.mean + .1*h.mean(0).detach()
        with torch.no_grad(): self.b.weight.mul_(.5), self.b.weight[0].add_(1.)
        self.log = h
        h = h*random.random()*float(np.random.rand()) + torch.randn_like(h) # noqa: NPY002
        return self.b(h - self.mean)

def test_a_restless_model_is_left_as_it_was():
    model, x = Restless(), torch.randn(5, 3)
    a = snapshot(model)
    u = units(model, x)
    b = snapshot(model)
    assert all(torch.equal(a['state'][k][1],
                           b['state'][k][1]) and a['state'][k][0] == b['state'][k][0] for k in a['state']) and a['attrs'] == b['attrs']
    assert model.calls == 0 and model.log is None and summary(u) == 'a 4 unit wcpr'

def test_a_graph_that_is_alive_stays_valid():
    model, x = zoo.build('batchnorm_resnet')
    model.train()
    loss = zoo.call(model, x).square().sum()
    units(model, x)
    loss.backward()

def test_a_failing_model_is_left_as_it_was():
    class Bad(nn.Module):
        def __init__(self): super().__init__(); self.inner = nn.Linear(3, 3)
        def forward(self, x): self.inner(x); raise ZeroDivisionError('mine')
    model = Bad()
    with pytest.raises(ZeroDivisionError, match='mine'): units(model, torch.randn(2, 3))
    assert model.training and torch.backends.mha.get_fastpath_enabled() and not nn.modules.module._global_forward_hooks

def test_one_mode_may_fail():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    u = units(model, torch.randn(1, 3)) # a batch of one has no variance to train with
    assert summary(u) == '0 4 unit wcpr' and 'training mode was not followed' in repr(u)

def test_observers_are_not_called():
    class Watch:
        observes_only, n = True, 0
        def hook(self, *a): self.n += 1
    model, w, mine = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), Watch(), []
    model[0].register_forward_hook(w.hook), model[1].register_forward_pre_hook(w.hook)
    model[0].register_forward_hook(lambda *a: mine.append(1))
    units(model, torch.randn(2, 3))
    assert w.n == 0 and mine
    model(torch.randn(2, 3))
    assert w.n == 2

def test_no_memory_is_kept():
    model, x = zoo.build('flatten_cnn')
    ref = __import__('weakref').ref(model[0].weight)
    units(model, x)
    del model
    gc.collect()
    assert ref() is None

# --- what may go in

def test_inputs_of_every_kind():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        def forward(self, x, y=None, *, z=None,
                    flag=True): return self.b(self.a(x) if y is None else self.a(x + y) + (0 if z is None else z))
    x, model = torch.randn(2, 3), M()
    for e in (x, (x,), (x, x), dict(x=x), dict(x=x, y=x, flag=False), [x],
              [x, (x, x), dict(x=x, y=x)]): assert summary(units(model, e)) == 'a 4 unit wcpr'
    assert 'a' in units(model, x) and units(model, dict(x=x, y=x, z=torch.randn(2, 4)))['a'].can == [] # meets data
    with pytest.raises(ValueError, match='empty list'): units(model, [])
    with pytest.raises(TypeError, match='takes an nn.Module'): units(lambda x: x, x)

def test_wrappers():
    model, x = zoo.build('mlp')
    with pytest.raises(WrappedModel, match='DataParallel'): units(nn.DataParallel(model), x)
    class Compiled(nn.Module):
        def __init__(self, m): super().__init__(); self._orig_mod = m
    assert units(Compiled(model), x) is units(model, x)
    with pytest.raises(UnseenParameters, match='run the model once'): units(nn.LazyLinear(3), x)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scripted = torch.jit.script(nn.Linear(7, 3).double())
    with pytest.raises(WrappedModel): units(scripted, x)

def test_unseen_parameters():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.other, self.far = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(7, 9)
        def forward(self, x, k=0): return self.b(self.other(self.a(x)) if k else self.a(x))
    model, x = M(), torch.randn(2, 3)
    u = units(model, x)
    assert set(u.unseen) == {'other.weight', 'other.bias', 'far.weight', 'far.bias'}
    assert {e for e, _ in u['a'].blocked.values()} == {'UnseenParameters'} and 'other.weight' in u['a'].blocked['widen'][1]
    v = units(model, [x, (x, 1)])
    assert summary(v) == 'a 4 unit wcpr' and ('other.weight', 0) in v['a'].maps and set(v.unseen) == {'far.weight', 'far.bias'}
    assert u['far'].blocked['prune'][0] == 'UnseenParameters'

def test_positions_that_the_example_did_not_reach():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.pos, self.b = nn.Parameter(torch.randn(1, 9, 4)), nn.Linear(4, 2)
        def forward(self, x): return self.b(x @ torch.ones(3, 4) * 0 + self.pos[:, :x.shape[1]])
    u = units(M(), torch.randn(2, 5, 3))
    assert [g.n for g in u] == [] or all('pos' not in dict(g.maps) or (('pos', 1) not in g.maps) for g in u)
    assert {r['positions'] for r in u.frozen if r['tensor'] == 'pos' and r['dim'] == 1} == {'9 of 9'}

# --- names

def test_lookup():
    model, x = zoo.build('batchnorm_resnet')
    u = units(model, x)
    stem = u['stem.0']
    assert all(u[k] is stem for k in (0, 'stem', 'stem.1', 'stem.1.running_mean', 'b', 'b.0.weight', ('a.0.weight', 1), ('b.0.weight', 0)))
    assert u[-1].name == 'd.0' and [g.name for g in u[:2]] == ['stem.0', 'a.0'] and 'nothing' not in u and 'a' in u
    assert u['head'] is u['d.0'] and u['head'].consumers >= {('head.weight', 1)}
    assert u['head.weight', 0].blocked['widen'][0] == 'FrozenUnits' and 'is an output' in u['head.weight', 0].blocked['widen'][1]
    assert 'stem.0.weight' in u['stem.0.weight', 1].blocked['prune'][1]
    with pytest.raises(NoSuchGroup, match='did you mean'): u['stem.00']
    with pytest.raises(KeyError): u['nope']
    with pytest.raises(KeyError, match='no positions'): stem.map('head.weight', 1)
    with pytest.raises(IndexError): u[99]

def test_ambiguous_names_list_the_groups():
    model, x = zoo.build('attention')
    u = units(model, x)
    with pytest.raises(NoSuchGroup, match='attn.q.head_dim, attn.heads'): u['attn.q']
    assert u['inp'].name == 'inp' and u['attn.o'].name == 'inp'

def test_shared_tensors_are_found_by_all_names():
    model, x = zoo.build('nanogpt')
    u = units(model, x)
    assert u['wte'] is u['head.weight'] is u['lnf'] and u['wte'].both == {('wte.weight', 1)}
    assert {e for e, _ in u['wte'].blocked.values()} == {'MixedUnits', 'TiedUnits'}

def test_names_are_unique_and_table_reads():
    for name in zoo.names():
        u = units(*zoo.build(name))
        assert len(set(u.names)) == len(u) and all(u[n].name == n for n in u.names)
        assert all(n in repr(u) for n in u.names) and u._repr_markdown_().startswith('| name') and repr(u[0]).startswith(u[0].name)

def test_graph_and_picture():
    pytest.importorskip('matplotlib')
    for name in ('unet', 'timm_vit', 'lstm', 'two_inputs', 'topless'):
        u = units(*zoo.build(name)) if name != 'topless' else units(nn.Linear(3, 2), torch.randn(2, 3))
        assert sorted(n for l in u.layers() for n in l) == sorted(['input', *u.names, 'output'])
        assert len(u.plot().axes[0].texts) >= len(u) + 2
    u = units(*zoo.build('unet'))
    assert u.arrows()['d1', 'u1'] == ['u1.weight'] and u.layers()[1:3] == [['d1'], ['d2']]

# --- ops without rules, rules of users

A = torch.ops.aten

@torch.library.custom_op('plasticity_test::twice', mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor: return 2*x

class Custom(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)
    def forward(self, x): return self.c(torch.relu(self.b(twice(self.a(x)))))

def test_unknown_op_is_named_and_freezes_only_what_it_touches():
    u = units(Custom(), torch.randn(2, 3))
    assert summary(u) == 'b 5 unit wcpr' and 'no rule for plasticity_test::twice' in repr(u)
    error, reason = u['a'].blocked['widen']
    assert error == 'FrozenUnits' and 'plasticity_test::twice in the model' in reason and "'a.weight' dim 0" in reason

def test_rules_of_users():
    model, x = Custom(), torch.randn(2, 3)
    good = {'plasticity_test::twice': lambda led, c: led.put(c.out, led.dims(c.ins[0]))}
    assert summary(units(model, x, good)) == 'a 4 unit wcpr; b 5 unit wcpr'
    wrong = {'twice': lambda led, c: led.put(c.out, led.dims(c.ins[0])[::-1])}
    assert 'its rule gave labels' in repr(units(model, x, wrong)) and summary(units(model, x, wrong)) == 'b 5 unit wcpr'
    broken = {'plasticity_test::twice': lambda led, c: 1/0}
    assert 'ZeroDivisionError' in repr(units(model, x, broken))
    mine = {'relu': lambda led, c: [led.freeze(d, 'is mine') for d in led.dims(c.ins[0])] and led.put(c.out, [None, None])}
    assert [g.name for g in units(model, x, good | mine)] == ['a']

def test_a_rule_that_forgets_an_argument_freezes_it():
    m = net(lambda s, x: s.b(torch.maximum(s.a(x), s.c(x))), a=nn.Linear(3, 4), c=nn.Linear(3, 4), b=nn.Linear(4, 2))
    forgetful = {'maximum': lambda led, c: led.put(c.out, led.dims(c.ins[0]))}
    u = units(m, torch.randn(2, 3), forgetful)
    assert summary(u) == 'a 4 unit wcpr' and 'does not look at it' in u['c'].blocked['prune'][1]
    grid = net(lambda s, x: s.b(nn.functional.grid_sample(s.c(x), s.g(x.mean((2, 3))).view(-1, 2, 2, 2), align_corners=False).flatten(1)),
               c=nn.Conv2d(3, 4, 1), g=nn.Linear(3, 8), b=nn.Linear(16, 2))
    assert summary(units(grid, torch.randn(2, 3, 5, 5))) == 'c 4 unit wcpr'

def test_an_op_with_a_decomposition_needs_no_rule():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        def forward(self, x): return self.b(A.addcdiv(self.a(x), self.a(x), A.special_entr(self.a(x).sigmoid()) + 1))
    saved = {k: RULES.pop(k) for k in ('native_layer_norm', '_softmax')}
    try:
        model, x = zoo.build('residual_mlp')
        u = units(model, x)
    finally: RULES.update(saved)
    assert [g.n for g in u] == [8, 10, 10] and 'mean' in ' '.join(u['stem'].flags) and not u.notes
    assert summary(units(M(), torch.randn(2, 3))) == 'a 4 unit wcpr'

# --- other backends' ops, on the meta device (they have no CPU kernels)

class Meta(nn.Module):
    "Ops that only run on a GPU, and the module around them"
    def __init__(self, fn, *shapes):
        super().__init__()
        self.fn, self.p = fn, nn.ParameterList(nn.Parameter(torch.empty(s, device='meta')) for s in shapes)
    def forward(self, x): return self.fn(x, *self.p)

def heads(x, w, o, sdpa):
    q, k, v = ((x @ m).unflatten(-1, (-1, 8)).transpose(1, 2) for m in w)
    return sdpa(q, k, v)[0].transpose(1, 2).flatten(2) @ o

@pytest.mark.parametrize('sdpa', [
    lambda q, k, v: A._scaled_dot_product_efficient_attention(q, k, v, None, False),
    lambda q, k, v: A._scaled_dot_product_flash_attention(q, k, v),
    lambda q, k, v: A._scaled_dot_product_cudnn_attention(q, k, v, None, False)])
def test_attention_of_the_gpu(sdpa):
    u = units(Meta(lambda x, *p: heads(x, p[:3], p[3], sdpa), (6, 24), (6, 24), (6, 24), (24, 5)), torch.empty(2, 7, 6, device='meta'))
    found = sorted((g.n, g.axis, 'widen' in g.can) for g in u)
    assert found == [(3, 'head', True), (8, 'head_dim', False), (8, 'head_dim', True)] and not u.notes

def cell_lstm(x, wi, wh, bi, bh, o):
    h, c = x.new_zeros(x.shape[0], wh.shape[0]), x.new_zeros(x.shape[0], wh.shape[0])
    for _ in range(2): h, c, _ = A._thnn_fused_lstm_cell(x @ wi, h @ wh, c, bi, bh)
    return h @ o

def cell_gru(x, wi, wh, bi, bh, o):
    h = x.new_zeros(x.shape[0], wh.shape[0])
    for _ in range(2): h, _ = A._thnn_fused_gru_cell(x @ wi, h @ wh, h, bi, bh)
    return h @ o

@pytest.mark.parametrize('cell, n', [(cell_lstm, 4), (cell_gru, 3)])
def test_recurrent_cells_of_the_gpu(cell, n):
    tr = Trace()
    wi, wh, bi, bh, state = (torch.empty(s) for s in ((3, n*5), (5, n*5), (n*5,), (n*5,), (2, 5)))
    a, b, hy, cy, work = torch.empty(2, n*5), torch.empty(2, n*5), torch.empty(2, 5), torch.empty(2, 5), torch.empty(2, n*5)
    for k, t in dict(wi=wi, wh=wh, bi=bi, bh=bh).items(): tr.label(k, t)
    for t, w in ((a, wi), (b, wh)): tr.feed(t), tr.put(t, [None, tr.dims(w)[1]])
    tr.feed(state), tr.put(state, [None, tr.dims(wh)[0]])
    c = Call(A._thnn_fused_lstm_cell.default if n == 4 else A._thnn_fused_gru_cell.default, (a, b, state, bi, bh), {})
    c.outs = [hy, cy, work] if n == 4 else [hy, work]
    for o in c.outs: tr.feed(o)
    RULES[c.name](tr, c)
    root = tr.classes.find(np.arange(tr.classes.n))
    for t, d in (('wi', 1), ('wh', 1), ('bi', 0), ('bh', 0)): assert (root[tr.base[t][d]].reshape(n, 5) == root[tr.base['wh'][0]]).all()
    assert tr.dims(hy)[1].ids.shape == (5,) and tr.dims(work) == [None, None]

@pytest.mark.parametrize('norm', [
    lambda x, w, b, m, v: A.cudnn_batch_norm(x, w, b, m, v, False, .1, 1e-5)[0],
    lambda x, w, b, m, v: A.miopen_batch_norm(x, w, b, m, v, False, .1, 1e-5)[0],
    lambda x, w, b, m, v: A._native_batch_norm_legit_no_training(x, w, b, m, v, .1, 1e-5)[0]])
def test_batch_norms_of_the_gpu(norm):
    tr, x, ws = Trace(), torch.empty(2, 4, 3, 3), [torch.empty(4) for _ in range(4)]
    tr.feed(x)
    for i, w in enumerate(ws): tr.label(str(i), w)
    tr.put(x, [None, tr.fresh(4), None, None])
    args, seen = (x, *ws), []
    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return (torch.empty(2, 4, 3, 3), *[torch.empty(4)]*3)[:len(func._schema.returns)]
    with Spy(): norm(*args)
    c = Call(seen[-1], args, {})
    c.outs = [torch.empty(2, 4, 3, 3), torch.empty(4)]
    for o in c.outs: tr.feed(o)
    RULES[c.name](tr, c)
    assert len({tuple(tr.classes.find(tr.base[str(i)][0])) for i in range(4)}) == 1 and len(tr.dims(c.outs[0])[1]) == 4

def test_fused_layers_lead_to_a_second_trace():
    "oneDNN's LSTM is one op; asked for by its function, it is found out, and the trace starts again without oneDNN"
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.ParameterList(nn.Parameter(torch.randn(s)*.3) for s in ((20, 3), (20, 5), (20,), (20,))), nn.Linear(5, 2)
        def forward(self, x):
            z = x.new_zeros(1, x.shape[0], 5)
            return self.out(torch.lstm(x, (z, z), list(self.w), True, 1, 0., self.training, False, True)[0])
    u = units(M(), torch.randn(2, 4, 3))
    assert summary(u) == 'w 5 unit wcpr' and u[0].map('w.1', 0)[1].tolist() == [1, 6, 11, 16] and not u.notes

# --- single traps

def net(forward, **mods):
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            for k, v in mods.items(): setattr(self, k, v)
    M.forward = forward
    return M()

def test_weight_data_is_still_the_weight():
    m = net(lambda s, x: torch.relu(x @ s.w.data) @ s.v.detach(), w=nn.Parameter(torch.randn(3, 4)), v=nn.Parameter(torch.randn(4, 2)))
    assert summary(units(m, torch.randn(2, 3))) == 'w 4 unit wcpr'

def test_normalizing_and_stale_softmax():
    lin = dict(a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    u = units(net(lambda s, x: s.b(nn.functional.normalize(s.a(x), dim=-1)), **lin), torch.randn(2, 3))
    assert u['a'].blocked['widen'][0] == 'MixedUnits' and 'linalg_vector_norm' in u['a'].blocked['widen'][1]
    unused = net(lambda s, x: (s.a(x).softmax(-1).sum(), s.b(s.a(x)))[1], **lin)
    assert summary(units(unused, torch.randn(2, 3))) == 'a 4 unit wcpr'

def test_mixing_is_told_with_its_place():
    u = units(*zoo.build('residual_mlp'))
    error, reason = u['stem'].blocked['widen']
    assert error == MixedUnits.__name__
    assert all(w in reason for w in ("'stem.weight' dim 0", 'native_layer_norm in blocks.0.norm', 'same factor'))
    assert u['stem'].flags == {'layer_norm': 'native_layer_norm in blocks.0.norm'}

def test_consumers_of_computed_weights():
    model, x = zoo.build('user_parametrize')
    u = units(model, x)
    assert u['0'].consumers == {('2.parametrizations.weight.original', 1), ('2.parametrizations.weight.0.down', 1)} # all terms of a sum
    masked = net(lambda s, x: nn.functional.linear(torch.relu(s.a(x)), s.m*s.w), a=nn.Linear(3, 4), w=nn.Parameter(torch.randn(2, 4)),
                 m=nn.Buffer(torch.ones(2, 4)))
    assert units(masked, torch.randn(2, 3))['a'].consumers == {('w', 1)} # one factor of a product, the parameter
    bent = net(lambda s, x: nn.functional.linear(torch.relu(s.a(x)), s.w.tanh()), a=nn.Linear(3, 4), w=nn.Parameter(torch.randn(2, 4)))
    assert 'computed weight' in units(bent, torch.randn(2, 3))['a'].blocked['widen'][1]

def test_units_without_readers():
    u = units(net(lambda s, x: s.a(x).square().mean(-1), a=nn.Linear(3, 4)), torch.randn(2, 3))
    assert u['a'].blocked['widen'][0] == 'MixedUnits' and not u['a'].consumers
    u = units(net(lambda s, x: (s.a(x), s.b(x))[1], a=nn.Linear(3, 4), b=nn.Linear(3, 2)), torch.randn(2, 3))
    error, reason = u['a'].blocked['widen']
    assert error == 'FrozenUnits' and reason.startswith("'a.weight' dim 0: no weight reads") and u['a'].can == ['prune']

def test_indices_freeze():
    for fn in (lambda h: h[:, [2, 0, 1, 3]], lambda h: h.index_select(1, torch.tensor([0, 1, 2, 3])), lambda h: h.sort(-1)[0],
               lambda h: h.cumsum(-1),
               lambda h: torch.stack([h[:, i] for i in range(4)], 1), lambda h: h.gather(1, h.argsort(-1)),
               lambda h: torch.fft.fft(h).real):
        u = units(net(lambda s, x, fn=fn: s.b(fn(s.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(2, 3))
        assert len(u) == 0 and u['a'].blocked['widen'][0] == 'FrozenUnits'

def test_moves_do_not_freeze():
    for fn in (lambda h: h.flip(-1), lambda h: h + h.new_zeros(h.shape), lambda h: h.roll(1, -1),
               lambda h: torch.cat([h[:, 2:], h[:, :2]], 1),
               lambda h: h[:, None].repeat(1, 3, 1).sum(1), lambda h: h.unflatten(1, (2, 2)).transpose(1, 2).flatten(1),
               lambda h: torch.stack(h.chunk(2, 1), 1).flatten(1), lambda h: torch.empty_like(h).copy_(h),
               lambda h: torch.where(h > 0, h, h.exp() - 1), lambda h: nn.functional.pad(h, (1, 0))[:, 1:],
               lambda h: torch.einsum('bc->cb', h).t()):
        model, x = net(lambda s, x, fn=fn: s.b(fn(s.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double(), torch.randn(2, 3).double()
        u = units(model, x)
        assert len(u) >= 1 and sum(g.n for g in u if g.axis == 'unit') >= 2
        for g in u:
            if g.n > 1: assert unmoved_by(model, x, g) < 1e-10
            assert independence(model, x, g, [0])[0] < 1e-10

def test_hooks_and_checkpoints():
    from torch.utils.checkpoint import checkpoint
    lin = dict(a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    m = net(lambda s, x: s.b(checkpoint(lambda y: torch.relu(s.a(y)), x, use_reentrant=False)), **lin)
    assert summary(units(m, torch.randn(2, 3))) == 'a 4 unit wcpr'
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    m[1].register_forward_hook(lambda mod, args, out: out*2)
    assert summary(units(m, torch.randn(2, 3))) == '0 4 unit wcpr'

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return (x > 0).to(x.dtype)
    @staticmethod
    def backward(ctx, g): return g

def test_autograd_functions():
    m = net(lambda s, x: s.b(Straight.apply(s.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert summary(units(m, torch.randn(2, 3))) == 'a 4 unit wcpr'

def test_old_weight_norm_and_packed_sequences():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    assert summary(units(m, torch.randn(2, 3))) == '0 4 unit wcpr'
    def forward(s, x):
        p = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3]), batch_first=True)
        return s.out(nn.utils.rnn.pad_packed_sequence(s.rnn(p)[0], batch_first=True)[0])
    m = net(forward, rnn=nn.LSTM(3, 5, batch_first=True), out=nn.Linear(5, 2))
    assert summary(units(m, torch.randn(2, 4, 3))) == 'rnn 5 unit wcpr'

# --- the cache

def test_cache():
    model, x = zoo.build('mlp')
    u = units(model, x)
    with torch.no_grad(): model[0].weight.add_(1)
    model.train()
    assert units(model, x) is u # training changes values only
    assert units(model, x.clone()) is not u and units(model, x, {}) is not None
    v = units(model, x)
    model[2].weight.data, model[2].bias.data = torch.randn(5, 12).double(), torch.randn(5).double()
    model[4].weight.data = torch.randn(4, 5).double()
    w = units(model, x)
    assert w is not v and summary(w) == '0 12 unit wcpr; 2 5 unit wcpr'
    model[1] = nn.Softmax(-1)
    assert 'widen' in units(model, x)['0'].blocked
    flagged = net(lambda s, x: s.b(s.a(x).softmax(-1) if s.mix else s.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    flagged.mix, x = False, torch.randn(2, 3)
    assert 'widen' in units(flagged, x)['a'].can
    flagged.mix = True
    assert 'widen' not in units(flagged, x)['a'].can

def test_copies_have_units_of_their_own():
    model, x = zoo.build('mlp')
    u = units(model, x)
    assert units(copy.deepcopy(model), x) is not u

# --- the parts

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), min_size=1, max_size=12), max_size=8))
def test_union_find(batches):
    c, naive = Classes(), np.arange(30)
    c.fresh(30)
    for b in batches:
        c.unite(*np.array(b).T)
        for i, j in b: naive[naive == max(naive[i], naive[j])] = min(naive[i], naive[j])
    assert c.find(np.arange(30)).tolist() == naive.tolist()

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5)

@settings(max_examples=150, deadline=None)
@given(shapes, st.randoms(use_true_random=False), st.sampled_from(['inner', 'outer', 'first']))
def test_reshape_moves_every_label(a, rnd, policy):
    "Whatever the view: positions of the new dimensions that hold a label of the old one are in its class"
    flat, b = int(np.prod(a)), []
    rest = flat
    while rest > 1:
        f = rnd.choice([k for k in range(2, rest + 1) if rest % k == 0])
        b.append(f)
        rest //= f
    b.insert(rnd.randrange(len(b) + 1), 1)
    led, d = Ledger(policy), rnd.randrange(len(a))
    dims = [None]*len(a)
    dims[d] = led.fresh(a[d])
    out = led.reshape(dims, tuple(a), tuple(b))
    frozen = {int(r) for m in led.frozen for r in led.classes.find(m.ids)}
    held = np.broadcast_to(dims[d].ids.reshape([-1 if i == d else 1 for i in range(len(a))]), a).reshape(b) # (b) the label of each element
    root = led.classes.find(held.ravel()).reshape(b)
    got = [(j, l) for j, l in enumerate(out) if l is not None]
    assert len(got) <= 1
    if not got: assert a[d] == 1 or set(root.ravel().tolist()) <= frozen or flat == 0
    for j, l in got:
        told = led.classes.find(l.ids).reshape([-1 if i == j else 1 for i in range(len(b))])
        assert (np.broadcast_to(told, b) == root).all()

@settings(max_examples=100, deadline=None)
@given(shapes, shapes)
def test_blocks_cover_both_shapes(a, b):
    if np.prod(a) != np.prod(b): b = list(reversed(a))
    got = list(blocks(a, b))
    assert all(np.prod(a[i0:i1]) == np.prod(b[j0:j1]) for i0, i1, j0, j1 in got)
    assert [i for i0, i1, *_ in got for i in range(i0, i1)] == list(range(len(a)))
    assert [j for *_, j0, j1 in got for j in range(j0, j1)] == list(range(len(b)))

BLOCKS = dict(linear=lambda w: nn.Linear(w, w + 1), res=lambda w: nn.Linear(w, w), cat=lambda w: nn.Linear(w, 2), bn=nn.BatchNorm1d,
              gate=lambda w: nn.Linear(w, 2*w), flip=lambda w: nn.Identity(), ln=nn.LayerNorm)

@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_networks(data):
    "Random chains with residuals, concatenations, gates and norms: every group passes both oracles"
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    n, ops = data.draw(st.integers(2, 5)), data.draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=5))
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.mods, w = nn.Linear(3, n), nn.ModuleList(), n
            for o in ops:
                self.mods.append(BLOCKS[o](w))
                w += dict(linear=1, cat=2).get(o, 0)
            self.out = nn.Linear(w, 2)
        def forward(self, x):
            x = self.inp(x)
            for o, m in zip(ops, self.mods, strict=True):
                y = torch.tanh(m(x))
                if o == 'res': x = x + y
                elif o == 'cat': x = torch.cat([x, y], 1)
                elif o == 'gate': x = x*torch.sigmoid(y.chunk(2, 1)[0]) + y.chunk(2, 1)[1]
                elif o == 'flip': x = y + y.flip(1)
                else: x = y
            return self.out(x)
    model, x = zoo.shake(M()).double().eval(), torch.randn(4, 3).double()
    u = units(model, x)
    assert len(u) and not u.notes
    for g in u:
        if g.n > 1: assert unmoved_by(model, x, g) < 1e-9
        if g.consumers and not g.flags and not g.both: assert independence(model, x, g, [g.n - 1])[0] < 1e-9

# --- models of other people

SMALL = dict(resnet18=12, mobilenet_v3_small=None, densenet121=None, swin_t=40, googlenet=None, shufflenet_v2_x0_5=None)

@pytest.mark.parametrize('name', SMALL)
def test_torchvision(name):
    models = pytest.importorskip('torchvision.models')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = zoo.shake(models.get_model(name, weights=None, num_classes=7)).double().eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    u = units(model, [torch.cat([x, x.flip(-1)])])
    assert not u.unseen and not [n for n in u.notes if 'no rule' in n] and SMALL[name] in (None, len(u))
    live = [g for g in u if g.n > 1 and g.axis == 'unit' and 'prune' in g.can]
    for g in live[::max(1, len(live)//2)]:
        assert unmoved_by(model, x, g) < 1e-7

OURS = dict(mlp=('MLP', (1, 6, 6), dict(hidden_sizes=(9, 8), normalization='batch')),
            cnn=('CNN', (3, 16, 16), dict(channels=(4, 5, 6), hidden_sizes=(7,), normalization='group')),
            resnet=('ResNet', (3, 16, 16), dict(channels=4)), bottleneck=('ResNet', (3, 16, 16), dict(depth=50, channels=2)),
            vit=('ViT', (3, 16, 16), dict(embed_dim=12, depth=2, num_heads=3)))

@pytest.mark.parametrize('which', OURS)
def test_our_own_models(which):
    models = pytest.importorskip('plasticity.models')
    name, shape, options = OURS[which]
    model, x = zoo.shake(getattr(models, name)(shape, 5, **options)).double().eval(), torch.randn(2, *shape).double()
    u = units(model, x)
    assert len(u) and not u.notes and not u.unseen
    for g in u:
        if g.n > 1: assert unmoved_by(model, x, g) < 1e-8, g

def test_speed():
    models = pytest.importorskip('torchvision.models')
    model, x = models.resnet50().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(): model(x)
    start = time.process_time()
    with torch.no_grad(): model(x), model.train()(x)
    forwards = time.process_time() - start
    start = time.process_time()
    u = units(model.eval(), x)
    assert len(u) == 37 and time.process_time() - start - forwards < 2

class ThreeOperands(zoo.RawEinsum):
    "The zoo's attention with values and projection in one einsum"
    def __init__(self, equation, order): super().__init__(); self.equation, self.order = equation, order
    def forward(self, x):
        q, k, v = (torch.einsum('btd,hdk->bhtk', x, w) for w in (self.wq, self.wk, self.wv))
        a = torch.einsum('bhtk,bhsk->bhts', q, k).softmax(-1)
        return (torch.einsum(self.equation, *([a, v, self.wo][i] for i in self.order)) @ self.w1 + self.b1) @ self.w2

def test_an_einsum_of_three_is_a_chain_of_two_and_two():
    x = torch.randn(4, 5, 6)
    us = units(ThreeOperands('bhts,bhsk,hkd->btd', (0, 1, 2)), x)
    assert us['wq.heads'].n == 3 and 'prune' in us['wq.heads'].can
    us = units(ThreeOperands('bhts,hkd,bhsk->btd', (0, 2, 1)), x)
    for name in ('wq.heads', 'wv.head_dim'):
        assert us[name].blocked['widen'][0] == 'BilinearUnits' and not us[name].can

def test_heads_flattened_in_two_orders_are_no_single_unit():
    us = units(ThreeOperands('bhts,bhsc,hcd->btd', (0, 1, 2)), torch.randn(4, 5, 6)) # an einsum sums c before h
    assert not any(g.n == 1 and g.can for g in us)
    crossed = [g.blocked[v] for g in us if g.n == 1 for v in VERBS]
    assert crossed and all(e == 'FrozenUnits' and 'flattened in an order' in r for e, r in crossed)
