"Edge cases of plasticity.models: every combination of the options, sizes, dtypes, oracles"
import copy, itertools, json, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from plasticity.models import (ACTIVATIONS, CNN, MLP, MODELS, NORMS, RESNETS, Attention, Block, Residual, ResNet, ViT, activation,
                               branch_scale, default_patch, draw_weight, flops, gain, make_model, norm_groups, normalization,
                               num_parameters, register_model)
from plasticity.results import seeded

torch.set_num_threads(1)
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 64, 64)]
SMALL = dict(mlp=dict(hidden_sizes=(12, 20)), cnn=dict(channels=(8, 12), hidden_sizes=(10,)), resnet=dict(channels=8, blocks=(1, 1)),
             vit=dict(embed_dim=16, depth=1, num_heads=2))

def data(shape, n=4, dtype=torch.float32, seed=0): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

def combos():
    "All activations x norms x placements x affine x bias, with shapes in turn, so that each pair of options meets each shape"
    options = itertools.product(ACTIVATIONS, NORMS, (False, True), (False, True), (None, True, False))
    for i, c in enumerate(options): yield (*c, SHAPES[0] if i % 8 else SHAPES[1 + i // 8 % 2])

@pytest.mark.parametrize('name', SMALL)
def test_every_combination(name):
    n = 0
    for act, norm, after, affine, bias, shape in combos():
        o = SMALL[name] | dict(activation=act, normalization=norm, norm_after_activation=after, norm_affine=affine, bias=bias)
        if norm == 'instance' and name == 'mlp':
            with pytest.raises(ValueError, match='a vector has none'): make_model(name, shape, 5, **o)
            continue
        if norm == 'instance' and name == 'resnet' and (after or act == 'linear'):
            with pytest.raises(ValueError, match='always 0'): make_model(name, shape, 5, **o)
            o['head_pool'] = 'max'
        model, x = make_model(name, shape, 5, seed=0, **o), data(shape)
        y = model(x)
        assert y.shape == (4, 5) and y.isfinite().all() and y.std(0).mean() > 1e-6, o
        F.cross_entropy(y, torch.tensor([0, 1, 2, 3])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), o
        biases = [k for k, _ in model.named_parameters() if k.endswith('.bias') and '.norm' not in k and not k.startswith('norm')]
        assert bool(biases) == (bias is not False), o
        n += 1
    assert n > 350

@pytest.mark.parametrize('name,norm,shape', [(n, m, s) for n in SMALL for m in NORMS for s in SHAPES if (n, m) != ('mlp', 'instance')])
def test_eval_is_deterministic_and_state_round_trips(name, norm, shape):
    a = make_model(name, shape, 5, seed=0, normalization=norm, dropout=.3, **SMALL[name])
    x = data(shape)
    assert not torch.equal(a(x), a(x))  # dropout
    a.eval()
    assert torch.equal(a(x), a(x))
    b = make_model(**(json.loads(json.dumps(a.spec)) | dict(seed=1))).eval()
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x)) and torch.equal(copy.deepcopy(a)(x), a(x))
    assert len(repr(a).split('\n')) <= 3 and f'{num_parameters(a):,}' in repr(a)

@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('after', [False, True])
def test_no_parameter_is_left_without_a_gradient(name, norm, after):
    if (name, norm) == ('mlp', 'instance'): return
    o = SMALL[name] | dict(head_pool='max' if name != 'vit' else 'cls') if name != 'mlp' else SMALL[name]
    m = make_model(name, (3, 16, 16), 5, seed=0, normalization=norm, norm_after_activation=after, activation='gelu', **o).double()
    F.cross_entropy(m(data((3, 16, 16), 8, torch.double)), torch.arange(8) % 5).backward()
    silent = {k for k, p in m.named_parameters() if p.grad.abs().max() < 1e-12}
    # softmax is blind to a key's bias; a constant in a ViT's stream is what its last batch or instance norm subtracts
    assert all(k.endswith('attn.k.bias') or name == 'vit' and norm in ('batch', 'instance') and k.endswith('bias') for k in silent)

