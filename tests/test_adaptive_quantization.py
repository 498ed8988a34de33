"Quantization: error, idempotence, number of values, files, training through it, torchao"
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plasticity.adaptive import AdaptiveMLP
from plasticity.data import Data, get_data
from plasticity.models import make_model, num_parameters
from plasticity.quantization import (SCHEMES, FakeQuantize, dequantize, fake_quantize, latencies, load_quantized, pack_bits, quantize,
                                     quantized, save_quantized, step_sizes, through, torchao_quantized, unpack_bits)
from plasticity.results import generator
from plasticity.training import Trainer

torch.set_num_threads(1)
shapes = st.sampled_from([(1,), (7,), (3, 5), (4, 3, 3, 3), (1, 9), (6, 1)])

@given(shape=shapes, bits=st.integers(2, 16), per_channel=st.booleans(), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1., 1e4]),
       dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_error_idempotence_values(shape, bits, per_channel, seed, scale, dtype):
    w = scale*torch.randn(shape, generator=generator(seed, 'w')).to(dtype)
    v, step = fake_quantize(w, bits, per_channel), step_sizes(w, bits, per_channel)
    eps = torch.finfo(dtype).eps
    assert ((v - w).abs() <= step/2 + 2*eps*w.abs().max()).all()
    assert torch.equal(fake_quantize(v, bits, per_channel), v)
    rows = v.flatten(1) if per_channel and v.dim() > 1 else v.reshape(1, -1)
    assert max(len(r.unique()) for r in rows) <= 2**bits
    q, s = quantize(w, bits, per_channel)
    assert q.abs().max() <= 2**(bits - 1) - 1 and torch.equal(dequantize(q, s, bits), v)

@pytest.mark.parametrize('bits', [2, 3, 5, 8, 11, 16])
def test_idempotent_to_the_bit_in_many_rows(bits):
    w = torch.randn(20_000, 8, generator=generator(bits, 'rows'))
    v = fake_quantize(w, bits)
    assert torch.equal(fake_quantize(v, bits), v) and torch.equal(v.abs().amax(1), w.abs().amax(1))

@pytest.mark.parametrize('w', [torch.zeros(3, 4), torch.full((2, 2), 5.), torch.tensor([[0., 0.], [1., -1.]])])
def test_constant_and_zero_weights(w): assert torch.equal(fake_quantize(w, 4), w)

@pytest.mark.parametrize('peak', [1e-45, 3e-44, 1e-40, 1e-38])
def test_weights_next_to_nothing_stay_finite(peak):
    w = torch.tensor([[peak, 0., -peak], [1., .5, 0.]])
    for bits in (2, 8, 16):
        v = fake_quantize(w, bits)
        assert (v - w).abs()[0].max() <= peak and torch.equal(through(w, bits), v) and step_sizes(w, bits).isfinite().all()

def test_not_a_number_is_refused():
    for bad in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='w'): fake_quantize(torch.tensor([[1., bad]]), 8)
    for bits in (1, 17, 2.5):
        with pytest.raises(ValueError, match='bits'): fake_quantize(torch.ones(2, 2), bits)

def test_half_precision_stays_half():
    w = torch.randn(4, 8, generator=generator(0)).bfloat16()
    v = fake_quantize(w, 6)
    assert v.dtype == torch.bfloat16 and torch.equal(fake_quantize(v, 6), v)

