"Edge cases and acceptance of snapshots; PLASTICITY_FULL=1 runs the full counts (50 edits, 200 kills, 2,000 damaged stores)"
import errno, hashlib, json, os, random, resource, signal, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from plasticity.data import Data, get_data
from plasticity.deltas import Container, SnapshotError, bits, checksum, container, decode, encode, parse, planes, squeeze, tensor
from plasticity.edits import edit
from plasticity.models import make_model, register_model
from plasticity.snapshots import Ensemble, SnapshotManager, SnapshotStore, StoreLocked, diff, load
from plasticity.store import _line, read_index
from plasticity.structure import as_data, from_data, skeleton, tensors_of
from plasticity.training import Callback, Trainer
from plasticity.units import EditError, units

FULL = bool(os.environ.get('PLASTICITY_FULL'))
HERE = Path(__file__).resolve().parents[1]

def image(model, optimizer=None):
    "Hash of every bit of a model and its optimizer, by other means than the store's"
    h = hashlib.sha256()
    names = {id(p): n for n, p in model.named_parameters()}
    for n, t in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda kv: kv[0]):
        h.update(f'{n} {t.dtype} {tuple(t.shape)}'.encode()); h.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for p, s in sorted(optimizer.state.items(), key=lambda kv: names[id(kv[0])]) if optimizer else ():
        for k, v in sorted(s.items()):
            h.update(f'{names[id(p)]} {k}'.encode())
            h.update(v.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if isinstance(v, torch.Tensor) else str(v).encode())
    return h.hexdigest()

def step(model, optimizer, x, seed=0):
    x = x + .1*torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad(); model(x).logsumexp(1).mean().backward(); optimizer.step()

class Links(nn.Module):
    "A layer of the test's own that stores its links"
    def __init__(self, n, m):
        super().__init__(); self.n, self.m = n, m
        self.values = nn.Parameter(torch.zeros(0)); self.register_buffer('index', torch.zeros(2, 0, dtype=torch.long))
    def forward(self, x): return x.new_zeros(len(x), self.m).index_add(1, self.index[0], x[:, self.index[1]]*self.values)
    def _set(self, index, values, old):
        key = (index[0]*self.n + index[1]).argsort()
        self.index.data, self.values.data = index[:, key], values[key]
        return dict(values=old[key])
    def connect(self, rows, cols, values):
        old = torch.cat([torch.arange(len(self.values)), torch.full((len(rows),), -1)])
        return self._set(torch.cat([self.index, torch.stack([rows, cols])], 1), torch.cat([self.values.data, values.to(self.values)]), old)
    def disconnect(self, rows, cols):
        gone = ((self.index[0][:, None] == rows) & (self.index[1][:, None] == cols)).any(1); keep = (~gone).nonzero()[:, 0]
        return self._set(self.index[:, keep], self.values.data[keep], keep)

