"""Duplicates: the same operator called twice with the same arguments.

pattern   y = f(x), z = f(x)
rewrite   z is y
right     operators of a captured graph are pure; those that draw at random are left alone
pays      always; a mask that two groups of tables use is converted once, and its lengths are summed once
"""

from typing import Any

from torch import fx

from ninerank.fusion.editor import Editor, is_random

__all__ = ["apply"]


def apply(editor: Editor) -> int:
    fired = 0
    seen: dict[Any, fx.Node] = {}
    for node in editor.calls():
        if is_random(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            editor.replace(node, first)
            fired += 1
    return fired


def _key(value: Any) -> Any:
    """Something hashable that tells arguments apart, 1 and 1.0 and True included."""
    if isinstance(value, (list, tuple)):
        return (list, *map(_key, value))
    if isinstance(value, dict):
        return (dict, *((name, _key(item)) for name, item in sorted(value.items())))
    return (type(value), repr(value) if isinstance(value, (float, slice)) else value)
