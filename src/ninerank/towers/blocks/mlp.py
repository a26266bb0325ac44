"""Multi-layer perceptron and its activations.

Shape legend: B rows, H width of a layer, ... any leading dims.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ninerank.fusion.kernels.mlp_layer import mlp_layer, pays
from ninerank.fusion.kernels.sigmoid_gate import sigmoid_gate
from ninerank.towers.blocks import fused
from ninerank.towers.config import Activation, MLPConfig

__all__ = ["MLP", "BatchNorm", "Dice", "activation", "linear"]


def linear(num_in: int, num_out: int, *, bias: bool = True) -> nn.Linear:
    """Linear layer from Xavier normal weights and zero bias (Glorot and Bengio, AISTATS 2010)."""
    layer = nn.Linear(num_in, num_out, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation (Ioffe and Szegedy, ICML 2015); a training batch of one row has no variance and takes the running statistics."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        if self.training and input.shape[0] == 1:
            return functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


class Dice(nn.Module):
    """Data-adaptive activation: p x + (1 - p) alpha x with p = sigmoid((x - mean) / sqrt(var + eps)), mean and var of the batch.

    Zhou et al., Deep Interest Network, KDD 2018, equation 9. In evaluation the running mean and variance stand in. With `mask`
    (of x's leading dims) only the kept rows count in the statistics, so that padding has no influence.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, *, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and x.numel() and fused.takes_operator(self, x):
            return self._fused(x)
        mean_H, var_H = self._batch_statistics(x, mask) if self.training else (self.running_mean, self.running_var)
        p = torch.sigmoid((x - mean_H) * torch.rsqrt(var_H + self.eps))
        return x * (p + (1 - p) * self.alpha)

    def _fused(self, x: Tensor) -> Tensor:
        var_H, mean_H = torch.var_mean(x.flatten(0, -2), 0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean_H.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var_H.detach().to(self.running_var.dtype), self.momentum)
        scale_H = torch.rsqrt(var_H + self.eps)
        return sigmoid_gate(x.contiguous(), -mean_H * scale_H, scale_H, self.alpha, 1 - self.alpha)

    def _batch_statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(0, -2).to(self.running_mean.dtype)
        kept = torch.ones_like(flat[:, :1]) if mask is None else mask.reshape(-1, 1).to(flat.dtype)
        count = kept.sum()
        mean_H = (flat * kept).sum(0) / count.clamp(min=1)
        var_H = ((flat - mean_H).square() * kept).sum(0) / count.clamp(min=1)
        with torch.no_grad():
            weight = self.momentum * (count > 0).to(flat.dtype)
            self.running_mean.lerp_(mean_H.detach(), weight)
            self.running_var.lerp_(var_H.detach(), weight)
        return mean_H, var_H


def activation(name: Activation, width: int) -> nn.Module:
    """Activation module of a layer of that width."""
    if name == "dice":
        return Dice(width)
    kinds: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "prelu": nn.PReLU}
    return kinds[name]()


class MLP(nn.Module):
    """Hidden layers a <- dropout(act(bn(W a + b))), then, with `num_out`, a last Linear without activation.

    x (B, num_in) -> (B, width), width = num_out or the last hidden width.
    """

    def __init__(self, num_in: int, config: MLPConfig, num_out: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.width = num_in
        for width in config.hidden:
            layers.append(linear(self.width, width))
            if config.batch_norm:
                layers.append(BatchNorm(width))
            layers.append(activation(config.activation, width))
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
            self.width = width
        if num_out is not None:
            layers.append(linear(self.width, num_out))
            self.width = num_out
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BI: Tensor) -> Tensor:
        if not (fused.takes_operator(self, x_BI) and pays(x_BI)):
            out: Tensor = self.layers(x_BI)
            return out
        layers, before = list(self.layers), None
        for layer, following in zip(layers, [*layers[1:], None], strict=False):  # of no layers none follows
            if isinstance(layer, nn.Linear) and isinstance(following, nn.ReLU):
                x_BI = mlp_layer(x_BI, layer.weight, layer.bias, "relu")
            elif not (isinstance(layer, nn.ReLU) and isinstance(before, nn.Linear)):
                x_BI = layer(x_BI)
            before = layer
        return x_BI
