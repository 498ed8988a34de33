"""Random sequences of edits and training steps on random small models with random optimizers: everything an edit promises.

    python tests/sequences.py 625 3     # 625 sequences of seed 3; ends with an error at the first that fails

`test_sequences.py` runs a few under hypothesis, which makes a failing one small.
"""
import copy, gc, json, os, random, subprocess, sys, tempfile, weakref
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import zoo
from plasticity.ages import OLD
from plasticity.edits import Clone, EditRecord, Widen, edit, replay
from plasticity.units import EditError, units

optim = torch.optim

# ---- random models

def some(*options): return options[int(torch.randint(len(options), ()))]
def size(): return some(1, 2, 3, 4, 5, 6)
def act(): return some(nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU)()

class Dense(nn.Module):
    "Linear layers with norms, skips and concatenations in between"
    shape = 7, 5
    def __init__(self):
        super().__init__(); n, self.kinds, self.layers = 5, [], nn.ModuleList()
        for _ in range(some(1, 2, 3)):
            kind = some('plain', 'plain', 'norm', 'skip', 'concat', 'gated', 'bottleneck'); m = size()
            if kind == 'skip': m = n
            body = [nn.Linear(n, 2*m if kind == 'gated' else m, bias=some(True, True, False))]
            if kind == 'norm': body += [some(nn.BatchNorm1d, nn.LayerNorm)(m)]
            if kind == 'bottleneck': body += [act(), nn.Linear(m, m + 1)]
            body += [nn.GLU() if kind == 'gated' else act()]
            self.layers.append(nn.Sequential(*body)); self.kinds.append(kind)
            n = m + n if kind == 'concat' else m + 1 if kind == 'bottleneck' else m
        self.head = nn.Linear(n, 3)
    def forward(self, x):
        for kind, f in zip(self.kinds, self.layers, strict=True):
            y = f(x); x = x + y if kind == 'skip' else torch.cat([x, y], -1) if kind == 'concat' else y
        return self.head(x)

class Conv(nn.Module):
    "Convolutions: plain, depthwise, residual, with squeeze and excite; flattened or pooled"
    shape = 6, 2, 6, 6
    def __init__(self):
        super().__init__(); n = size() + 1
        self.stem = nn.Sequential(nn.Conv2d(2, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), act())
        self.kinds, self.layers = [], nn.ModuleList()
        for _ in range(some(1, 2)):
            kind, m = some('plain', 'depthwise', 'skip', 'squeeze'), size() + 1
            if kind == 'plain': f = nn.Sequential(nn.Conv2d(n, m, 3, padding=1), some(nn.BatchNorm2d(m), nn.Identity()), act()); n = m
            elif kind == 'depthwise': f = nn.Sequential(nn.Conv2d(n, n, 3, padding=1, groups=n), act(), nn.Conv2d(n, m, 1)); n = m
            elif kind == 'skip': f = nn.Sequential(nn.Conv2d(n, m, 1), act(), nn.Conv2d(m, n, 3, padding=1), nn.BatchNorm2d(n))
            else: f = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, m, 1), nn.ReLU(), nn.Conv2d(m, n, 1), nn.Sigmoid())
            self.kinds.append(kind); self.layers.append(f)
        self.flat = some(True, False)
        self.head = nn.Linear(n * 9 if self.flat else n, 2)
    def forward(self, x):
        x = self.stem(x)
        for kind, f in zip(self.kinds, self.layers, strict=True):
            y = f(x); x = x + y if kind == 'skip' else x * y if kind == 'squeeze' else y
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1) if self.flat else x.mean((2, 3)))

class Sequence(nn.Module):
    "A recurrent layer or attention, and a head"
    shape = 6, 5, 3
    def __init__(self):
        super().__init__(); h, self.kind = size() + 1, some('lstm', 'gru', 'rnn', 'attention')
        if self.kind == 'attention':
            self.heads, self.d = some(1, 2, 3), 2
            self.inp, self.qkv, self.out = nn.Linear(3, 4), nn.Linear(4, 3*self.heads*self.d), nn.Linear(self.heads*self.d, 4); h = 4
        else:
            kind = dict(lstm=nn.LSTM, gru=nn.GRU, rnn=nn.RNN)[self.kind]
            self.body = kind(3, h, some(1, 2), batch_first=True, bidirectional=some(True, False))
        self.head = nn.Linear(h if self.kind == 'attention' else h * (1 + self.body.bidirectional), 2)
    def forward(self, x):
        if self.kind != 'attention': return self.head(self.body(x)[0][:, -1])
        x = self.inp(x); q, k, v = (t.unflatten(-1, (-1, self.d)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))

