"""Wire formats: `ninerank/v1/*.proto`, and in `v1` the Python code generated from them by `scripts/generate_proto.py`."""
