"""One run that changes hands: `python resume_job.py RANK FOLDER PORT...`; FOLDER holds recipe.yaml, one port a stage.

Each stage has its number of processes and its sharding, goes on from the checkpoint of the stage before, in the middle of an epoch, and is
stopped at a step. Processes beyond a stage's number sit it out.
"""

import os
import sys
from pathlib import Path

from ninerank.device import Device
from ninerank.training.interrupt import TrainingInterrupted
from ninerank.training.processes import Processes
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Trainer

# processes, sharding, the step after which it is stopped (None: it ends)
STAGES = ((4, "row_wise", 5), (2, "column_wise", 10), (1, "auto", 13), (2, "table_wise", 19), (1, "auto", None))


def stop_after(trainer: Trainer, step: int) -> None:
    inner = trainer.step

    def wrapped(batch):
        result = inner(batch)
        if trainer.progress.step + 1 == step:
            trainer._interrupts.requested = "SIGTERM"
        return result

    trainer.step = wrapped


def run(recipe: Recipe, out: Path, *, resume: bool, stop: int | None) -> None:
    with Processes.joined(Device.resolve("cpu"), recipe.sharding.timeout_s) as processes:
        trainer = Trainer(recipe, out, resume=resume, processes=processes)
        if stop is None:
            trainer.fit()
            return
        stop_after(trainer, stop)
        try:
            trainer.fit()
        except TrainingInterrupted:
            assert stop <= trainer.progress.step <= stop + 1  # several processes agree on it a step later
        else:
            raise AssertionError(f"the run was not stopped after step {stop}")


def main() -> None:
    rank, folder, ports = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    recipe = Recipe.load(folder / "recipe.yaml")
    for number, (port, (world_size, sharding, stop)) in enumerate(zip(ports, STAGES, strict=True)):
        if rank < world_size:
            place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
            stage = recipe.override([f"sharding.default={sharding}"]) if world_size > 1 else recipe
            run(stage, folder / "parts", resume=number > 0, stop=stop)


if __name__ == "__main__":
    main()
