"""BatchNorm folded into the Linear before it.

pattern   batch_norm(linear(x, W, b), gamma, beta, mean, var)   in evaluation, the linear read by nobody else
rewrite   linear(x, s W, s (b - mean) + beta),   s = gamma / sqrt(var + eps)
right     both are affine; s and the shift are constants of each output column
pays      always: one kernel and one pass over the layer's output less
"""

import torch
from torch import fx

from ninerank.fusion.editor import Editor

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    return sum(_fold(editor, node) for node in editor.calls(aten.batch_norm.default))


def _fold(editor: Editor, node: fx.Node) -> bool:
    if len(node.args) < 8:
        return False
    source, gamma, beta, mean, var, training, _, eps = node.args[:8]
    if training is not False or not isinstance(source, fx.Node) or source.target is not aten.linear.default or len(source.users) > 1:
        return False
    if editor.rank(node) != 2:
        return False  # the channels of more dimensions are not the last
    weight_OI, bias_O = editor.constant(source.args[1]), editor.constant(source.args[2] if len(source.args) > 2 else None)
    mean_O, var_O = editor.constant(mean), editor.constant(var)
    if weight_OI is None or mean_O is None or var_O is None or not isinstance(eps, float):
        return False
    # In double precision: a scale of 1 / sqrt(eps) would carry the rounding of a float32 product far.
    scale_O = torch.rsqrt(var_O.double() + eps)
    gamma_O, beta_O = editor.constant(gamma), editor.constant(beta)
    scale_O = scale_O if gamma_O is None else scale_O * gamma_O.double()
    shift_O = (0.0 if bias_O is None else bias_O.double()) - mean_O.double()
    shift_O = shift_O * scale_O + (0.0 if beta_O is None else beta_O.double())
    with editor.before(node):
        weight = editor.store(f"batch_norm.{node.name}.weight", (weight_OI.double() * scale_O[:, None]).to(weight_OI.dtype))
        bias = editor.store(f"batch_norm.{node.name}.bias", shift_O.to(weight_OI.dtype))
        editor.replace(node, editor.call(aten.linear.default, source.args[0], weight, bias))
    return True