@pytest.mark.parametrize('dtype', [torch.double, torch.bfloat16])
@pytest.mark.parametrize('name,norm', [(n, m) for n in SMALL for m in NORMS if (n, m) != ('mlp', 'instance')])
def test_dtypes(name, norm, dtype):
    m = make_model(name, (1, 8, 8), 5, normalization=norm, **SMALL[name]).to(dtype)
    y = m(data((1, 8, 8), dtype=dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype and all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in m.parameters())

@pytest.mark.parametrize('name', SMALL)
def test_compiles(name):
    m = make_model(name, (1, 8, 8), 5, normalization='batch', **SMALL[name]).eval()
    x = data((1, 8, 8))
    assert torch.allclose(torch.compile(m, backend='eager', fullgraph=True)(x), m(x), atol=1e-6)

@pytest.mark.parametrize('norm', ['none', 'layer', 'group', 'batch'])
def test_many_mlps_as_one(norm):
    nets = [make_model('mlp', 6, 3, seed=s, hidden_sizes=(8, 8), normalization=norm) for s in range(4)]
    params, buffers = stack_module_state(nets)
    x = data((6,), 16)
    one = copy.deepcopy(nets[0]).to('meta')
    out = vmap(lambda p, b: functional_call(one, (p, b), (x,)))(params, buffers)
    assert torch.allclose(out, torch.stack([n(x) for n in nets]), atol=1e-5)
    loss = lambda p, b: functional_call(one, (p, b), (x,)).square().sum()
    grads = vmap(torch.func.grad(loss))(params, buffers)
    assert all(g.shape == params[k].shape for k, g in grads.items())

@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('device', ['meta', 'cpu'])
def test_made_on_a_device(name, device):
    with torch.device(device): m = make_model(name, (1, 8, 8), 5, **SMALL[name])
    assert {p.device.type for p in m.parameters()} == {device}

# ---- sizes

@given(c=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), n=st.integers(1, 5), k=st.integers(1, 5),
       pool=st.sampled_from(['max', 'avg', 'none']),
       pool_size=st.integers(1, 4), norm=st.sampled_from(['none', 'batch', 'layer', 'instance']), after=st.booleans())
@settings(max_examples=60, deadline=None)
def test_cnn_of_any_image(c, h, w, n, k, pool, pool_size, norm, after):
    o = dict(kernel_size=k, pool=pool, pool_size=pool_size, normalization=norm, norm_after_activation=after)
    def make(): return CNN((c, h, w), 3, channels=(4,) * n, hidden_sizes=(), **o)
    if h * w == 1 and k % 2 and norm == 'instance':
        with pytest.raises(ValueError, match='single value'): make()
        return
    x = data((c, h, w), 3)
    y = make()(x)
    y.sum().backward()
    assert y.shape == (3, 3) and y.isfinite().all()

@given(h=st.integers(1, 40), w=st.integers(1, 40), norm=st.sampled_from(['batch', 'instance', 'group']),
       stem=st.sampled_from(['cifar', 'imagenet']), block=st.sampled_from(['basic', 'bottleneck']))
@settings(max_examples=25, deadline=None)
def test_resnet_of_any_image(h, w, norm, stem, block):
    def make(): return ResNet((1, h, w), 3, channels=4, blocks=(1, 1, 1, 1), block=block, normalization=norm, stem=stem)
    small = h * w == 1 if stem == 'cifar' else max(h, w) <= 4
    if norm == 'instance' and small:
        with pytest.raises(ValueError, match='single value'): make()
        return
    y = make()(data((1, h, w), 3))
    assert y.shape == (3, 3) and y.isfinite().all() and y.std(0).max() > 0

