"""Dead features: inputs and operators that no score depends on.

pattern   an input, or a call, that nobody reads
rewrite   it is gone; the engine does not look up what a graph does not ask for
right     what nobody reads has no influence
pays      always: a sequence that a tower ignores need not be looked up, padded and copied
"""

from ninerank.fusion.editor import Editor

__all__ = ["apply"]


def apply(editor: Editor) -> int:
    before = len(editor.graph.nodes)
    editor.prune()
    for node in editor.graph.find_nodes(op="placeholder"):
        if not node.users:
            editor.graph.erase_node(node)
    return before - len(editor.graph.nodes)
