"""Small models written as people write them, for testing what works on any module.

`ZOO` is a list of `(name, factory, example)`: `factory()` builds the model, `example` is a tensor, a tuple of positional
inputs, a dict of keyword inputs, or a list of such. `build(name, dtype, seed)` gives model and example with nothing left at
zero or one (biases, norms, statistics), so that an oracle sees every position.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

G = torch.Generator().manual_seed(0)
def rand(*shape): return torch.randn(*shape, generator=G)
def ints(high, *shape): return torch.randint(high, shape, generator=G)

ZOO = []
def zoo(name, *example, kwargs=None): # the example's positional inputs, or its keyword inputs
    "Register a factory (a function or a class without arguments) with an example of its input"
    def add(factory):
        ZOO.append((name, factory, kwargs if kwargs else example[0] if len(example) == 1 and not isinstance(example[0],
            dict) else tuple(example)))
        return factory
    return add

def names(): return [n for n, _, _ in ZOO]

def cast(example, dtype):
    "Floating inputs in `dtype`"
    if isinstance(example, torch.Tensor): return example.to(dtype) if example.is_floating_point() else example
    if isinstance(example, dict): return {k: cast(v, dtype) for k, v in example.items()}
    if isinstance(example, (list, tuple)): return type(example)(cast(v, dtype) for v in example)
    return example

def onto(example, device):
    "Inputs on a device"
    if isinstance(example, torch.Tensor): return example.to(device)
    if isinstance(example, dict): return {k: onto(v, device) for k, v in example.items()}
    return type(example)(onto(v, device) for v in example) if isinstance(example, (list, tuple)) else example

@torch.no_grad()
def shake(model, seed=0):
    "Give every parameter and statistic a value of its own"
    g = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.dim() <= 1 or p.numel() == max(p.shape): p.copy_(.5 + noise.abs()*.5 if n.endswith(('weight', 'scale', 'weight_g',
            'original0')) else .2*noise)
        elif float(p.abs().max()) < 1e-3: p.copy_(.02*noise)
    for n, b in model.named_buffers():
        if n.endswith('running_mean'): b.copy_(.2*torch.randn(b.shape, generator=g))
        if n.endswith('running_var'): b.copy_(.5 + torch.rand(b.shape, generator=g))
    return model

def build(name, dtype=torch.float64, seed=0): # (model in evaluation mode, example)
    "A model of the zoo and its example"
    factory, example = next((f, e) for n, f, e in ZOO if n == name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory()
    return shake(model, seed).to(dtype).eval(), cast(example, dtype)

def call(model, example): # the outputs' floating tensors, flat, in one vector
    out = model(**example) if isinstance(example, dict) else model(*example) if isinstance(example, tuple) else model(example)
    leaves, todo = [], [out]
    while todo:
        o = todo.pop(0)
        if isinstance(o, torch.Tensor): leaves.append(o)
        elif isinstance(o, dict): todo = [*o.values(), *todo]
        elif isinstance(o, (list, tuple)): todo = [*o, *todo]
    return torch.cat([t.reshape(-1) for t in leaves if t.is_floating_point()])

# --- perceptrons

@zoo('mlp', rand(6, 7))
def mlp(): return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))

@zoo('one_unit', rand(6, 7))
def one_unit(): return nn.Sequential(nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 2))

@zoo('residual_mlp', rand(6, 7))
class ResidualMLP(nn.Module):
    def __init__(self, d=8, h=10):
        super().__init__()
        self.stem, self.head = nn.Linear(7, d), nn.Linear(d, 3)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(norm=nn.LayerNorm(d), up=nn.Linear(d, h), down=nn.Linear(h, d))) for _ in range(2))
        self.norm = nn.LayerNorm(d)
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = x + b['down'](F.gelu(b['up'](b['norm'](x))))
        return self.head(self.norm(x))

@zoo('tied_autoencoder', rand(6, 7))
class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.bias = nn.Linear(7, 5), nn.Parameter(torch.zeros(7))
    def forward(self, x): return F.linear(torch.sigmoid(self.enc(x)), self.enc.weight.t(), self.bias)

@zoo('glu', rand(4, 5, 8))
class GLU(nn.Module):
    def __init__(self, d=8, h=6):
        super().__init__()
        self.gate, self.up, self.down, self.fused = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d), nn.Linear(d, 2*h)
        self.out = nn.Linear(h, 3)
    def forward(self, x):
        x = self.down(F.silu(self.gate(x))*self.up(x))
        a, b = self.fused(x).chunk(2, -1)
        return self.out(a*torch.sigmoid(b)) + self.out(F.glu(self.fused(x), -1))

@zoo('highway', rand(6, 7))
class Highway(nn.Module):
    def __init__(self, d=9):
        super().__init__()
        self.inp, self.h, self.t, self.out = nn.Linear(7, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 3)
    def forward(self, x):
        x = self.inp(x)
        t = torch.sigmoid(self.t(x))
        return self.out(t*torch.relu(self.h(x)) + (1 - t)*x)

@zoo('batchnorm_mlp', rand(8, 7))
def batchnorm_mlp():
    return nn.Sequential(nn.Linear(7, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(inplace=True), nn.Dropout(.5), nn.Linear(10, 6),
        nn.BatchNorm1d(6, affine=False), nn.ELU(), nn.Linear(6, 4))

@zoo('maxout_prelu', rand(6, 7))
class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.out = nn.Linear(7, 8), nn.Linear(7, 8), nn.PReLU(8), nn.Linear(8, 3)
    def forward(self, x): return self.out(self.act(torch.maximum(self.a(x), self.b(x))))

# --- raw parameters, control flow, odd signatures

@zoo('raw_einsum', rand(4, 5, 6))
class RawEinsum(nn.Module):
    "Multi-head attention from three-dimensional raw parameters"
    def __init__(self, d=6, h=3, k=4):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(h, d, k)*.5) for _ in range(3))
        self.wo, self.temp = nn.Parameter(torch.randn(h, k, d)*.5), nn.Parameter(torch.ones(()))
        self.w1, self.b1, self.w2 = nn.Parameter(torch.randn(d, 10)), nn.Parameter(torch.zeros(10)), nn.Parameter(torch.randn(10, 3))
    def forward(self, x):
        q, k, v = (torch.einsum('btd,hdk->bhtk', x, w) for w in (self.wq, self.wk, self.wv))
        a = torch.einsum('bhtk,bhsk->bhts', q, k).mul(self.temp).softmax(-1)
        x = x + torch.einsum('bhtk,hkd->btd', torch.einsum('bhts,bhsk->bhtk', a, v), self.wo)
        return torch.relu(x @ self.w1 + self.b1) @ self.w2

@zoo('control_flow', rand(5, 6))
class ControlFlow(nn.Module):
    "A loop whose length depends on the data, a branch, and an in-place write"
    def __init__(self, d=7):
        super().__init__()
        self.inp, self.rec, self.out = nn.Linear(6, d), nn.Linear(d, d), nn.Linear(d, 2)
    def forward(self, x):
        h, n = torch.tanh(self.inp(x)), 0
        while n < 2 + int(x.abs().sum() > 0):
            if n % 2: h = h + torch.tanh(self.rec(h))
            else:
                h = h*torch.sigmoid(self.rec(h))
                h += 1.
            n += 1
        return self.out(h)

@zoo('in_place', rand(5, 6))
class InPlace(nn.Module):
    "Writes its hidden layer into a buffer, half by half"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(9, 3)
    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.a.out_features + self.b.out_features)
        h[:, :self.a.out_features] = self.a(x)
        h[:, self.a.out_features:].copy_(self.b(x)).mul_(2.)
        return self.out(h.relu_())

@zoo('two_inputs', rand(5, 6), rand(5, 4))
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.Bilinear(8, 8, 5), nn.Linear(5, 2)
    def forward(self, x, y): return self.out(torch.tanh(self.mix(torch.relu(self.a(x)), torch.relu(self.b(y)))))

@zoo('dict_input', dict(ids=ints(11, 4, 5), dense=rand(4, 3)))
class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.dense, self.out = nn.Embedding(11, 6), nn.Linear(3, 6), nn.Linear(12, 2)
    def forward(self, batch): return self.out(torch.cat([self.emb(batch['ids']).mean(1), torch.relu(self.dense(batch['dense']))], -1))

@zoo('keyword_input', kwargs=dict(x=rand(4, 6), scale=rand(4, 1)))
class KeywordInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 2)
    def forward(self, *, x, scale): return self.out(torch.relu(self.fc(x))*scale)

@zoo('multi_output', rand(5, 6))
class MultiOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
    def forward(self, x):
        h = torch.relu(self.body(x))
        return dict(logits=self.a(h), value=(self.b(h), 3))

@zoo('siamese', rand(5, 6), rand(5, 6))
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.out = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)), nn.Linear(5, 1)
    def forward(self, x, y): return self.out((self.enc(x) - self.enc(y)).abs())

@zoo('moe', rand(9, 6))
class MoE(nn.Module):
    "Top-1 routing to experts of different widths"
    def __init__(self, d=8):
        super().__init__()
        self.inp, self.router, self.out = nn.Linear(6, d), nn.Linear(d, 3), nn.Linear(d, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d)) for h in (5, 6, 7))
        with torch.no_grad(): self.router.weight.mul_(5)
    def forward(self, x):
        x = self.inp(x)
        p, i = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            at = (i == e).nonzero().squeeze(-1)
            y.index_add_(0, at, (f(x[at])*p[at, None]).to(y.dtype)) # under CUDA's autocast a softmax is float32
        return self.out(x + y)

@zoo('user_parametrize', rand(5, 6))
def user_parametrize():
    class Masked(nn.Module):
        def __init__(self, mask): super().__init__(); self.register_buffer('mask', mask)
        def forward(self, w): return w*self.mask
    class LowRank(nn.Module):
        def __init__(self, a, b, r=3):
            super().__init__()
            self.down, self.up = nn.Parameter(torch.randn(r, b)*.3), nn.Parameter(torch.randn(a, r)*.3)
        def forward(self, w): return w + self.up @ self.down
    m = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    parametrize.register_parametrization(m[0], 'weight', Masked((torch.rand(8, 6) > .3).float()))
    parametrize.register_parametrization(m[2], 'weight', LowRank(7, 8))
    return m

@zoo('weight_norm', rand(5, 6))
def weight_norm():
    wn = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wn(nn.Linear(6, 8)), nn.ReLU(), wn(nn.Linear(8, 7)), nn.ReLU(), nn.Linear(7, 3))

@zoo('spectral_norm', rand(5, 6))
def spectral_norm():
    sn = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(sn(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))

@zoo('vae', rand(5, 6))
class VAE(nn.Module):
    def __init__(self, z=4):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2*z))
        self.dec = nn.Sequential(nn.Linear(z, 8), nn.ReLU(), nn.Linear(8, 6))
    def forward(self, x):
        mu, logvar = self.enc(x).chunk(2, -1)
        z = mu + torch.randn_like(mu)*(logvar/2).exp() if self.training else mu + .1*(logvar/2).exp()
        return self.dec(z)

# --- recurrent

@zoo('rnn', rand(3, 5, 4))
class RNN(nn.Module):
    def __init__(self, cell=nn.RNN, h=6, **kw):
        super().__init__()
        self.rnn = cell(4, h, num_layers=2, batch_first=True, **kw)
        self.out = nn.Linear(h*(1 + kw.get('bidirectional', False)), 3)
    def forward(self, x): return self.out(self.rnn(x)[0][:, -1])

@zoo('lstm', rand(3, 5, 4))
def lstm(): return RNN(nn.LSTM, 5)

@zoo('lstm_bidirectional', rand(3, 5, 4))
def lstm_bidirectional(): return RNN(nn.LSTM, 5, bidirectional=True)

@zoo('gru', rand(3, 5, 4))
def gru(): return RNN(nn.GRU, 5)

@zoo('cells', rand(3, 5, 4))
class Cells(nn.Module):
    "LSTMCell and GRUCell in a Python loop, the state from zeros"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.Linear(5, 2)
    def forward(self, x):
        h, c = x.new_zeros(x.shape[0], self.a.hidden_size), x.new_zeros(x.shape[0], self.a.hidden_size)
        g = x.new_zeros(x.shape[0], self.b.hidden_size)
        for t in range(x.shape[1]):
            h, c = self.a(x[:, t], (h, c))
            g = self.b(h, g)
        return self.out(g)

@zoo('hand_lstm', rand(3, 5, 4))
class HandLSTM(nn.Module):
    "Gates cut by hand out of one fused product"
    def __init__(self, h=5):
        super().__init__()
        self.h, self.x2g, self.h2g, self.out = h, nn.Linear(4, 4*h), nn.Linear(h, 4*h, bias=False), nn.Linear(h, 2)
    def forward(self, x):
        n = self.h2g.in_features
        h = c = x.new_zeros(x.shape[0], n)
        for t in range(x.shape[1]):
            z = self.x2g(x[:, t]) + self.h2g(h)
            i, f, g, o = z[:, :n], z[:, n:2*n], z[:, 2*n:3*n], z[:, 3*n:]
            c = torch.sigmoid(f)*c + torch.sigmoid(i)*torch.tanh(g)
            h = torch.sigmoid(o)*torch.tanh(c)
        return self.out(h)

# --- convolutional

@zoo('flatten_cnn', rand(3, 2, 8, 8))
def flatten_cnn():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))

@zoo('batchnorm_resnet', rand(3, 2, 8, 8))
class ResNetLike(nn.Module):
    def __init__(self, c=6):
        super().__init__()
        def conv(i, o, s=1): return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o))
        self.stem, self.a, self.b, self.c, self.d = conv(2, c), conv(c, c), conv(c, c), conv(c, 2*c, 2), conv(2*c, 2*c)
        self.short = conv(c, 2*c, 2)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(2*c, 3)
    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(x + self.b(self.relu(self.a(x))))
        y = self.d(self.relu(self.c(x)))
        y += self.short(x)
        return self.head(self.relu(y).mean((2, 3)))

@zoo('unet', rand(2, 2, 8, 8))
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.mid = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.up2, self.u2, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 5, 3, padding=1), nn.Upsample(scale_factor=2)
        self.u1, self.out = nn.Conv2d(9, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
    def forward(self, x):
        a = F.relu(self.d1(x)); b = F.relu(self.d2(F.max_pool2d(a, 2))); m = F.relu(self.mid(F.max_pool2d(b, 2)))
        y = F.relu(self.u2(torch.cat([self.up2(m), b], 1)))
        return self.out(F.relu(self.u1(torch.cat([a, self.up1(y)], 1))))

@zoo('densenet', rand(2, 2, 6, 6))
class DenseNetLike(nn.Module):
    def __init__(self, g=3):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(4 + i*g), nn.ReLU(),
            nn.Conv2d(4 + i*g, g, 3, padding=1)) for i in range(3))
        self.head = nn.Linear(4 + 3*g, 3)
    def forward(self, x):
        xs = [self.stem(x)]
        for l in self.layers: xs.append(l(torch.cat(xs, 1)))
        return self.head(torch.cat(xs, 1).mean((-1, -2)))

@zoo('depthwise', rand(2, 2, 8, 8))
def depthwise():
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 12, 3, groups=6), nn.Hardswish(), nn.Conv2d(12, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

@zoo('grouped', rand(2, 2, 6, 6))
def grouped():
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4, padding=1), nn.ReLU(), nn.Conv2d(12, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

@zoo('squeeze_excite', rand(2, 2, 6, 6))
class SqueezeExcite(nn.Module):
    def __init__(self, c=6):
        super().__init__()
        self.conv, self.fc1, self.fc2, self.out = nn.Conv2d(2, c, 3), nn.Conv2d(c, 3, 1), nn.Conv2d(3, c, 1), nn.Linear(c, 2)
    def forward(self, x):
        x = self.conv(x).relu_()
        return self.out((x*torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))).mean((2, 3)))

@zoo('pixel_shuffle', rand(2, 2, 5, 5))
def pixel_shuffle():
    return nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(),
        nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1))

@zoo('channel_shuffle', rand(2, 2, 5, 5))
class ChannelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        b, c, h, w = x.shape
        x = x.view(b, 2, c//2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.out(F.relu(self.c(x)).mean((2, 3)))

@zoo('transposed', rand(3, 6))
class Transposed(nn.Module):
    "A linear layer, unflattened into an image, and transposed convolutions"
    def __init__(self, c=5):
        super().__init__()
        self.fc, self.up1, self.norm = nn.Linear(6, c*3*3), nn.ConvTranspose2d(c, 4, 2, 2), nn.BatchNorm2d(4)
        self.up2 = nn.ConvTranspose2d(4, 1, 3)
    def forward(self, z): return self.up2(F.relu(self.norm(self.up1(F.relu(self.fc(z)).view(len(z), -1, 3, 3)))))

@zoo('transposed_depthwise', rand(2, 2, 5, 5))
def transposed_depthwise():
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 6, 2, 2, groups=6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))

@zoo('convnext_block', rand(2, 3, 8, 8))
class ConvNeXt(nn.Module):
    def __init__(self, d=6):
        super().__init__()
        self.stem, self.dw, self.norm = nn.Conv2d(3, d, 2, 2), nn.Conv2d(d, d, 3, padding=1, groups=d), nn.LayerNorm(d)
        self.up, self.down, self.scale, self.head = nn.Linear(d, 10), nn.Linear(10, d), nn.Parameter(torch.ones(d, 1, 1)), nn.Linear(d, 2)
    def forward(self, x):
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head((x + self.scale*y).mean((-2, -1)))

@zoo('inception', rand(2, 2, 6, 6))
class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b1, self.b2 = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.p, self.out = nn.Conv2d(2, 2, 1), nn.Conv2d(10, 3, 1)
    def forward(self, x):
        return self.out(F.relu(torch.cat([self.a(x), self.b2(F.relu(self.b1(x))), self.p(F.avg_pool2d(x, 3, 1, 1))],
            1))).flatten(2).mean(-1)

@zoo('padded_channels', rand(2, 2, 6, 6))
class PaddedChannels(nn.Module):
    "The parameter-free shortcut of the first residual networks: more channels by padding"
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(8, 3)
    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.out(F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))

@zoo('group_norm', rand(2, 2, 6, 6))
def group_norm():
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.InstanceNorm2d(6, affine=True),
        nn.ReLU(), nn.Conv2d(6, 4, 1), nn.GroupNorm(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

@zoo('conv1d_text', ints(13, 3, 9))
class ConvText(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.convs, self.out = nn.Embedding(13, 6), nn.ModuleList(nn.Conv1d(6, 4, k) for k in (2, 3)), nn.Linear(8, 2)
    def forward(self, ids):
        x = self.emb(ids).transpose(1, 2)
        return self.out(torch.cat([F.relu(c(x)).amax(-1) for c in self.convs], 1))

@zoo('embedding_bag', ints(13, 12), torch.tensor([0, 4, 7]))
class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.fc, self.out = nn.EmbeddingBag(13, 6), nn.Linear(6, 5), nn.Linear(5, 2)
    def forward(self, ids, offsets): return self.out(torch.relu(self.fc(self.bag(ids, offsets))))

# --- attention

class Attention(nn.Module):
    "Separate q, k, v; the width of a head is stored, the number of heads follows from the weights"
    def __init__(self, d, h, k=None):
        super().__init__()
        self.k = k or d//h
        self.q, self.kk, self.v, self.o = nn.Linear(d, h*self.k), nn.Linear(d, h*self.k), nn.Linear(d, h*self.k), nn.Linear(h*self.k, d)
    def forward(self, x, bias=None):
        q, k, v = (f(x).unflatten(-1, (-1, self.k)).transpose(1, 2) for f in (self.q, self.kk, self.v))
        a = q @ k.transpose(-1, -2)/math.sqrt(self.k)
        a = (a if bias is None else a + bias).softmax(-1)
        return self.o((a @ v).transpose(1, 2).flatten(2))

@zoo('attention', rand(3, 5, 8))
class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.attn, self.out = nn.Linear(8, 12), Attention(12, 3), nn.Linear(12, 2)
    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.attn(x))

@zoo('t5_bias', rand(3, 5, 8))
class T5Like(nn.Module):
    "Relative position bias from an embedding of distances, RMS norm, no biases"
    def __init__(self, d=8, h=2):
        super().__init__()
        self.attn, self.bias, self.scale = Attention(d, h, 3), nn.Embedding(9, h), nn.Parameter(torch.ones(d))
        self.ff1, self.ff2 = nn.Linear(d, 10, bias=False), nn.Linear(10, d, bias=False)
        self.inp, self.out = nn.Linear(8, d), nn.Linear(d, 2)
    def norm(self, x): return x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)*self.scale
    def forward(self, x):
        x, n = self.inp(x), x.shape[1]
        t = torch.arange(n, device=x.device)
        d = t[:, None] - t[None] + 4
        x = x + self.attn(self.norm(x), self.bias(d.clamp(0, 8)).permute(2, 0, 1)[None])
        return self.out(x + self.ff2(F.relu(self.ff1(self.norm(x)))))

@zoo('nanogpt', ints(11, 2, 6))
class NanoGPT(nn.Module):
    "Fused qkv, causal mask in a buffer, tied embedding"
    def __init__(self, d=8, hd=4):
        super().__init__()
        self.hd, self.wte, self.wpe, self.ln1 = hd, nn.Embedding(11, d), nn.Embedding(10, d), nn.LayerNorm(d)
        self.ln2, self.lnf = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj, self.fc, self.fc2 = nn.Linear(d, 3*d), nn.Linear(d, d), nn.Linear(d, 12), nn.Linear(12, d)
        self.head = nn.Linear(d, 11, bias=False)
        self.register_buffer('mask', torch.tril(torch.ones(10, 10)).view(1, 1, 10, 10))
        self.head.weight = self.wte.weight
    def forward(self, ids):
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t, device=ids.device))
        qkv = self.qkv(self.ln1(x))
        q, k, v = (y.view(b, t, -1, self.hd).transpose(1, 2) for y in qkv.split(qkv.shape[-1]//3, dim=2))
        a = (q @ k.transpose(-2, -1)/math.sqrt(self.hd)).masked_fill(self.mask[:, :, :t, :t] == 0, float('-inf')).softmax(-1)
        x = x + self.proj((a @ v).transpose(1, 2).contiguous().view(b, t, -1))
        x = x + self.fc2(F.gelu(self.fc(self.ln2(x))))
        return self.head(self.lnf(x))

@zoo('gqa_rope', rand(2, 5, 8))
class GQA(nn.Module):
    "Four query heads on two key heads, rotary positions, scaled_dot_product_attention, SwiGLU"
    def __init__(self, d=8, hq=4, hk=2, k=4):
        super().__init__()
        self.k, self.rep = k, hq//hk
        self.q, self.kv = nn.Linear(d, hq*k, bias=False), nn.ModuleList(nn.Linear(d, hk*k, bias=False) for _ in range(2))
        self.o = nn.Linear(hq*k, d, bias=False)
        self.w1, self.w3, self.w2 = nn.Linear(d, 10, bias=False), nn.Linear(d, 10, bias=False), nn.Linear(10, d, bias=False)
        self.out = nn.Linear(d, 3)
        self.inp, self.n1, self.n2 = nn.Linear(8, d), nn.RMSNorm(d), nn.RMSNorm(d)
    def rope(self, x):
        t, k = x.shape[-2:]
        t, r = torch.arange(t, device=x.device), torch.arange(k//2, device=x.device)
        f = t[:, None]*(10. ** -(r/k))
        cos, sin = (torch.cat([y, y], -1).to(x.dtype) for y in (f.cos(), f.sin()))
        a, b = x[..., :k//2], x[..., k//2:]
        return x*cos + torch.cat([-b, a], -1)*sin
    def forward(self, x):
        x = self.inp(x)
        y = self.n1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.k)).transpose(1, 2) for f in (self.q, *self.kv))
        k, v = (t.repeat_interleave(self.rep, 1) for t in (self.rope(k), v))
        x = x + self.o(F.scaled_dot_product_attention(self.rope(q), k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.n2(x)
        return self.out(x + self.w2(F.silu(self.w1(y))*self.w3(y)))

@zoo('timm_vit', rand(2, 3, 8, 8))
class TimmViT(nn.Module):
    "Patches, class token, fused qkv by reshape and unbind, layer scale"
    def __init__(self, d=8, h=2):
        super().__init__()
        self.h, self.patch, self.cls = h, nn.Conv2d(3, d, 4, 4), nn.Parameter(torch.zeros(1, 1, d))
        self.pos = nn.Parameter(torch.zeros(1, 5, d))
        self.n1, self.n2, self.qkv, self.proj = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 3*d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 10), nn.Linear(10, d)
        self.g1, self.g2, self.head = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d)), nn.Linear(d, 3)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(b, t, 3, self.h, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.g1*self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        x = x + self.g2*self.fc2(F.gelu(self.fc1(self.n2(x))))
        return self.head(x[:, 0])

@zoo('multihead_attention', rand(2, 5, 8))
class MHA(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.mha, self.out = nn.Linear(8, 12), nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 2)
    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.mha(x, x, x)[0])

@zoo('transformer_encoder', rand(2, 5, 8))
def transformer_encoder():
    return nn.Sequential(nn.Linear(8, 12), nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 10, batch_first=True), 2,
        enable_nested_tensor=False), nn.Linear(12, 2))

@zoo('mixer', rand(2, 3, 8, 8))
class Mixer(nn.Module):
    def __init__(self, d=6, t=4):
        super().__init__()
        self.patch, self.n1, self.n2 = nn.Conv2d(3, d, 4, 4), nn.LayerNorm(d), nn.LayerNorm(d)
        self.tok = nn.Sequential(nn.Linear(t, 7), nn.GELU(), nn.Linear(7, t))
        self.chan, self.head = nn.Sequential(nn.Linear(d, 9), nn.GELU(), nn.Linear(9, d)), nn.Linear(d, 2)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tok(self.n1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.chan(self.n2(x))
        return self.head(x.mean(1))

@zoo('perceiver', rand(2, 7, 5))
class Perceiver(nn.Module):
    "Learned queries and a learned memory of keys and values"
    def __init__(self, d=6, n=4, m=5):
        super().__init__()
        self.lat, self.mk, self.mv = nn.Parameter(torch.randn(n, d)), nn.Parameter(torch.randn(m, d)), nn.Parameter(torch.randn(m, d))
        self.k, self.v, self.out = nn.Linear(5, d), nn.Linear(5, d), nn.Linear(d, 3)
    def forward(self, x):
        y = (self.lat @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        return self.out(y + (y @ self.mk.t()).softmax(-1) @ self.mv)