@given(h=st.integers(1, 48), w=st.integers(1, 48))
@settings(max_examples=200, deadline=None)
def test_default_patch_divides(h, w):
    p = default_patch(h, w)
    assert 1 <= p <= 16 and h % p == 0 and w % p == 0 and (p == 1 or h * w // p**2 >= 4)

def test_vit_of_odd_images():
    assert ViT((3, 10, 20), 4, embed_dim=8, num_heads=2, depth=1)(data((3, 10, 20))).shape == (4, 4)
    m = ViT((3, 12, 20), 4, patch_size=(3, 5), embed_dim=8, num_heads=2, depth=1, head_pool='max', fused_qkv=True)
    assert m.pos.shape == (1, 16, 8) and m(data((3, 12, 20))).shape == (4, 4)
    assert ViT((1, 8, 8), 4, embed_dim=10, num_heads=3, head_dim=4, depth=1)(data((1, 8, 8))).shape == (4, 4)

@given(n=st.integers(1, 600))
def test_groups_divide_any_width(n):
    g = norm_groups(n)
    assert n % g == 0 and 1 <= g <= 32 and (g == 1 or n // g >= 4)
    assert not any(n % d == 0 and n // d >= 4 for d in range(g + 1, 33))

@pytest.mark.parametrize('width', [3, 7, 31, 100])
@pytest.mark.parametrize('norm', ['batch', 'layer', 'group'])
def test_any_width_with_any_norm(width, norm):
    for m in (MLP(9, 3, hidden_sizes=width, normalization=norm),
              CNN((1, 8, 8), 3, channels=(width,), hidden_sizes=(width,), normalization=norm),
              ResNet((1, 8, 8), 3, channels=width, blocks=(1,), normalization=norm)):
        x = data((9,) if isinstance(m, MLP) else (1, 8, 8), 16)
        assert m(x).std(0).max() > .01

def test_ways_to_give_a_shape():
    x = data((1, 8, 8))
    for shape in ((1, 8, 8), [1, 8, 8], torch.Size([1, 8, 8]), x.shape[1:]): assert MLP(shape, 3)(x).shape == (4, 3)
    assert MLP(64, 3)(x).shape == MLP((64,), 3)(x.flatten(1)).shape == (4, 3)
    assert MLP(64, 3, hidden_sizes=())(x).shape == (4, 3) and num_parameters(MLP(64, 3, hidden_sizes=())) == 195
    assert num_parameters(MLP(64, 3, hidden_sizes=5)) == num_parameters(MLP(64, 3, hidden_sizes=[5]))
    json.dumps(MLP(x.shape[1:], 3).spec)
    import numpy as np
    assert MLP(np.int64(64), 3, hidden_sizes=np.array([7, 5]))(x).shape == (4, 3)

# ---- errors

BAD = [
    ('mlp', 64, dict(normalization='instance'), 'a vector has none'),
    ('mlp', 64, dict(normalization='bach'), "did you mean 'batch'"),
    ('mlp', 64, dict(activation='rellu'), "did you mean 'relu'"),
    ('mlp', 64, dict(dropout=1.0), r'\[0, 1\)'),
    ('mlp', 64, dict(dropout=-0.1), r'\[0, 1\)'),
    ('mlp', 64, dict(dropout='a'), r'\[0, 1\)'),
    ('mlp', 64, dict(hidden_sizes=(10, 0)), 'hidden_sizes'),
    ('mlp', 64, dict(hidden_sizes=2.5), 'hidden_sizes'),
    ('mlp', 64, dict(hidden_sizes='12'), 'hidden_sizes'),
    ('mlp', 64, dict(hidden_sizes=1, normalization='layer'), 'single value'),
    ('mlp', 64, dict(hidden_sizes=10, normalization='group', norm_groups=3), 'divisor'),
    ('mlp', 64, dict(hidden_sizes=10, normalization='group', norm_groups=10), 'single value'),
    ('mlp', (0, 3), {}, 'in_shape'),
    ('mlp', 64, dict(bias='yes'), 'bias'),
    ('mlp', None, {}, 'in_shape'),
    ('cnn', 64, {}, 'go to an MLP'),
    ('cnn', (8, 8), {}, 'go to an MLP'),
    ('cnn', (1, 8, 8), dict(channels=()), 'channels'),
    ('cnn', (1, 8, 8), dict(pool='mean'), 'pool'),
    ('cnn', (1, 8, 8), dict(kernel_size=(3, 3)), 'kernel_size'),
    ('cnn', (1, 8, 8), dict(stride=0), 'stride'),
    ('cnn', (1, 8, 8), dict(normalization='instance', norm_after_activation=True, pool='none', head_pool='avg'), 'always 0'),
    ('cnn', (1, 8, 8), dict(normalization='instance', stride=8), 'single value'),
    ('resnet', 64, {}, 'go to an MLP'),
    ('resnet', (1, 8, 8), dict(depth=20), 'depth'),
    ('resnet', (1, 8, 8), dict(block='wide'), 'block'),
    ('resnet', (1, 8, 8), dict(stem='big'), 'stem'),
    ('resnet', (1, 8, 8), dict(channels=(8, 8)), 'channels'),
    ('resnet', (1, 8, 8), dict(head_pool='cls'), 'head_pool'),
    ('resnet', (1, 8, 8), dict(zero_init=True, norm_affine=False), 'zero_init'),
    ('resnet', (1, 8, 8), dict(normalization='instance', norm_after_activation=True), 'always 0'),
    ('vit', 64, {}, 'go to an MLP'),
    ('vit', (1, 28, 28), dict(patch_size=8), 'divides the image'),
    ('vit', (1, 8, 8), dict(embed_dim=10, num_heads=3), 'divisor of embed_dim'),
    ('vit', (1, 8, 8), dict(head_pool='mean'), 'head_pool'),
    ('vit', (1, 8, 8), dict(normalization='instance', head_pool='avg'), 'always 0'),
    ('vit', (1, 8, 8), dict(attention_dropout=2), 'attention_dropout'),
    ('vit', (1, 8, 8), dict(num_heads=0), 'num_heads'),
    ('vit', (1, 8, 8), dict(mlp_ratio=0), 'mlp_ratio'),
]

@pytest.mark.parametrize('name,shape,options,says', BAD)
def test_what_makes_no_sense_says_why(name, shape, options, says):
    with pytest.raises(ValueError, match=says) as e: make_model(name, shape, 5, **options)
    assert '\n' not in str(e.value)

def test_names_are_checked():
    with pytest.raises(TypeError, match="mlp: no option 'norm_afine'; did you mean 'norm_affine'"):
        make_model('mlp', 64, 10, norm_afine=False)
    with pytest.raises(ValueError, match="did you mean 'resnet'"): make_model('resnt', 64, 10)
    with pytest.raises(ValueError, match='num_classes'): make_model('mlp', 64, 0)
    with pytest.raises(ValueError, match='layout'): normalization('batch', 3, 'maps')
    with pytest.raises(ValueError, match='is taken'): register_model('mlp')(lambda in_shape, num_classes: None)
    with pytest.raises(ValueError, match='constant'): gain(lambda z: z * 0 + 1)
    assert MODELS['mlp'] is MLP and activation('tanh') is not activation('tanh')

def test_own_model():
    try:
        @register_model('own')
        def own(in_shape, num_classes, width=3, **rest): return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(in_shape), num_classes))
        assert make_model('own', (1, 4, 4), 7, more=1).spec == dict(name='own', in_shape=(1, 4, 4), num_classes=7, more=1)
        assert flops(make_model('own', (1, 4, 4), 7)) == 2 * 16 * 7
    finally: MODELS.pop('own', None)

# ---- starts

@pytest.mark.parametrize('act', ACTIVATIONS)
def test_signal_and_gradient_survive_depth(act):
    for name, shape, o in (('mlp', (200,), dict(hidden_sizes=(200,) * 20)), ('cnn', (3, 16, 16), dict(channels=(24,) * 12, pool='none'))):
        m = make_model(name, shape, 10, seed=1, activation=act, **o)
        x = data(shape, 64)
        y = m(x)
        (y * data(y.shape[1:], 64, seed=3)).sum().backward()
        with torch.no_grad(): first, last = (h.std(0).mean().item() for h in (m.layers[0](x), m.layers(x)))
        assert .1 < last / first < 5 and .02 < last < 5
        grads = [p.grad.norm() / p.norm() for k, p in m.named_parameters() if k.endswith('weight')]
        assert .005 < grads[0] / grads[-1] < 200
        assert .05 < y.std(0).mean() < 10

@pytest.mark.parametrize('act', ACTIVATIONS)
@pytest.mark.parametrize('name', ['resnet', 'vit'])
@pytest.mark.parametrize('norm', ['none', 'batch', 'layer'])
def test_residual_streams_keep_their_size(act, name, norm):
    o = dict(blocks=(4, 4), channels=12) if name == 'resnet' else dict(depth=12, embed_dim=24)
    m, outs = make_model(name, (3, 16, 16), 10, seed=0, activation=act, normalization=norm, **o), []
    def listen(_m, _i, y): outs.append(y.std(0).mean().item())
    for b in m.modules():
        if isinstance(b, (Residual, Block)): b.register_forward_hook(listen)
    with torch.no_grad(): m(data((3, 16, 16), 32))
    assert len(outs) >= 8 and .02 < outs[-1] and max(outs) / min(outs) < 10

def test_gains_known():
    assert gain('relu')[0] == pytest.approx(2**.5, abs=1e-4) and gain('linear')[0] == pytest.approx(1, abs=1e-9)
    assert gain('selu')[0] == pytest.approx(1, abs=1e-4)
    assert gain('leaky_relu')[0] == pytest.approx(nn.init.calculate_gain('leaky_relu', .01), abs=1e-4)
    z = torch.randn(2_000_000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for a in ACTIVATIONS:
        g, centred = gain(a)
        out = ACTIVATIONS[a]()(z)
        assert (out.std() if centred else out.square().mean().sqrt()).item() * g == pytest.approx(1, abs=.005)
    assert [a for a in ACTIVATIONS if gain(a)[1]] == ['sigmoid']
    assert branch_scale('relu', 16) == .25 and branch_scale('linear', 4) == .5 and .5 < branch_scale('sigmoid', 16) <= 1

def test_draw_weight():
    with seeded(0):
        w, c = (draw_weight(torch.empty(400, 300), 2., centred) for centred in (False, True))
        k = draw_weight(torch.empty(64, 16, 3, 3), 1., True)
    assert w.std().item() == pytest.approx(2 / 300**.5, rel=.02) and c.std().item() == pytest.approx(2 / 300**.5, rel=.02)
    assert c.sum(1).abs().max() < 1e-4 and k.sum((1, 2, 3)).abs().max() < 1e-4
    assert draw_weight(torch.empty(5, 1), 1., True).abs().min() > 0

@pytest.mark.parametrize('name,o', [('resnet', dict(normalization='batch')), ('resnet', dict(normalization='none')), ('vit', {}),
                                    ('resnet', dict(normalization='group', norm_after_activation=True))])
def test_zero_init_starts_as_the_skip(name, o):
    m = make_model(name, (1, 8, 8), 5, seed=0, zero_init=True, **SMALL[name], **o).eval()
    x, before = data((1, 8, 8)), None
    before = m(x)
    for k, p in m.named_parameters():
        if ('branch.0' in k or 'attn.q' in k or 'mlp.fc1' in k) and p.ndim > 1: p.data.mul_(3)
    assert torch.allclose(m(x), before, atol=1e-6)

def test_seed_in_the_call():
    torch.manual_seed(1); a = make_model('vit', (1, 8, 8), 5, seed=7, **SMALL['vit'])
    state = torch.get_rng_state(); torch.manual_seed(2); b = make_model('vit', (1, 8, 8), 5, seed=7, **SMALL['vit'])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    torch.set_rng_state(state); make_model('vit', (1, 8, 8), 5, seed=9, **SMALL['vit'])
    assert torch.equal(torch.get_rng_state(), state)

def test_no_bias_before_a_norm():
    m = MLP(9, 3, hidden_sizes=(4, 4), normalization='batch')
    assert m.layers[0].linear.bias is None and m.head.bias is not None and m.layers[0].norm.bias is not None
    assert MLP(9, 3, normalization='batch', norm_after_activation=True).layers[0].linear.bias is not None
    assert MLP(9, 3, normalization='batch', bias=True).layers[0].linear.bias is not None
    for after, order in ((False, ['linear', 'norm', 'act', 'drop']), (True, ['linear', 'act', 'norm', 'drop'])):
        m = MLP(9, 3, normalization='batch', norm_after_activation=after)
        assert [n for n, _ in m.layers[0].named_children()] == order

# ---- oracles

@pytest.mark.parametrize('depth', [18, 50])
def test_same_network_as_torchvision_resnet(depth):
    models = pytest.importorskip('torchvision.models')
    with seeded(0): theirs = getattr(models, f'resnet{depth}')(num_classes=7).eval()
    ours = ResNet((3, 64, 64), 7, depth=depth, stem='imagenet').eval()
    a, b = theirs.state_dict(), ours.state_dict()
    assert [v.shape for v in a.values()] == [v.shape for v in b.values()]
    ours.load_state_dict(dict(zip(b, a.values(), strict=True)))
    x = data((3, 64, 64), 2)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)

@pytest.mark.parametrize('depth', RESNETS)
def test_counts_of_torchvision_resnets(depth):
    counts = {10: 5_418_792, 18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
    with torch.device('meta'): assert num_parameters(ResNet((3, 224, 224), 1000, depth=depth)) == counts[depth]

def test_same_network_as_torchvision_vit():
    models = pytest.importorskip('torchvision.models')
    with seeded(0): theirs = models.VisionTransformer(16, 4, 2, 3, 24, 48, num_classes=7).eval()
    nn.init.normal_(theirs.heads.head.weight)
    ours = ViT((3, 16, 16), 7, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, fused_qkv=True).eval()
    for m in ours.modules():
        if isinstance(m, nn.LayerNorm): m.eps = 1e-6
    t, both = theirs.state_dict(), ('weight', 'bias')
    pairs = dict(cls='class_token', pos='encoder.pos_embedding')
    for o, v in dict(patch='conv_proj', norm='encoder.ln', head='heads.head').items(): pairs |= {f'{o}.{k}': f'{v}.{k}' for k in both}
    inside = {'norm1': 'ln_1.', 'norm2': 'ln_2.', 'attn.qkv': 'self_attention.in_proj_', 'attn.proj': 'self_attention.out_proj.',
              'mlp.fc1': 'mlp.0.', 'mlp.fc2': 'mlp.3.'}
    for i in range(2): pairs |= {f'blocks.{i}.{o}.{k}': f'encoder.layers.encoder_layer_{i}.{v}{k}' for o, v in inside.items() for k in both}
    ours.load_state_dict({o: t[v] for o, v in pairs.items()})
    x = data((3, 16, 16))
    assert torch.allclose(ours(x), theirs(x), atol=1e-5) and num_parameters(ours) == num_parameters(theirs)

def test_fused_and_separate_attention_agree():
    with seeded(0): a, b = Attention(12, 3), Attention(12, 3, fused_qkv=True)
    b.qkv.weight.data = torch.cat([m.weight.data for m in (a.q, a.k, a.v)])
    b.qkv.bias.data = torch.cat([m.bias.data for m in (a.q, a.k, a.v)])
    b.proj.load_state_dict(a.proj.state_dict())
    x = data((5, 12))
    assert torch.allclose(a(x), b(x), atol=1e-6) and a.num_heads == b.num_heads == 3 and a.head_dim == 4

@pytest.mark.parametrize('fused', [False, True])
def test_attention_after_heads_are_cut(fused):
    with seeded(0): a = Attention(12, 3, fused_qkv=fused, bias=False)
    ref, keep, x = copy.deepcopy(a), torch.arange(4, 12), data((5, 12))
    ref.proj.weight.data[:, :4] = 0
    rows = torch.cat([keep, keep + 12, keep + 24]) if fused else keep
    for m in ((a.qkv,) if fused else (a.q, a.k, a.v)): m.weight.data = m.weight.data[rows]
    a.proj.weight.data = a.proj.weight.data[:, keep]
    assert a.num_heads == 2 and torch.allclose(a(x), ref(x), atol=1e-6)

def test_widths_may_change():
    m, x = MLP(6, 3, hidden_sizes=(5, 5)), data((6,))
    y = m(x)
    a, b = m.layers[0].linear, m.layers[1].linear
    a.weight.data, a.bias.data = a.weight.data.repeat(2, 1), a.bias.data.repeat(2)
    b.weight.data = b.weight.data.repeat(1, 2) / 2
    assert torch.allclose(m(x), y, atol=1e-6) and m.sizes() == dict(hidden_sizes=(10, 5)) and 'hidden_sizes=(10, 5)' in repr(m)
    v, x = ViT((1, 8, 8), 3, embed_dim=8, num_heads=2, depth=1, normalization='none', head_pool='avg'), data((1, 8, 8))
    y = v(x)
    for p, d in ((v.patch.weight, 0), (v.patch.bias, 0), (v.pos, 2), (v.blocks[0].attn.proj.weight, 0), (v.blocks[0].attn.proj.bias, 0),
                 (v.blocks[0].mlp.fc2.weight, 0), (v.blocks[0].mlp.fc2.bias, 0)): p.data = torch.cat([p.data, p.data], d)
    b = v.blocks[0]
    for m in (b.attn.q, b.attn.k, b.attn.v, b.mlp.fc1, v.head): m.weight.data = torch.cat([m.weight.data] * 2, 1) / 2
    assert torch.allclose(v(x), y, atol=1e-6) and v.sizes()['embed_dim'] == 16

def test_flops():
    assert flops(MLP(10, 3, hidden_sizes=(7,))) == 2 * (70 + 21)
    assert flops(CNN((3, 8, 8), 2, channels=(4,), hidden_sizes=(), pool='none')) == 2 * (64 * 4 * 27 + 256 * 2)
    m = ViT((1, 8, 8), 3, embed_dim=8, num_heads=2, depth=1, patch_size=4, head_pool='avg').train()
    m.blocks[0].eval()
    tokens, e = 4, 8
    assert flops(m) == 2 * (tokens * 16 * e + 4 * tokens * e * e + 2 * tokens * tokens * e + 8 * tokens * e * e + e * 3)
    assert m.training and not m.blocks[0].training and all(p.grad is None for p in m.parameters())
    before = {k: v.clone() for k, v in ResNet((1, 8, 8), 2, channels=4).state_dict().items() if 'running' in k}
    r = ResNet((1, 8, 8), 2, channels=4).double(); flops(r)
    assert all(torch.equal(v.float(), before[k]) for k, v in r.state_dict().items() if 'running' in k)
    assert flops(nn.Linear(5, 2), 5) == 20

def test_layer_norm_is_group_norm_with_one_group():
    x = data((6, 5, 5), 3)
    assert torch.allclose(normalization('layer', 6, 'map')(x), F.layer_norm(x, (6, 5, 5)), atol=1e-5)
    t = data((7, 8), 3)
    assert torch.allclose(normalization('layer', 8, 'token')(t), normalization('group', 8, 'token', groups=1)(t), atol=1e-5)
    g = normalization('group', 8, 'token', groups=2)(t)
    assert torch.allclose(g[1, 2], normalization('group', 8, groups=2)(t[1, 2][None])[0], atol=1e-5)
    i = normalization('instance', 8, 'token')(t)
    assert i.mean(1).abs().max() < 1e-5 and i.shape == t.shape
    b = normalization('batch', 8, 'token')(t)
    assert b.mean((0, 1)).abs().max() < 1e-5