def sparse_net():
    try: from plasticity.sparse import random_layer
    except ImportError:
        net = nn.Sequential(Links(64, 40), nn.Tanh(), Links(40, 10))
        for m in (net[0], net[2]):
            key = torch.randperm(m.n*m.m, generator=torch.Generator().manual_seed(0))[:60].sort().values
            m.connect(key // m.n, key % m.n, torch.randn(60, generator=torch.Generator().manual_seed(1)))
        return nn.Sequential(nn.Flatten(), *net)
    return nn.Sequential(nn.Flatten(), random_layer(64, 40, .05, mode='gather'), nn.Tanh(), random_layer(40, 10, .2, mode='gather', seed=1))

KINDS = dict(mlp=lambda: make_model('mlp', (1, 8, 8), 10, hidden_sizes=(24, 16), seed=0),
             cnn=lambda: make_model('cnn', (1, 8, 8), 10, channels=(6, 8), hidden_sizes=(12,), normalization='batch', seed=0),
             vit=lambda: make_model('vit', (1, 8, 8), 10, patch_size=4, embed_dim=16, depth=2, num_heads=2, seed=0), sparse=sparse_net)

def change(rng, e, model, x):
    "One random edit"
    links = [(n, m) for n, m in model.named_modules() if hasattr(m, 'connect')]
    if links:
        n, m = rng.choice(links)
        there = set(m.keys().tolist()) if hasattr(m, 'keys') else set((m.index[0]*m.n + m.index[1]).tolist())
        width, size = (m.in_features, m.in_features*m.out_features) if hasattr(m, 'in_features') else (m.n, m.n*m.m)
        if rng.random() < .6:
            new = rng.sample([k for k in range(size) if k not in there], 5)
            e.connect(n, [k // width for k in new], [k % width for k in new])
        else:
            old = rng.sample(sorted(there), 4)
            e.disconnect(n, [k // width for k in old], [k % width for k in old])
        return
    groups = [g for g in units(model, x) if not g.blocked]
    g, verb = rng.choice(groups), rng.choice(['widen', 'widen', 'prune', 'reset', 'clone', 'deepen'])
    if verb == 'deepen':
        at = rng.choice([n for n, _ in model.named_modules() if n.count('.') == 1 and n.split('.')[0] in ('layers', 'blocks')])
        if len(list(model.named_parameters())) < 70: return e.deepen(at, seed=rng.randrange(99))
    if g.n > 40 or verb == 'prune' and g.n > 4: return e.prune(g, rng.sample(range(g.n), 2))
    if verb == 'reset': return e.reset(g, [rng.randrange(g.n)], seed=rng.randrange(99))
    if verb == 'clone' and g.n < 12: return e.clone(g)
    e.widen(g, rng.randrange(1, 4), start=rng.choice(['copy', 'zero']), seed=rng.randrange(99))

def chain(kind, folder, n, seed=0):
    "n random edits with training steps between; gives the images of all stages"
    rng, model = random.Random(seed), KINDS[kind]()
    opt, x, store, said, k = torch.optim.Adam(model.parameters(), 1e-3), torch.randn(8, 1, 8, 8), SnapshotStore(folder, sync=False), [], 0
    store.save(model, opt, state=dict(k=0)); said.append(image(model, opt))
    while len(said) <= n:
        k += 1
        try:
            with edit(model, opt, x) as e: change(rng, e, model, x)
        except (EditError, ValueError): continue
        for i in range(rng.randrange(3)): step(model, opt, x, seed=100*k + i)
        store.save(model, opt, state=dict(k=len(said), rng=rng.random()), records=e.record)
        said.append(image(model, opt))
    store.close()
    return said

IN_NEW_PROCESS = '''
import json, sys, torch
sys.path[:0] = [{here!r}, {tests!r}]
torch.set_num_threads(1)
from test_snapshots import KINDS, image
from plasticity.snapshots import SnapshotStore
out = {{}}
for kind, folder in json.loads(sys.argv[1]).items():
    model = None if kind != 'sparse' else KINDS['sparse']
    out[kind] = []
    for s in SnapshotStore(folder):
        net, opt = s.load(model, optimizer=torch.optim.Adam)
        assert s.state['k'] == len(out[kind])
        out[kind].append(image(net, opt))
print(json.dumps(out))
'''

def test_every_stage_of_a_chain_is_restored_in_a_new_process(tmp_path):
    said = {k: chain(k, tmp_path/k, 50 if FULL else 10) for k in KINDS}
    code = IN_NEW_PROCESS.format(here=str(HERE), tests=str(HERE/'tests'))
    done = subprocess.run([sys.executable, '-c', code, json.dumps({k: str(tmp_path/k) for k in KINDS})], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout)
    for k in KINDS: assert got[k] == said[k] and len(set(said[k])) > len(said[k])//2
    for k in KINDS: assert set(SnapshotStore(tmp_path/k).verify().column('state')) == {'ok'}
