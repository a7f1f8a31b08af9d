"""Flower's simulation with its FedAvg: one actor with one core, as polyrank has one worker."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.sides.flower_client import app as client_app
from benchmarks.sides.work import Work, folders, read_work, write_final

ONE_ACTOR = {"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}


def main() -> None:
    folder, out = folders()
    work = read_work(folder)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = PlannedFedAvg(work, folder, out)
        start = ArrayRecord(work.start)
        result = strategy.start(grid, start, num_rounds=len(work.plan.rounds))
        write_final(result.arrays.to_torch_state_dict(), out)

    run_simulation(server_app, client_app, len(work.plan.sizes), backend_config=ONE_ACTOR)


class PlannedFedAvg(FedAvg):  # type: ignore[misc]
    """Flower's FedAvg with the cohorts of the plan; in a simulation any node can stand for any client."""

    def __init__(self, work: Work, folder: Path, out: Path) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.work, self.folder, self.out = work, folder, out

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message to each client of this round's cohort."""
        while len(nodes := sorted(grid.get_node_ids())) < len(self.work.plan.sizes):
            time.sleep(0.05)  # the nodes register while the server starts
        for place, session in enumerate(self.work.plan.rounds[server_round - 1]):
            asked = ConfigRecord(
                {
                    "server-round": server_round,
                    "place": place,
                    "work": str(self.folder),
                    "out": str(self.out),
                }
            )
            content = RecordDict({"arrays": arrays, "config": asked})
            yield Message(content, dst_node_id=nodes[session.client], message_type="train")


if __name__ == "__main__":
    main()
