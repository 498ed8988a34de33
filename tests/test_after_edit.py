"Whoever listens hears of every edit that a policy makes, with its record"
import pytest
import torch

from plasticity.data import Data
from plasticity.edits import EditRecord, Widen
from plasticity.expandable import DynamicExpandableNetwork
from plasticity.models import MLP
from plasticity.policies import Growth, LossBasedGrowth
from plasticity.pruning import IterativePruning
from plasticity.schedules import Scheduled
from plasticity.training import Callback, Trainer

class Heard(Callback):
    def __init__(self): self.records, self.sizes = [], []
    def after_edit(self, trainer, record): self.records.append(record); self.sizes.append([p.shape[0] for p in trainer.model.parameters()])

def data(n=64):
    g = torch.Generator().manual_seed(0)
    return Data('blobs', torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g), torch.randn(8, 6, generator=g),
                torch.randint(0, 3, (8,), generator=g))

def den(): return DynamicExpandableNetwork(6, 3, [4, 4], task_type='classification')
def mlp(): return MLP(6, 3, hidden_sizes=(8, 8))

@pytest.mark.parametrize('make, policy', [
    (den, lambda: Growth(LossBasedGrowth(patience=1, cooldown=1, min_delta=9.))),
    (den, lambda: Scheduled(4, lambda t: Widen('body.layers.0.linear', 2, start='zero'))),
    (mlp, lambda: Scheduled(4, lambda t: Widen('layers.0.linear', 2, start='zero'))),
    (mlp, lambda: IterativePruning(.5, 2, 4))])
def test_policies_tell(make, policy):
    heard, policy = Heard(), policy()
    Trainer(make(), data(), batch_size=16, device='cpu', eval_every=0, callbacks=[policy, heard]).fit(4)
    done = [e for e in policy.events if 'refused' not in e]
    assert done and len(heard.records) == len(done) and all(isinstance(r, EditRecord) for r in heard.records)
    assert all(a != b for a, b in zip(heard.sizes, heard.sizes[1:], strict=False)) or len(done) == 1
