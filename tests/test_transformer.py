"The model: GPT-2's logits, the cache, edits, checkpoints"
import copy

import pytest
import torch

from plasticity.edits import edit, replay
from plasticity.models import make_model
from plasticity.text import Bytes, TextData
from plasticity.transformer import GPT, Cache, TextTrainer, attention_maps, from_gpt2, load_language_model, save_language_model
from plasticity.units import units

def small(seed=0, **options):
    return make_model('gpt', 32, 50, seed=seed, **(dict(hidden_size=24, num_layers=2, num_heads=4) | options)).eval()

def tokens(n=12, rows=2, top=50): return torch.randint(top, (rows, n), generator=torch.Generator().manual_seed(n))

@pytest.fixture(scope='module')
def hugging():
    transformers = pytest.importorskip('transformers', reason='transformers is missing: pip install transformers to compare with its GPT-2')
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=None,
                                     initializer_range=.4)
    model = transformers.GPT2LMHeadModel(config).eval()
    for n, p in model.named_parameters(): torch.nn.init.normal_(p, 1. if 'ln_' in n and n.endswith('weight') else 0., .2)  # biases too
    return model

def test_equal_to_gpt2(hugging):
    ours, x = from_gpt2(hugging), tokens(40, 3, 97)
    with torch.no_grad(): a, b = ours(x), hugging(x).logits
    assert b.std() > .5 and (a - b).abs().max() < 1e-4
    assert ours.tied and ours.sizes()['num_heads'] == 4

def test_equal_to_gpt2_from_files(hugging, tmp_path):
    hugging.save_pretrained(tmp_path)
    x = tokens(20, 1, 97)
    with torch.no_grad(): assert (from_gpt2(tmp_path)(x) - hugging(x).logits).abs().max() < 1e-4

@pytest.mark.parametrize('options', [dict(tie_word_embeddings=False),
                                     dict(n_inner=20, activation_function='relu', layer_norm_epsilon=1e-2)])
def test_equal_to_other_gpt2(options, tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is missing: pip install transformers to compare with its GPT-2')
    torch.manual_seed(4)
    config = transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3, initializer_range=.3, bos_token_id=0,
                                     eos_token_id=1, **options)
    theirs, x = transformers.GPT2LMHeadModel(config).eval(), tokens(20, 2, 61)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for m in (from_gpt2(theirs), from_gpt2(tmp_path)):
            assert (m(x) - theirs(x).logits).abs().max() < 1e-4 and m.tied == config.tie_word_embeddings

@pytest.mark.parametrize('option', [dict(scale_attn_weights=False), dict(scale_attn_by_inverse_layer_idx=True),
                                    dict(add_cross_attention=True)])
def test_refuses_what_computes_something_else(option):
    transformers = pytest.importorskip('transformers', reason='transformers is missing: pip install transformers to compare with its GPT-2')
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, **option)
    with pytest.raises(ValueError, match=next(iter(option))): from_gpt2(transformers.GPT2LMHeadModel(config))

def test_greedy_text_of_gpt2(hugging):
    from plasticity.generation import generate
    x = tokens(5, 1, 97)
    theirs = hugging.generate(x, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 5:].tolist()
    assert generate(from_gpt2(hugging), x, 30, temperature=0)[0] == theirs

@pytest.mark.parametrize('positions', ['learned', 'rotary'])
def test_cache_is_the_whole(positions):
    m, x = small(positions=positions), tokens(16)
    with torch.no_grad():
        cache, whole = Cache(16), m(x)
        parts = torch.cat([m(x[:, i:j], cache) for i, j in ((0, 5), (5, 6), (6, 10), (10, 16))], 1)
    assert (whole - parts).abs().max() < 1e-5
    with pytest.raises(ValueError, match='room'): m(x[:, :1], cache)

@pytest.mark.parametrize('positions', ['learned', 'rotary'])
def test_filling_changes_nothing(positions):
    m, x = small(positions=positions), tokens(9, 1)
    with torch.no_grad():
        pad, cache = torch.tensor([4, 0]), Cache(13)
        both = torch.cat([torch.cat([x.new_full((1, 4), 7), x], 1), tokens(13, 1)])
        out = torch.cat([m(both[:, :11], cache, pad), m(both[:, 11:], cache, pad)], 1)
        assert (out[0, 4:] - m(x)[0]).abs().max() < 1e-5 and (out[1] - m(tokens(13, 1))[0]).abs().max() < 1e-5
        assert out.isfinite().all()

