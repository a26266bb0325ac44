"""The command `ninerank`: one module a verb, listed in `main.VERBS`; importing any of them loads nothing heavy."""
