"""The lane's modules import torch_npu and each other: lane.py runs them, pytest collects the tests alone."""

from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