MODELS = dict(dense=Dense, conv=Conv, sequence=Sequence)
def halves(p): p = list(p); return [dict(params=p[:len(p)//2], lr=2e-3), dict(params=p[len(p)//2:], weight_decay=.01)]
OPT = dict(sgd=lambda p: optim.SGD(p, .02), momentum=lambda p: optim.SGD(halves(p), .02, momentum=.9),
           nesterov=lambda p: optim.SGD(p, .02, momentum=.9, nesterov=True, weight_decay=1e-3), adam=lambda p: optim.Adam(p, 1e-3),
           amsgrad=lambda p: optim.Adam(p, 1e-3, amsgrad=True), adamw=lambda p: optim.AdamW(halves(p), 1e-3),
           fused=lambda p: optim.AdamW(p, 1e-3, fused=True), foreach=lambda p: optim.Adam(p, 1e-3, foreach=True),
           nadam=optim.NAdam, radam=optim.RAdam, rmsprop=lambda p: optim.RMSprop(p, 1e-3, centered=True, momentum=.5),
           adagrad=optim.Adagrad)

def structure(name, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return zoo.shake(MODELS[name](), seed)

def data(name, seed): return torch.randn(MODELS[name].shape, generator=torch.Generator().manual_seed(seed + 1))

def train(net, opt, x, n=1):
    net.train()
    for _ in range(n):
        opt.zero_grad(); (net(x) - 1).square().mean().backward(); opt.step()

def image(net, opt):
    "Every tensor and plain attribute, with the optimizer's"
    out = {k: v.detach().clone() for k, v in [*net.named_parameters(), *net.named_buffers()]}
    for n, p in net.named_parameters():
        out |= {(n, k): v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state.get(p, {}).items()}
    for n, m in net.named_modules():
        out |= {('attr', n, k): v for k, v in vars(m).items() if isinstance(v, (int, tuple)) and k[0] != '_' and k != 'training'}
    return out

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype if isinstance(v, torch.Tensor) else v == b[k]
                                        for k, v in a.items())

@torch.no_grad()
def out(net, x): return net.eval()(x)

def twin(net, opt):
    "A copy of a network with a copy of its optimizer, in float64"
    names = {id(p): n for n, p in net.named_parameters()}
    fresh = copy.deepcopy(net).double(); own = dict(fresh.named_parameters())
    o = type(opt)([{**g, 'params': [own[names[id(p)]] for p in g['params']]} for g in opt.param_groups])
    o.state.clear() # some make states at birth
    for n, p in net.named_parameters():
        if p in opt.state: o.state[own[n]] = {k: v.double() if isinstance(v, torch.Tensor) and v.dim() else copy.deepcopy(v) for k, v
                                              in opt.state[p].items()}
    return fresh, o

# ---- what an edit has to give, worked out by hand

POWER = dict(age=0, momentum_buffer=1, exp_avg=1, exp_avg_sq=2, max_exp_avg_sq=2, sum=2, square_avg=2, grad_avg=1, grad=1)

def behind(g, new, split):
    "(unit that each unit was, which copy, share), for copies that stand right behind their unit"
    unit, copies = [], []
    for i in range(g.n + len(new)):
        if i in new: unit.append(unit[-1]); copies.append(copies[-1] + 1)
        else: unit.append(unit[-1] + 1 if unit else 0); copies.append(0)
    part = [((1 - split) / split) ** c for c in copies]
    total = [sum(p for p, v in zip(part, unit, strict=True) if v == u) for u in unit]
    return unit, copies, [p / t for p, t in zip(part, total, strict=True)]

def spread(pos, length, unit, copies):
    "(old position, unit after) along a dimension: each run of a unit's positions, then its copies"
    owner = [-1] * length
    for u, ps in enumerate(pos.tolist()):
        for p in ps: owner[p] = u
    order, p = [], 0
    while p < length:
        q = p
        while q < length and owner[q] == owner[p]: q += 1
        times = [None] if owner[p] < 0 else [i for i, u in enumerate(unit) if u == owner[p]]
        for i in times: order += [(j, i) for j in range(p, q)]
        p = q
    return order

def by_hand(tensors, g, new, split, rms=False):
    "Tensors, moments and gradients after copying units"
    unit, copies, share = behind(g, new, split)
    res = dict(tensors)
    for (t, d), pos in g.maps.items():
        order = spread(pos, tensors[t].shape[d], unit, copies)
        index = torch.tensor([o for o, _ in order])
        by = torch.tensor([1. if i is None else share[i] for _, i in order], dtype=torch.float64)
        for key in [k for k in res if k == t or isinstance(k, tuple) and k[0] == t]:
            v = res[key]
            if not isinstance(v, torch.Tensor) or v.dim() <= d: continue
            power = POWER[key[1]] if isinstance(key, tuple) else 0
            if rms and key != t and key[1] == 'momentum_buffer': power = 0 # an average of finished steps
            reads = (t, d) in g.consumers
            power = (not isinstance(key, tuple)) if reads else power
            res[key] = (v.index_select(d, index).double() * by.pow(power).view([-1 if i == d else 1 for i in range(v.dim())])).to(v.dtype)
    return res

def tensors_of(net, opt): return {k: v for k, v in image(net, opt).items() if isinstance(v, torch.Tensor)}

def gradients(net, x):
    net = copy.deepcopy(net).double().train()
    grads = torch.autograd.grad((net(x.double()) - 1).square().mean(), list(net.parameters()), allow_unused=True)
    return {(n, 'grad'): torch.zeros_like(p) if v is None else v for (n, p), v in zip(net.named_parameters(), grads, strict=True)}

def close(a, b, what, rtol=2e-6, top=0.):
    for k, v in a.items():
        if not isinstance(v, torch.Tensor) or k not in b: continue
        top = max(top, v.double().abs().max().item() if v.numel() else 0.) if what == 'gradients' else v.double().abs().max().item()
        assert v.shape == b[k].shape and torch.allclose(v.double(), b[k].double(), rtol=rtol, atol=rtol * top + 1e-30), (what, k)

def muted(net, g, index):
    "A copy of the network in which nothing reads these units"
    net = copy.deepcopy(net); own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for t, d in g.consumers: own[t].data.index_fill_(d, g.map(t, d)[index].reshape(-1), 0.)
    return net

def left(g, index, t, v):
    "A tensor without the positions of some units"
    for (name, d), pos in g.maps.items():
        if name != t or v.dim() <= d: continue
        rest = torch.ones(v.shape[d], dtype=torch.bool); rest[pos[index].reshape(-1)] = False
        v = v.index_select(d, rest.nonzero()[:, 0])
    return v

def check_copied(net, opt, x, was, grads, g, new, split, rms):
    "Values, moments, gradients and two steps of training, all against hand-made ones"
    hand = by_hand(was, g, new, split, rms)
    close(hand, tensors_of(net, opt), 'tensors')
    close(by_hand(grads | was, g, new, split), gradients(net, x), 'gradients', 3e-6, max(v.abs().max().item() for v in grads.values()))
    (a, ao), (b, bo) = twin(net, opt), twin(net, opt)
    for n, p in b.named_parameters():
        p.data.copy_(hand[n])
        for k, v in bo.state.get(p, {}).items():
            if isinstance(v, torch.Tensor) and v.dim(): v.copy_(hand[n, k])
    for m, o in ((a, ao), (b, bo)): train(m, o, x.double(), 2)
    for p, q in zip(a.parameters(), b.parameters(), strict=True): assert torch.allclose(p, q, atol=1e-5), 'training'

def check_lost(net, opt, x, was, g, index, masked, gone):
    "Units that were pruned (gone) or begun anew: the masked network, and the others' values and moments to the last bit"
    y = out(masked, x)
    assert torch.allclose(out(net, x), y, atol=1e-4 * max(1, y.abs().max().item())), 'masked'
    now, keys = tensors_of(net, opt), [t for t, _ in g.maps]
    for k, v in was.items():
        if k[1] == 'age' and isinstance(k, tuple) and k not in now: # none is young any more
            assert (left(g, index, k[0], v) == OLD).all(), k
            continue
        t = k[0] if isinstance(k, tuple) else k
        if t not in keys: assert torch.equal(now[k], v), k
        else: assert torch.equal(now[k] if gone else left(g, index, t, now[k]), left(g, index, t, v)), k

# ---- the sequences

def hooks(net):
    m = nn.modules.module
    return sum(map(len, (m._global_forward_hooks, m._global_forward_pre_hooks, m._global_backward_hooks))) + sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks) for m in net.modules())

def one(net, o, x, move, pick, seed, closely):
    "One edit, checked (closely: moments and gradients too); (images before and after, record), or None where it was refused"
    y, before, was = out(net, x), image(net, o), tensors_of(net, o)
    grads = gradients(net, x) if closely else None
    found = units(net, x); g = found[pick(len(found))] if len(found) else None
    if g is None and move != 'deepen': return None
    index, verbs = [pick(g.n)] if g else [], dict(copy=lambda: Widen(g, 1 + pick(3), seed=seed), clone=lambda: Clone(g, 2),
                                                  zero=lambda: Widen(g, 1 + pick(2), start='zero', seed=seed))
    masked = muted(net, g, index) if move in ('prune', 'reset') else None
    try:
        with edit(net, o, x) as e:
            if move == 'deepen': e.deepen('head', seed=seed)
            elif move == 'prune': e.prune(g, index)
            elif move == 'reset': e.reset(g, index, seed=seed)
            else: e.do(verbs[move]())
    except EditError:
        assert same(image(net, o), before), 'a refused edit changed something'
        return None
    assert all(torch.isfinite(v).all() for v in tensors_of(net, o).values()), 'nan'
    rms = isinstance(o, optim.RMSprop)
    if masked is None: assert torch.allclose(out(net, x), y, atol=1e-4 * max(1, y.abs().max().item())), 'function'
    if closely and move in ('copy', 'clone'):
        check_copied(net, o, x, was, grads, g, e.record.new[g.name], .6 if move == 'copy' else .5, rms)
    if masked is not None: check_lost(net, o, x, was, g, index, masked, move == 'prune')
    if move == 'zero': check_begun(net, o, was, g, e.record.new[g.name])
    return before, e.record, image(net, o)

def check_begun(net, o, was, g, new):
    "The old units' values and moments to the last bit; the new ones' first moments at zero"
    order, now = torch.tensor([i for i in range(g.n + len(new)) if i not in new]), tensors_of(net, o)
    unit, copies, _ = behind(g, new, .5)
    for k, v in was.items():
        t = k[0] if isinstance(k, tuple) else k
        fresh = now[k]
        for (name, d), pos in g.maps.items():
            if name != t or fresh.dim() <= d: continue
            at = spread(pos, was[t].shape[d], unit, copies)
            late = torch.tensor([i in new for _, i in at])
            if isinstance(k, tuple) and k[1] in ('exp_avg', 'grad_avg') and late.any():
                assert fresh.index_select(d, late.nonzero()[:, 0]).abs().max() == 0, k
            fresh = fresh.index_select(d, (~late).nonzero()[:, 0])
        assert torch.equal(fresh, v), k
    assert len(order) == g.n

class Elsewhere:
    "A process of its own that repeats records"
    def __init__(self, folder):
        here = Path(__file__).parent
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]))
        self.folder = folder
        self.worker = subprocess.Popen([sys.executable, '-c', 'import sequences; sequences.answer()'], env=env, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def same(self, name, seed, opt, base, records, after):
        torch.save(base, self.folder/'base.pt'); torch.save(after, self.folder/'after.pt')
        paths = [str(r.save(self.folder/f'{i}')) for i, r in enumerate(records)]
        self.worker.stdin.write(json.dumps(dict(folder=str(self.folder), name=name, seed=seed, opt=opt, records=paths)) + '\n')
        self.worker.stdin.flush()
        return self.worker.stdout.readline().strip()
    def __enter__(self): return self
    def __exit__(self, *_): self.worker.stdin.close(); self.worker.wait(20)

def answer():
    "What the other process does: base + records = the edited model, bit for bit"
    torch.set_num_threads(1)
    for line in sys.stdin:
        d = json.loads(line); folder = Path(d['folder'])
        try:
            net = structure(d['name'], d['seed']); o = OPT[d['opt']](net.parameters())
            for thing, state in zip((net, o), torch.load(folder/'base.pt'), strict=True): thing.load_state_dict(state)
            replay(net, [EditRecord.load(p) for p in d['records']], o)
            print('same' if same(image(net, o), torch.load(folder/'after.pt')) else 'different', flush=True)
        except Exception as e: print(f'{type(e).__name__}: {e}', flush=True)

MOVES = 'train', 'copy', 'zero', 'clone', 'prune', 'reset', 'deepen'

def sequence(elsewhere, name, opt, seed, moves, seen):
    "One sequence, everything checked; counts what was done"
    net, x = structure(name, seed), data(name, seed); o = OPT[opt](net.parameters())
    train(net, o, x, 1 + seed % 3)
    hooked, kinds, rng = hooks(net), [type(m) for m in net.modules()], torch.Generator().manual_seed(seed)
    def pick(n): return int(torch.randint(n, (), generator=rng))
    for quiet in (True, False): # edits alone, to be undone and repeated; then with training in between
        m, mo = (net, o) if not quiet else again(net, o, name, seed, opt)
        base, records = (copy.deepcopy(m.state_dict()), copy.deepcopy(mo.state_dict())), []
        for move in moves:
            if move == 'train':
                if not quiet: train(m, mo, x)
                continue
            got = one(m, mo, x, move, pick, seed, not quiet)
            seen[move if got else 'refused'] += 1
            records += [got] if got else []
        assert hooks(m) == hooked, 'hooks'
        if quiet:
            if records: assert elsewhere.same(name, seed, opt, base, [r for _, r, _ in records], image(m, mo)) == 'same'
            for before, record, after in reversed(records):
                assert same(image(m, mo), after); replay(m, record.inverse(), mo); assert same(image(m, mo), before)
            assert [type(k) for k in m.modules()] == kinds
        else: round_trip(m, mo, x)
    if seed % 10 == 0:
        dead = [weakref.ref(k) for k in (*m.modules(), *m.parameters())]
        del net, o, m, mo, records; gc.collect()
        assert all(r() is None for r in dead), 'memory'

def again(net, o, name, seed, opt):
    "The same network and optimizer once more"
    m = structure(name, seed); mo = OPT[opt](m.parameters())
    m.load_state_dict(net.state_dict()); mo.load_state_dict(copy.deepcopy(o.state_dict()))
    return m, mo

def round_trip(net, o, x):
    "state_dict of model and optimizer, and training goes on from there in the same way"
    train(net, o, x)
    fresh = copy.deepcopy(net)
    for p in (*fresh.parameters(), *fresh.buffers()): p.data.zero_()
    fresh.load_state_dict(net.state_dict(), strict=True)
    names, own = {id(p): n for n, p in net.named_parameters()}, dict(fresh.named_parameters())
    fo = type(o)([{**g, 'params': [own[names[id(p)]] for p in g['params']]} for g in o.param_groups])
    fo.load_state_dict(copy.deepcopy(o.state_dict()))
    assert len(names) == sum(len(g['params']) for g in o.param_groups), 'a parameter without optimizer'
    for m, mo in ((net, o), (fresh, fo)): train(m, mo, x, 2)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), fresh.parameters(), strict=True)), 'state_dict'
    assert all(torch.isfinite(p).all() for p in net.parameters()), 'nan'

def main(count, seed=0):
    "Sequences without hypothesis"
    torch.set_num_threads(1)
    rng, seen = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder, Elsewhere(Path(folder)) as elsewhere:
        for i in range(count):
            what = rng.choice(list(MODELS)), rng.choice(list(OPT)), rng.randrange(10**6), rng.choices(MOVES, k=rng.randint(1, 8))
            try: sequence(elsewhere, *what, seen)
            except BaseException: print('failed:', i, what, flush=True); raise
    print(f'{count} sequences of seed {seed}: {dict(seen)}')

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
