"""Flower's own FedAvg over one number; prints the seconds of each round."""

from __future__ import annotations

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train and evaluate at two sites in every round."""
    ended = [time.monotonic()]

    def tell(server_round: int, _arrays: ArrayRecord) -> MetricRecord | None:
        ended.append(time.monotonic())
        if server_round:
            print(f"ROUND {server_round} {ended[-1] - ended[-2]:.3f}", flush=True)
        return None

    arrays = ArrayRecord({"number": Array(np.zeros(1, np.float32))})
    rounds = int(str(context.run_config["rounds"]))
    FedAvg(min_available_nodes=2).start(grid, arrays, num_rounds=rounds, evaluate_fn=tell)
