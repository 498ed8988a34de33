"Tokenizers, text data, generation"
import pytest
import torch
from hypothesis import given, settings, strategies as st

from plasticity.data import DataMissing, get_data
from plasticity.generation import drawn, generate, odds, stopped
from plasticity.models import make_model
from plasticity.text import Bytes, Characters, TextData, get_tokenizer, text_files
from plasticity.training import Trainer

@given(st.text())
def test_bytes_and_characters_give_the_text_back(s):
    assert Bytes().decode(Bytes().encode(s)) == s and Characters(s).decode(Characters(s).encode(s)) == s

def test_learned_pairs_give_the_text_back():
    pytest.importorskip('tokenizers', reason='tokenizers is missing: pip install tokenizers')
    t = get_tokenizer('bpe', ['the cat sat on the mat ' * 30], 300)
    assert 256 <= t.size <= 300 and len(t.encode('the cat')) < 7
    for s in ('the cat', 'für 漢字 \n\t x'): assert t.decode(t.encode(s)) == s
    again = get_tokenizer(t.to_json())
    assert again.encode('the mat für') == t.encode('the mat für')

def test_gpt2_files(tmp_path):
    pytest.importorskip('tokenizers', reason='tokenizers is missing: pip install tokenizers')
    from tokenizers import ByteLevelBPETokenizer
    t = ByteLevelBPETokenizer(); t.train_from_iterator(['hello world ' * 9], vocab_size=270, show_progress=False)
    t.save_model(str(tmp_path))
    assert get_tokenizer(str(tmp_path)).encode('hello') == t.encode('hello').ids
    with pytest.raises(DataMissing, match='vocab.json'): get_tokenizer(str(tmp_path.parent))

def folder(path):
    (path/'texts'/'deep').mkdir(parents=True)
    (path/'texts'/'b.txt').write_text('second ' * 40); (path/'texts'/'a.txt').write_text('first ' * 40)
    (path/'texts'/'deep'/'c.md').write_text('third ' * 40); (path/'texts'/'x.bin').write_bytes(b'\0'*99)
    return path/'texts'

def test_a_folder_is_read_in_order_and_once(tmp_path):
    here = folder(tmp_path)
    d = get_data('text', root=tmp_path, path=str(here), length=16)
    whole = Bytes().decode(torch.cat([d.text['train'], d.text['test']]))
    assert whole == 'first '*40 + 'second '*40 + 'third '*40 and d.shape == (16,) and d.num_classes == 256
    made = list((tmp_path/'cache').glob('*.bin')); stamp = made[0].stat().st_mtime_ns
    get_data('text', root=tmp_path, path=str(here), length=8)
    assert [p.stat().st_mtime_ns for p in (tmp_path/'cache').glob('*.bin')] == [stamp]
    (here/'a.txt').write_text('other ' * 40)
    assert Bytes().decode(get_data('text', root=tmp_path, path=str(here), length=16).text['train'][:6]) == 'other '
    assert get_data('text', root=tmp_path, path=str(here/'b.txt'), length=16).name == 'b'

@pytest.mark.parametrize('options,word', [(dict(path='/nowhere'), 'no file'), (dict(tokenizer='char'), 'characters'),
                                          (dict(test=1.5), 'test'), (dict(length=10**6), 'length'), (dict(paht=3), 'path'),
                                          *((dict(length=n), f'length: got {n}') for n in (0, -1, 5.5, True))])
def test_wrong_options(options, word, tmp_path):
    here = folder(tmp_path)
    with pytest.raises((ValueError, TypeError, OSError), match=word): get_data('text', root=tmp_path, **(dict(path=str(here)) | options))

def test_python_itself(tmp_path):
    d = get_data('text', root=tmp_path, files=3)
    assert d.name == 'Python' and len(text_files(files=3)) == 3

