"""Two models over one log, compared so that a launch can rest on it.

scoring.py     both models' scores of every labelled candidate, in as many processes as asked
differences.py metrics of both and their paired difference, whole and by slice
sequential.py  intervals and p-values that hold however often one looks, and over many slices
rules.py       what is decided by: primary metric, guardrails (YAML)
verdict.py     all of it together: better, worse or no difference shown, and which guardrails fail
samples.py     requests whose order changed most, with what each feature did to the scores
page.py        one self-contained HTML page
"""
