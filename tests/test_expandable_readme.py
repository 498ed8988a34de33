"What an older README of expandable networks promised, word for word: only its module names are ours"
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)

QUICK = '''
import torch
from torch.utils.data import DataLoader, TensorDataset
from den import DynamicExpandableNetwork, DENTrainer, LossBasedGrowth

# Create your data
X_train = torch.randn(1000, 10)
y_train = torch.randn(1000, 1)
train_loader = DataLoader(TensorDataset(X_train, y_train), batch_size=32)

# Create a DEN with initial small architecture
network = DynamicExpandableNetwork(
    input_size=10,
    output_size=1,
    hidden_sizes=[16, 16],  # Start small!
    activation='relu',
    task_type='regression'
)

# Set up growth strategy
growth_strategy = LossBasedGrowth(
    patience=10,      # Wait 10 epochs before growing
    cooldown=5,       # Wait 5 epochs after growth
    min_delta=1e-4    # Minimum improvement threshold
)

# Create trainer
trainer = DENTrainer(
    network=network,
    growth_strategy=growth_strategy,
    optimizer='adam',
    learning_rate=0.001
)

# Train with automatic growth
history = trainer.train(
    train_loader=train_loader,
    epochs=100,
    enable_growth=True
)

print(f"Final architecture: {network.get_layer_sizes()}")
print(f"Total parameters: {network.get_num_parameters()}")
'''

CONTINUAL = '''
# Initial training
trainer.train(train_loader_1, epochs=50)

# Learn from new data (network grows automatically if needed)
trainer.continual_learning(
    new_data=X_new,
    new_targets=y_new,
    epochs=20
)
'''

RESTART = '''
# Save checkpoint
trainer.save_checkpoint('checkpoint.pt')

# Later... restart training
trainer.load_checkpoint('checkpoint.pt')
trainer.train(new_train_loader, epochs=50)
'''

NETWORK = '''
network = DynamicExpandableNetwork(
    input_size=10,           # Number of input features
    output_size=1,           # Number of outputs
    hidden_sizes=[32, 32],   # Initial hidden layer sizes
    activation='relu',       # Activation function
    dropout=0.1,            # Dropout rate (optional)
    task_type='regression'  # 'regression' or 'classification'
)
'''

LOSS = '''
from den import LossBasedGrowth

strategy = LossBasedGrowth(
    patience=15,                    # Epochs to wait for improvement
    cooldown=5,                     # Epochs to wait after growth
    min_delta=1e-4,                # Improvement threshold
    width_growth_ratio=0.5,        # Add 50% more neurons
    max_neurons_per_expansion=32   # Max neurons to add at once
)
'''

GRADIENT = '''
from den import GradientBasedGrowth

strategy = GradientBasedGrowth(
    patience=10,
    gradient_threshold=0.1,  # Threshold for gradient magnitude
    max_neurons_per_expansion=32
)
'''

ADAPTIVE = '''
from den import AdaptiveGrowth

strategy = AdaptiveGrowth(
    patience=15,
    cooldown=10,
    loss_threshold=1e-4,
    gradient_threshold=0.05,
    max_network_size=10000  # Prevent unlimited growth
)
'''

TRAINER = '''
trainer = DENTrainer(
    network=network,
    growth_strategy=strategy,
    optimizer='adam',           # 'adam', 'sgd', or 'rmsprop'
    learning_rate=0.001,
    device='cuda',             # 'cuda' or 'cpu'
    verbose=True
)
'''

PICTURES = '''
from den.utils import (
    plot_training_history,
    print_growth_summary,
    visualize_network_architecture
)

# Plot training progress and growth events
plot_training_history(history, save_path='training.png')

# Print detailed growth summary
print_growth_summary(history)

# Visualize final architecture
visualize_network_architecture(network, save_path='architecture.png')
'''

STREAM = '''
for task_data in data_stream:
    trainer.continual_learning(task_data, epochs=20)
'''

ONLINE = '''
while new_data_available():
    trainer.continual_learning(get_new_batch(), epochs=5)
'''

AUTOML = '''
# Start small, let it grow to the right size
network = DynamicExpandableNetwork(
    input_size=features,
    output_size=targets,
    hidden_sizes=[8, 8]  # Very small initial size
)
'''

CUSTOM = '''
from den.growth_strategy import GrowthStrategy

class MyCustomGrowth(GrowthStrategy):
    def should_grow(self, metrics, network, epoch):
        # Your custom logic
        if metrics['loss'] > threshold:
            return True, "Custom reason"
        return False, None

    def determine_growth_action(self, metrics, network):
        # Decide how to grow
        return {
            'type': 'width',
            'layer_idx': 0,
            'num_neurons': 16
        }
'''

