"""The benchmark's model behind mosec, for `bench/serving.py`, which runs it in an environment that has mosec: ... MODEL --port P.

A request is int64 ids, the user's first and then 256 candidates' row by row; an answer is 256 float32 scores. The model is TorchScript,
frozen, hidden layers in bfloat16, the user's half of the first layer computed once: two workers of one thread each.
"""

import os
import sys
from typing import Any

import numpy as np
import torch
from mosec import Server, Worker

USERS, ITEMS, CANDIDATES = 20, 19, 256


class Ranker(Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.model: Any = torch.jit.load(os.environ["BENCH_MODEL"])  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            for _ in range(20):
                self.model(torch.zeros(USERS, dtype=torch.int64), torch.zeros((CANDIDATES, ITEMS), dtype=torch.int64))

    def deserialize(self, data: bytes) -> "np.ndarray[Any, Any]":
        return np.frombuffer(data, np.int64)

    def forward(self, data: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        ids = torch.from_numpy(data.copy())
        with torch.inference_mode():
            scores: np.ndarray[Any, Any] = self.model(ids[:USERS], ids[USERS:].view(CANDIDATES, ITEMS)).numpy()
        return scores

    def serialize(self, data: "np.ndarray[Any, Any]") -> bytes:
        return data.tobytes()


if __name__ == "__main__":
    os.environ["BENCH_MODEL"] = sys.argv.pop(1)
    server = Server()
    server.append_worker(Ranker, num=2, env=[{"OMP_NUM_THREADS": "1", "BENCH_MODEL": os.environ["BENCH_MODEL"]}] * 2)
    server.run()
