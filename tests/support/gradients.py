"""Loss and gradients of either backend's model, by its library's own functions."""

import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from mlx.utils import tree_flatten

import mlx_moe.model.moe
import mlx_moe.model.transformer
import torch_ref.moe
import torch_ref.transformer


def mlx_gradients(config, weights, batch):
    model = mlx_moe.model.transformer.Transformer(config)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])

    def loss(tokens):
        logits, routings = model(tokens[:, :-1])
        auxiliary = [
            mlx_moe.model.moe.auxiliary_loss(routing, mlx_moe.model.moe.expert_load(routing), config.moe)
            for routing in routings
        ]
        return mlx.nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean") + sum(auxiliary)

    value, gradients = mlx.nn.value_and_grad(model, loss)(mx.array(batch))
    return value.item(), {name: np.array(array) for name, array in tree_flatten(gradients)}


def torch_gradients(config, weights, batch):
    model = torch_ref.transformer.Transformer(config)
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    tokens = torch.from_numpy(batch).long()
    logits, routings = model(tokens[:, :-1])
    auxiliary = [
        torch_ref.moe.auxiliary_loss(routing, torch_ref.moe.expert_load(routing), config.moe) for routing in routings
    ]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + sum(auxiliary)
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