@pytest.mark.parametrize('positions', ['learned', 'rotary'])
def test_edits_keep_or_mask(positions):
    m, x = small(positions=positions), tokens()
    with torch.no_grad(): before = m(x)
    masked = copy.deepcopy(m)
    masked.blocks[0].attn.proj.weight.data[:, 6:12] = 0
    state = {k: v.clone() for k, v in m.state_dict().items()}
    with edit(m, examples=x) as e: e.prune(next(g for g in units(m, x) if g.axis == 'head'), [1])
    with torch.no_grad(): assert m.heads == [3, 4] and (m(x) - masked(x)).abs().max() < 1e-5
    replay(m, e.record.inverse())
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in state.items())
    with edit(m, examples=x) as e:
        e.widen('blocks.0.fc1', 5); e.widen(next(g for g in units(m, x) if g.axis == 'head'), 2)
    with edit(m, examples=x) as e: e.deepen('blocks.1')
    with torch.no_grad():
        assert (m(x) - before).abs().max() < 1e-5 and m.heads == [6, 4, 4]
        cache = Cache(12)
        assert (torch.cat([m(x[:, i:i + 1], cache) for i in range(12)], 1) - m(x)).abs().max() < 1e-5

def test_sizes_can_differ_by_layer(tmp_path):
    m, x = small(num_heads=(2, 3), head_dim=6, ff_size=(10, 20)), tokens()
    assert m.sizes()['num_heads'] == (2, 3) and m.sizes()['ff_size'] == (10, 20)
    save_language_model(tmp_path, m, dict(kind='bytes'))
    again, tokenizer, _ = load_language_model(tmp_path)
    with torch.no_grad(): assert torch.equal(again(x), m(x)) and tokenizer == dict(kind='bytes')

def test_norms_and_an_untied_head_are_saved_as_they_are(tmp_path):
    m, x = small(norm_eps=.1), tokens()
    m.head.weight = torch.nn.Parameter(m.head.weight.detach() + torch.randn(m.head.weight.shape))
    save_language_model(tmp_path, m)
    again, _, about = load_language_model(tmp_path)
    assert not again.tied and again.norm.eps == again.blocks[1].norm2.eps == .1 == about['spec']['norm_eps']
    with torch.no_grad(): assert torch.equal(again(x), m(x)) and not torch.equal(small()(x), small(norm_eps=.1)(x))

def test_a_run_with_an_untied_head_is_saved_as_it_is(tmp_path):
    m = small()
    m.head.weight = torch.nn.Parameter(m.head.weight.detach().clone())
    data = TextData('t', torch.arange(999) % 50, torch.arange(99) % 50, Bytes(), 32)
    TextTrainer(m, data, batch_size=4, device='cpu').fit(steps=2).save(tmp_path)
    again, x = load_language_model(tmp_path)[0], tokens()
    with torch.no_grad(): assert not again.tied and torch.equal(again(x), m.eval()(x))

def test_maps_are_the_attention():
    m, x = small(), tokens()
    maps = attention_maps(m, x)
    assert len(maps) == 2 and maps[0].shape == (2, 4, 12, 12)
    assert torch.allclose(maps[1].sum(-1), torch.ones(())) and not maps[0].triu(1).any()
    a = m.blocks[0].attn
    with torch.no_grad():
        h = m.blocks[0].norm1(m.tok(x) + m.pos(torch.arange(12)))
        out = a.proj((maps[0] @ a.heads(h)[2]).transpose(1, 2).flatten(2))
        assert (out - a(h)).abs().max() < 1e-5

def test_untied_and_compiled():
    m, x = small(tied=False), tokens()
    assert not m.tied
    torch._dynamo.reset()
    with torch.no_grad(): assert (torch.compile(m, backend='eager', fullgraph=True)(x) - m(x)).abs().max() < 1e-6

@pytest.mark.parametrize('options,word', [(dict(num_heads=5), 'num_heads'), (dict(positions='round'), 'positions'),
                                          (dict(dropout=1.), 'dropout'), (dict(positions='rotary', head_dim=3), 'head_dim'),
                                          (dict(num_layers=0), 'num_layers'), (dict(num_heads=(1, 2, 3)), 'num_heads')])
def test_wrong_arguments(options, word):
    with pytest.raises(ValueError, match=word): small(**options)

def test_too_long():
    with pytest.raises(ValueError, match='max_seq_length'): small()(tokens(33))

def test_is_registered(): assert isinstance(small(), GPT) and small().spec['name'] == 'gpt'