@given(bits=st.integers(2, 16), n=st.integers(0, 100), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_packing_is_exact_and_as_small_as_it_says(bits, n, seed):
    top = 2**(bits - 1) - 1
    q = torch.randint(-top, top + 1, (n,), generator=generator(seed), dtype=torch.int32)
    data = pack_bits(q, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-n*bits//8) and torch.equal(unpack_bits(data, bits, n), q)

@pytest.mark.parametrize('bits', [2, 3, 4, 8, 16])
def test_the_file_is_about_b_of_32(tmp_path, bits):
    m = make_model('mlp', 784, 10, seed=0, hidden_sizes=(512, 512))
    path = save_quantized(m, tmp_path/'m.safetensors', bits)
    ratio = os.path.getsize(path)/(4*num_parameters(m))
    assert bits/32 <= ratio < bits/32 + .015
    other = load_quantized(make_model('mlp', 784, 10, seed=1, hidden_sizes=(512, 512)), path)
    with quantized(m, bits):
        for k, p in m.state_dict().items(): assert torch.equal(p, other.state_dict()[k]), k

def test_files_keep_buffers_and_refuse_strangers(tmp_path):
    def net(seed): return make_model('cnn', (1, 8, 8), 3, seed=seed, channels=(4,), hidden_sizes=(8,), normalization='batch')
    m = net(0)
    m(torch.randn(8, 1, 8, 8)); save_quantized(m, tmp_path/'m.safetensors', 8)
    n = load_quantized(net(1), tmp_path/'m.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(m.buffers(), n.buffers(), strict=True))
    with pytest.raises(ValueError, match='shape|model'): load_quantized(make_model('mlp', 4, 2, seed=0), tmp_path/'m.safetensors')
    (tmp_path/'bad.safetensors').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='bad'): load_quantized(m, tmp_path/'bad.safetensors')

def test_quantized_gives_the_masters_back_also_after_an_error():
    m = make_model('mlp', 4, 2, seed=0, hidden_sizes=(5,))
    old = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(RuntimeError), quantized(m, 2):
        assert not torch.equal(m.head.weight, old['head.weight']) and torch.equal(m.head.bias, old['head.bias'])
        raise RuntimeError
    assert all(torch.equal(v, old[k]) for k, v in m.state_dict().items())

def test_straight_through_gradient_is_that_at_the_quantized_point():
    w = torch.randn(3, 4, generator=generator(0), requires_grad=True)
    x = torch.randn(5, 4, generator=generator(1))
    (through(w, 3) @ x.T).square().sum().backward()
    v = fake_quantize(w.detach(), 3).requires_grad_()
    (v @ x.T).square().sum().backward()
    assert torch.equal(w.grad, v.grad)

def data(n=64):
    x = torch.randn(n, 4, generator=generator(0, 'x'))
    return Data('small', x, (x[:, 0] > 0).long(), x[:16], (x[:16, 0] > 0).long())

@pytest.mark.parametrize(('every', 'calls'), [(100, 3), (7, 42), (1, 300)])
def test_counted_quantizations(every, calls):
    c = FakeQuantize(8, every)
    Trainer(make_model('mlp', 4, 2, seed=0, hidden_sizes=(5,)), data(48), batch_size=16, device='cpu', eval_every=0, callbacks=[c]).fit(100)
    assert c.schedule.fired == calls

def test_one_step_of_training_through_quantized_weights():
    def net(): return make_model('mlp', 4, 2, seed=0, hidden_sizes=(5,))
    m, d = net(), data(16)
    Trainer(m, d, optimizer='sgd', lr=.1, batch_size=16, device='cpu', eval_every=0, callbacks=[FakeQuantize(3, 1)]).fit(1)
    by_hand, (x, y) = net(), next(d.batches(16, seed=0, epoch=0))
    old = {k: p.detach().clone() for k, p in by_hand.named_parameters()}
    with quantized(by_hand, 3): nn.functional.cross_entropy(by_hand(x), y).backward()
    for k, p in m.named_parameters(): torch.testing.assert_close(p.detach(), old[k] - .1*by_hand.get_parameter(k).grad)
    assert len(m.head.weight.unique()) > 7                                                     # the masters are floats

def test_eight_bits_on_mnist_cost_less_than_a_point():
    try: d = get_data('mnist')
    except Exception as e: pytest.skip(f'no MNIST here: {e}')
    d = d.subset(train=6000, test=2000)
    t = Trainer(make_model('mlp', d.shape, 10, seed=0, hidden_sizes=(64,)), d, device='cpu', batch_size=128, eval_every=0).fit(3)
    a = t.evaluate()['accuracy']
    with quantized(t.model, 8): b = t.evaluate()['accuracy']
    assert a > .85 and abs(a - b) <= .01

@pytest.mark.parametrize('scheme', [s for s in SCHEMES if s.startswith('int')])
def test_torchao(scheme):
    pytest.importorskip('torchao', reason='torchao is not installed: pip install torchao')
    m = make_model('mlp', 256, 10, seed=0, hidden_sizes=(256, 256)).eval()
    x = torch.randn(32, 256, generator=generator(0))
    if scheme == 'int4_weight' and not torch.cuda.is_available():
        with pytest.raises(ValueError, match='int4'): torchao_quantized(m, scheme)
        return
    q = torchao_quantized(m, scheme)
    with torch.no_grad(): assert (q(x) - m(x)).abs().max() < .05*m(x).abs().max()
    assert all(type(p.data) is torch.Tensor for p in m.parameters())                           # the model itself is untouched

@pytest.mark.parametrize('scheme', ['int8_weight', 'int8_dynamic'])
def test_torchao_takes_a_model_that_was_pruned_and_has_grown(scheme):
    pytest.importorskip('torchao', reason='torchao is not installed: pip install torchao')
    m = AdaptiveMLP(64, 10, (48, 40), seed=0)
    m.expand_layer_width(0, 5); m.shrink_layer_width(1, 7); m.eval()
    x = torch.randn(50, 64, generator=generator(0))
    q = torchao_quantized(m, scheme)
    assert [tuple(l.weight.shape) for l in m.modules() if isinstance(l, nn.Linear)] == [(53, 64), (33, 53), (10, 33)]
    assert all(type(l.weight.data) is not torch.Tensor for l in q.modules() if isinstance(l, nn.Linear))
    with torch.no_grad(): assert 0 < (q(x) - m(x)).abs().max() < .05*m(x).abs().max()
    row = latencies(m, x, ['float32', scheme], device='cpu', repeats=2)[1]
    assert row['layers'] == '3 of 3' and row['bytes'] < .4*4*num_parameters(m)

def test_a_scheme_that_would_run_nothing_is_refused_and_told():
    pytest.importorskip('torchao', reason='torchao is not installed: pip install torchao')
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match='scheme: int8_dynamic.*0 of 0'): torchao_quantized(m, 'int8_dynamic')
    row = latencies(m, torch.randn(2, 1, 5, 5), ['float32', 'int8_dynamic'], device='cpu', repeats=2)[1]
    assert row['ms'] is None and row['verdict'].startswith('not here')

def test_measuring_leaves_the_settings_of_the_process_as_they_were():
    pytest.importorskip('torchao', reason='torchao is not installed: pip install torchao')
    import torch._inductor.config as inductor
    keys = 'coordinate_descent_tuning', 'force_fuse_int_mm_with_mul', 'coordinate_descent_check_all_directions'
    def now(): return torch.get_float32_matmul_precision(), *(getattr(inductor, k) for k in keys)
    before = now()
    latencies(nn.Linear(16, 16), torch.randn(4, 16), ['float32', 'int8_weight', 'int8_dynamic'], device='cpu', repeats=1)
    assert now() == before

def test_what_is_no_weight_is_refused():
    for w in ([1., 2.], torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match='^w: got'): fake_quantize(w)
    with pytest.raises(ValueError, match='^repeats: got'): latencies(nn.Linear(2, 2), torch.ones(1, 2), repeats=0)

def test_the_latency_table_says_what_is_slower():
    m = make_model('mlp', 64, 10, seed=0, hidden_sizes=(64,)).eval()
    x = torch.randn(16, 64)
    t = latencies(m, x, ['float32', 'int8_weight', 'int4_weight'], repeats=3)
    assert [r['scheme'] for r in t] == ['float32', 'int8_weight', 'int4_weight'] and t[0]['ms'] > 0 and t[0]['verdict'] == 'the reference'
    for r in t[1:]: assert r['verdict'] and ('ms' not in r or r['ms'] is None or ('slower' in r['verdict']) == (r['ms'] > t[0]['ms']))
    with pytest.raises(ValueError, match='schemes'): latencies(m, x, ['int7'])

def test_latencies_of_a_model_of_tokens():
    m = make_model('gpt', 16, 50, seed=0, hidden_size=16, num_layers=1, num_heads=2).eval()
    t = latencies(m, torch.randint(50, (2, 16)), ['float32', 'bfloat16'], device='cpu', repeats=1)
    assert all(r['ms'] > 0 for r in t)
    m = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    assert latencies(m, torch.randint(9, (2, 4)), ['float32', 'bfloat16'], device='cpu', repeats=1)[1]['ms'] > 0

def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def gpt(seed, **options): return make_model('gpt', 16, 200, seed=seed, hidden_size=64, num_layers=1, num_heads=4, **options)
    m = gpt(0)
    path = save_quantized(m, tmp_path/'m.safetensors', 4)
    assert os.path.getsize(path) < .2*4*num_parameters(m)
    n = load_quantized(gpt(1), path)
    assert n.tied and torch.equal(n.tok.weight, fake_quantize(m.tok.weight, 4))
    n = load_quantized(gpt(1, tied=False), path)
    assert torch.equal(n.tok.weight, n.head.weight)

def test_files_from_before_weights_were_stored_once(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file
    m = make_model('mlp', 4, 2, seed=0, hidden_sizes=(5,))
    path = save_quantized(m, tmp_path/'m.safetensors', 4)
    with safe_open(path, 'pt') as f: about, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    save_file(tensors, path, {k: v for k, v in about.items() if k != 'same'})
    n = load_quantized(make_model('mlp', 4, 2, seed=1, hidden_sizes=(5,)), path)
    assert torch.equal(n.head.weight, fake_quantize(m.head.weight, 4))
