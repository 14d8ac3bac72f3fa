"""Predicts the GPU memory of a run: ``plan_memory.py --deepspeed_config C --gpus N [--gpu v100-32gb] [--chart plan.png] [--json]``.

The peak of every phase on each GPU, what it is made of, whether it fits and with what margin, what to change if it does not, and the
largest micro-batch that does. Of several cards (``--gpu t4 rtx3060``, ``--gpu all``) one line each. Predicted, not measured: no GPU and no
weights are needed, and nothing of the size of the model is made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an encoder that is not here is assumed, not asked for

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.experiment import Experiment, load_experiment  # noqa: E402
from rdtf_ds.memory.chart import png  # noqa: E402
from rdtf_ds.memory.gpus import GPU, GPUS, find_gpu  # noqa: E402
from rdtf_ds.memory.planner import plan  # noqa: E402
from rdtf_ds.memory.report import Report, heading, line_of_card, lines_of, provisos, report_of  # noqa: E402
from rdtf_ds.training.memory_plan import plan_experiment  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, help="JSON file of the experiment")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the run (1)")
    parser.add_argument("--gpu", nargs="+", default=["v100-32gb"], help=f"kinds of GPU (v100-32gb), or all: {', '.join(GPUS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a dotted key")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the phases of one kind of GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> int:
    """Exit code 0 when it fits on any of the cards, 1 when on none, 2 with one paragraph on standard error when nothing can be planned."""
    arguments = parse_arguments()
    try:
        cards = list(GPUS.values()) if arguments.gpu == ["all"] else [find_gpu(name) for name in arguments.gpu]
        if arguments.chart is not None and len(cards) > 1:
            raise UserError(f"--chart draws one kind of GPU, not {len(cards)}: name one with --gpu.")
        experiment = load_experiment(arguments.deepspeed_config, arguments.overrides, require_data=False)
        reports = reports_of(experiment, arguments.gpus, cards)
        if arguments.chart is not None:
            write_chart(arguments.chart, reports[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"cards": reports}))
    elif len(reports) == 1:
        print("\n".join(lines_of(reports[0])))
    else:
        print("\n".join((heading(reports[0]), *map(line_of_card, reports), *provisos(reports[0]))))
    return 0 if any(report["fits"] for report in reports) else 1


def reports_of(experiment: Experiment, ranks: int, cards: list[GPU]) -> list[Report]:
    """A report for each card; the network is followed once for all.

    Raises:
        UserError: None of the cards can train this.
    """
    refusals: dict[str, UserError] = {}
    for card in cards:
        try:
            experiment.check_device(True, ranks, card.capability)
        except UserError as error:
            refusals[card.name] = error
    able = [card for card in cards if card.name not in refusals]
    if not able:
        raise refusals[cards[0].name]
    for name, error in refusals.items():
        print(f"{name}: {error}", file=sys.stderr)
    planned = plan_experiment(experiment, ranks, able[0])
    return [report_of(plan(planned.setup, planned.sources, card), planned.sources, planned.encoders.assumed) for card in able]


def write_chart(path: Path, report: Report) -> None:
    """The picture of a report as a PNG file.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.write_bytes(png(report)[0])
    except OSError as error:
        raise UserError(f"--chart {path}: it cannot be written ({error.strerror}).") from error


if __name__ == "__main__":
    sys.exit(main())