HUBER = '''
import torch.nn as nn

trainer = DENTrainer(
    network=network,
    loss_function=nn.HuberLoss(),  # Custom loss
    ...
)
'''

MONITORING = '''
# During training
print(f"Current architecture: {network.get_layer_sizes()}")
print(f"Total parameters: {network.get_num_parameters()}")
print(f"Growth events: {len(history['growth_events'])}")

# Layer importance analysis
from den.utils import analyze_layer_importance
importance = analyze_layer_importance(network)
'''

def ours(snippet):
    "The snippet with our module's name"
    return re.sub(r'from den(\.utils|\.growth_strategy)? import', 'from plasticity.expandable import', snippet)

def data(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=g)
    return x, torch.sin(3*x[:, :1])

def loader(seed=0): return DataLoader(TensorDataset(*data(seed=seed)), batch_size=32)

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('readme')

@pytest.fixture(scope='module')
def space(place):
    "The names after the first snippet, as a reader has them"
    names = {}
    with pytest.MonkeyPatch.context() as m:
        m.chdir(place)
        exec(ours(QUICK), names)
    return names

def test_quick_start(space):
    assert space['network'].get_num_parameters() == sum(p.numel() for p in space['network'].parameters())
    assert space['network'](torch.zeros(3, 10)).shape == (3, 1)
    assert len(space['history']['train_loss']) == 100 and min(space['network'].get_layer_sizes()) >= 16

def test_continual(space):
    x, y = data(seed=1)
    space |= dict(train_loader_1=loader(), X_new=x, y_new=y)
    exec(ours(CONTINUAL), space)
    assert space['trainer'].trainer.task == 1

def test_restart(space, place, monkeypatch):
    monkeypatch.chdir(place)
    sizes = space['network'].get_layer_sizes()
    space['new_train_loader'] = loader(2)
    exec(ours(RESTART), space)
    assert (place/'checkpoint.pt').exists() and space['network'].get_layer_sizes()[0] >= sizes[0]

def test_components(space):
    names = dict(space)
    exec(ours(NETWORK), names)
    assert any(isinstance(m, nn.Dropout) and m.p == .1 for m in names['network'].modules())
    for snippet in (LOSS, GRADIENT, ADAPTIVE):
        exec(ours(snippet), names)
        if torch.cuda.is_available(): exec(ours(TRAINER), names)
        else:
            with pytest.warns(UserWarning, match='cuda'): exec(ours(TRAINER), names)
        history = names['trainer'].train(loader(), epochs=2)
        assert len(history['train_loss']) == 2
    assert names['strategy'].max_network_size == 10000

def test_pictures(space, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(ours(PICTURES), space)
    for name in ('training.png', 'architecture.png'): assert (place/name).read_bytes()[:4] == b'\x89PNG'
    assert 'growth' in capsys.readouterr().out

def test_streams(space):
    names = dict(space, data_stream=[TensorDataset(*data(seed=s)) for s in range(2)])
    task = names['trainer'].trainer.task
    exec(ours(STREAM), names)
    assert names['trainer'].trainer.task == task + 2
    left = [data(seed=3), data(seed=4)]
    names |= dict(new_data_available=lambda: bool(left), get_new_batch=left.pop)
    exec(ours(ONLINE), names)
    assert not left and names['trainer'].trainer.task == task + 4

def test_automl(space):
    names = dict(space, features=7, targets=3)
    exec(ours(AUTOML), names)
    assert names['network'].get_layer_sizes() == [8, 8] and names['network'](torch.zeros(2, 7)).shape == (2, 3)

def test_custom_strategy(space):
    names = dict(space, threshold=0.)
    exec(ours(CUSTOM), names)
    net = names['DynamicExpandableNetwork'](10, 1, [8, 8], task_type='regression')
    history = names['DENTrainer'](net, names['MyCustomGrowth']()).train(loader(), epochs=12)
    first = history['growth_events'][0]
    assert first['reason'] == 'Custom reason' and first['epoch'] == 1 and net.get_layer_sizes()[0] >= 24

def test_custom_loss(space):
    "The dots stand for the other arguments: with them in the call it is no Python"
    names = dict(space)
    with pytest.raises(SyntaxError): compile(HUBER, 'readme', 'exec')
    exec(ours(HUBER).replace('    ...\n', ''), names)
    assert isinstance(names['trainer'].loss_function, nn.HuberLoss)
    names['trainer'].train(loader(), epochs=1)

def test_monitoring(space, capsys):
    exec(ours(MONITORING), space)
    assert 'Growth events:' in capsys.readouterr().out
    assert len(space['importance']) == len(space['network'].get_layer_sizes())
