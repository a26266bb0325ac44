"""Evaluation: how good a model's scores are, and whether a served log can be reproduced.

scoring.py   a run or a bundle behind one method       evaluate.py  log files -> scores -> quality, whole and by slice
quality.py   slices.py   the metrics of one set of rows, and of each value of a column
replay.py    joined.py   a request log scored again, compared, and joined with labels
offpolicy/   what another policy would have earned, from a log with propensities
auction.py   auctionlog.py   ad auctions held again with another model, pricing or reserve
report.py    charts.py   one self-contained HTML page with inline SVG
"""
