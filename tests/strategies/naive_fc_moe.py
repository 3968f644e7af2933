"""FC-MoE's server half once more, as literally as it can be written: the oracle of the fast one.

Loops over layers, experts and groups, values gathered one by one, projected copies of every update.
"""

import numpy as np

from strategies import experts
from strategies.base import ClientUpdate
from strategies.conflicts import Against, Granularity
from strategies.fc_moe import Importance
from strategies.fedavg import FedAvg

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
NUM_EXPERTS = 4
DENSE = {"model.layers.0.self_attn.q_proj.lora_A": (2, 3), "model.layers.0.mlp.gate.weight": (NUM_EXPERTS, 3)}
LORA = {
    "gate_up_proj.lora_A": (2, 3),
    "gate_up_proj.lora_B": (5, 2),
    "down_proj.lora_A": (2, 4),
    "down_proj.lora_B": (3, 2),
}
FULL = {"gate_up_proj": (5, 3), "down_proj": (3, 4), "down_proj_bias": (3,)}


def random_round(seed, expert_shapes, num_sites=4):
    """An adapter and updates with an expert nobody used, one that one site used, and a pair of opposite updates."""
    rng = np.random.default_rng(seed)
    shapes = dict(DENSE)
    for layer in LAYERS:
        shapes |= {f"{layer}.experts.{name}": (NUM_EXPERTS, *shape) for name, shape in expert_shapes.items()}
    adapter = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    updates = []
    for i in range(num_sites):
        trained = {name: array + rng.normal(size=array.shape).astype(np.float32) for name, array in adapter.items()}
        tokens = {layer: rng.integers(0, 4, NUM_EXPERTS).astype(np.float64) for layer in LAYERS}
        for tokens_E in tokens.values():
            tokens_E[0] = 0
            tokens_E[1] = 5.0 * (i == 1)
        examples = int(rng.integers(1, 20))
        updates.append(ClientUpdate(site=f"site-{i}", adapter=trained, num_examples=examples, expert_tokens=tokens))
    for name, array in adapter.items():
        if experts.is_expert_array(name):
            updates[0].adapter[name][2] = array[2] - 0.5 * (updates[1].adapter[name][2] - array[2])
    return adapter, updates


def naive_groups(names, adapter, granularity):
    """Lists of (name, flat index within the expert), one list a group, spelled out value by value."""
    groups = {}
    for name in names:
        shape = adapter[name].shape[1:]
        projection = name.replace(".lora_A", "").replace(".lora_B", "")
        for flat, index in enumerate(np.ndindex(shape)):
            component = index[1] if name.endswith("lora_B") else index[0]
            key = {
                Granularity.expert: "all",
                Granularity.matrix: projection,
                Granularity.component: (projection, component),
                Granularity.row: (name, index[0] if len(shape) > 1 else 0),
            }[granularity]
            groups.setdefault(key, []).append((name, flat))
    return list(groups.values())


def naive_weights(strategy, updates, layer, expert, names, adapter):
    """Steps 5 and 7: c_i = f_i ||d_i|| over its sum, or one of the ablations."""
    importance = []
    for update in updates:
        changes = [(update.adapter[n][expert].astype(float) - adapter[n][expert]).ravel() for n in names]
        importance.append(naive_importance(strategy, update, layer, expert, np.concatenate(changes)))
    total = sum(importance)
    return [value / total for value in importance] if total > 0 else None


def naive_importance(strategy, update, layer, expert, vector):
    """Step 5 for one site, before it is divided by the sum."""
    tokens = update.expert_tokens[layer][expert]
    return {
        Importance.paper: tokens * np.linalg.norm(vector),
        Importance.tokens: tokens,
        Importance.examples: update.num_examples * (tokens > 0),
        Importance.uniform: 1.0 * (tokens > 0),
    }[strategy.importance]


def naive_projection(i, vectors, weights, against):
    """Steps 8 and 9 for site i, or a variant of them."""
    users = [j for j, weight in enumerate(weights) if weight > 0]
    consensus = sum(weights[j] * vectors[j] for j in users)
    others = [j for j in users if j != i]
    references = {
        Against.consensus: [consensus],
        Against.others: [sum((weights[j] * vectors[j] for j in others), 0 * consensus)],
        Against.pairwise: [vectors[j] for j in others],
        Against.off: [],
    }[against]
    vector = vectors[i]
    for reference in references:
        length = np.linalg.norm(vector) * np.linalg.norm(reference)
        if length > 0 and vector @ reference / length < 0:
            vector = vector - vector @ reference / np.linalg.norm(reference) ** 2 * reference
    return vector


def naive_fc_moe(strategy, adapter, updates):
    """The experts of the paper's steps 7 to 10, one (layer, expert, group) at a time."""
    result = {name: array.astype(float) for name, array in adapter.items()}
    for layer in LAYERS:
        names = [name for name in adapter if name.startswith(f"{layer}.experts.")]
        for expert in range(NUM_EXPERTS):
            weights = naive_weights(strategy, updates, layer, expert, names, adapter)
            if weights is None:
                continue
            for group in naive_groups(names, adapter, strategy.conflict.granularity):
                vectors = [
                    np.array(
                        [float(u.adapter[n][expert].flat[k]) - float(adapter[n][expert].flat[k]) for n, k in group]
                    )
                    for u in updates
                ]
                step = sum(
                    weights[i] * naive_projection(i, vectors, weights, strategy.conflict.against)
                    for i in range(len(updates))
                    if weights[i] > 0
                )
                for (name, k), value in zip(group, step, strict=True):
                    result[name][expert].flat[k] += value
    dense = FedAvg().aggregate(adapter, {}, updates).adapter
    return result | {name: dense[name] for name in adapter if not experts.is_expert_array(name)}


def assert_same(left, right, atol=2e-5):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], atol=atol, rtol=1e-5, err_msg=name)