def numbers(n=1000): return TextData('numbers', torch.arange(n) % 250, torch.arange(200), Bytes(), 16)

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_batches_follow_from_seed_and_epoch(size, seed, epoch):
    d = numbers()
    a = list(d.batches(size, seed=seed, epoch=epoch))
    assert len(a) == d.n_batches(size) and sum(len(x) for x, _ in a) == 62
    for x, y in a: assert torch.equal((x + 1) % 250, y) and x.dtype == y.dtype == torch.int64
    later = list(d.batches(size, seed=seed, epoch=epoch, start=len(a)//2))
    assert all(torch.equal(p[0], q[0]) for p, q in zip(later, a[len(a)//2:], strict=True))
    other = list(d.batches(size, seed=seed, epoch=epoch + 1))
    assert not all(torch.equal(p[0], q[0]) for p, q in zip(a, other, strict=True))

def test_stored_order_subset_probe_length():
    d = numbers()
    x = torch.cat([x for x, _ in d.batches(4, split='test', shuffle=False)])
    assert torch.equal(x, d.x_test.long()) and x[0, 0] == 0
    s = d.subset(train=5, test=.5)
    assert len(s.x_train) == 5 and len(s.x_test) == 6 and torch.equal(s.x_train, d.x_train[:5])
    assert d.probe(7)[0].shape == (7, 16) and d.stretched(8).shape == (8,)
    with pytest.raises(ValueError, match='train'): d.subset(train=10**6)
    with pytest.raises(ValueError, match='split'): d.split('valid')
    with pytest.raises(ValueError, match='start'): list(d.batches(4, start=99))

def test_the_loss_is_per_token():
    d = numbers()
    m = make_model('gpt', 16, 256, seed=0, hidden_size=16, num_layers=1, num_heads=2)
    t = Trainer(m, d, 'adamw', batch_size=4, seed=0, device='cpu', accumulate=2, clip=1., schedule='cosine', warmup=2)
    row = t.evaluate()
    with torch.no_grad(): right = torch.nn.functional.cross_entropy(m(d.x_test.long()).flatten(0, 1), d.y_test.flatten().long()).item()
    assert abs(row['loss'] - right) < 1e-4 and 0 <= row['accuracy'] <= 1
    t.fit(epochs=2)
    assert t.evaluate()['loss'] < row['loss']

def test_odds_against_transformers():
    pytest.importorskip('transformers', reason='transformers is missing: pip install transformers to compare with its knobs')
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
    z, x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))*3, torch.randint(40, (3, 6))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(x, z)/.8
    theirs = TopPLogitsWarper(.85)(x, TopKLogitsWarper(20)(x, theirs)).softmax(-1)
    before = torch.zeros(3, 40, dtype=torch.bool).scatter(1, x, True)
    ours = odds(z, .8, 20, .85, 1.3, before)
    assert torch.equal(ours > 0, theirs > 0) and torch.allclose(ours, theirs, atol=1e-6)

@settings(max_examples=40, deadline=None)
@given(st.floats(0, 3), st.one_of(st.none(), st.integers(1, 60)), st.one_of(st.none(), st.floats(.01, 1)), st.integers(0, 99))
def test_odds_are_odds(temperature, top_k, top_p, seed):
    z = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed))*4
    p = odds(z, temperature, top_k, top_p)
    assert torch.allclose(p.sum(1), torch.ones(2), atol=1e-5) and (p >= 0).all()
    assert ((p > 0).sum(1) <= (1 if temperature == 0 else top_k or 40)).all() and (p.argmax(1) == z.argmax(1)).all()
    for u in (0., .5, 1 - 2**-24): assert (p.gather(1, drawn(p, torch.tensor([u, u]))[:, None]) > 0).all()

def model(): return make_model('gpt', 20, 256, seed=1, hidden_size=16, num_layers=2, num_heads=2).eval()

def test_batched_is_single_and_cached_is_uncached_beyond_the_room():
    m, prompts = model(), [[1, 2, 3], [9]*25, [7]]
    out = generate(m, prompts, 60, seed=3, temperature=.9, top_k=30, repetition_penalty=1.2)
    assert out == generate(m, prompts, 60, seed=3, temperature=.9, top_k=30, repetition_penalty=1.2, cache=False)
    few = [[1, 2, 3], [9]*8, [7]]
    assert generate(m, few, 12, seed=3)[0] == generate(m, few[:1], 12, seed=3)[0]
    assert [len(o) for o in out] == [60]*3 and out != generate(m, prompts, 60, seed=4, temperature=.9)
    assert not m.training and m.train() and generate(m, [[1]], 2) and m.training

def test_stops():
    assert stopped('abcabc', ['ca', 'bc']) == 1 and stopped('abc', ['x']) is None and stopped([1, 2, 3], [[2, 3]]) == 1
    m = model()
    free = generate(m, 'hello', 40, Bytes(), seed=0)
    word = free[5:7]
    assert generate(m, 'hello', 40, Bytes(), stop=word, seed=0) == free[:free.find(word)]

@pytest.mark.parametrize('options', [dict(temperature=-1), dict(top_k=0), dict(top_p=1.2), dict(repetition_penalty=0)])
def test_wrong_knobs(options):
    with pytest.raises(ValueError, match=next(iter(options))): generate(model(), [[1]], 3, **options)

def test_wrong_prompts():
    with pytest.raises(ValueError, match='prompts'): generate(model(), [[]], 3)
    with pytest.raises(ValueError, match='tokenizer'): generate(model(), 'hello', 3)
    n = model().tok.weight.shape[0]
    for t in (-1, n):
        with pytest.raises(ValueError, match=f'prompts: got the token {t}, takes 0 to {n - 1}'): generate(model(), [[1], [2, t]], 3)
    for one in ([1, 2, 3], torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match='prompts: got single tokens'): generate(model(), one, 3)
    assert len(generate(model(), torch.tensor([[1, 2], [3, 4]]), 3)) == len(generate(model(), [torch.tensor([[1, 2]])]*2, 3)) == 2

def test_wrong_stops():
    for stop in ('ab', ['ab'], [7]):
        with pytest.raises(ValueError, match='^stop: got .* takes lists of tokens'): generate(model(), [[1]], 3, stop=stop)
    with pytest.raises(ValueError, match='^stop: got .* takes strings'): generate(model(), 'a', 3, Bytes(), stop=[[1, 2]])
    free = generate(model(), [[1]], 9)[0]
    assert generate(model(), [[1]], 9, stop=[free[3:5]])[0] == free[:stopped(free, [free[3:5]])]

def test_a_tokenizer_whose_files_changed_is_read_again(tmp_path):
    pytest.importorskip('tokenizers', reason='tokenizers is missing: pip install tokenizers')
    from tokenizers import ByteLevelBPETokenizer

    from plasticity.text import encoded
    (tmp_path/'a.txt').write_text('the cat sat on the mat. '*50)
    own = tmp_path/'own'
    own.mkdir()
    def trained(text, n):
        t = ByteLevelBPETokenizer()
        t.train_from_iterator([text], vocab_size=n, show_progress=False)
        t.save_model(str(own))
        return encoded(tmp_path/'cache', tmp_path/'a.txt', tokenizer=str(own))[1].size
    first = trained('the cat sat on the mat '*9, 262)
    assert first != trained('zebra zebra mat sat '*9, 300) and trained('the cat sat on the mat '*9, 262) == first

def test_how_many_tokens_to_write_is_checked():
    for n in (-1, 1.5, True):
        with pytest.raises(ValueError, match='n: got'): generate(None, [[1]], n=n)
