"""FC-MoE without each of its parts in the layout of the paper's Table II, its printed numbers beside ours.

python -m benchmarks.fc_moe_ablation        # from the stored cells of benchmarks.fc_moe, in seconds
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.fc_moe import stored_tests
from benchmarks.fc_moe_printed import ABLATION
from benchmarks.fc_moe_tables import ablated, both_told, variant
from benchmarks.render import HERE, write_results

MEASURED_ON = {
    "AG News, LoRA": ("ag_news", "lora"),
    "AG News, whole experts": ("ag_news", "full"),
    "MMLU, LoRA": ("mcq", "lora"),
}
"""Column -> workload at alpha 0.1 and how its experts are trained."""


def table() -> dict[str, Any]:
    """A line for each variant, test / local: what we found on the paper's data, and what it prints."""
    columns, cells = ["variant"], {name: [variant(name)] for name in ABLATION}
    for title, of in MEASURED_ON.items():
        measured, num_seeds = ablated(stored_tests(*of))
        columns.append(f"{title}, {num_seeds} seeds" if num_seeds else title)
        for name, line in cells.items():
            line.append(both_told(measured.get(name, ({}, {}))))
    for i, data in enumerate(("AG News", "MMLU")):
        columns.append(f"{data}, printed")
        for name, line in cells.items():
            line.append(ABLATION[name][i])
    return {"columns": columns, "rows": list(cells.values())}


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description="FC-MoE's ablation beside the paper's").parse_args()
    write_results(HERE / "results" / "ablation_fc_moe.json", {"table": table()})


if __name__ == "__main__":
    main()
