"""Predicts the GPU memory of a run: ``python tools/plan_memory.py --deepspeed_config C --gpus N [--gpu v100-32gb] [--json]``.

The peak of every phase on each GPU, what it is made of, whether it fits and with what margin, what to change if it does not, and the
largest micro-batch that does. Predicted, not measured: no GPU and no weights are needed, and nothing of the size of the model is made.
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
from rdtf_ds.experiment import load_experiment  # noqa: E402
from rdtf_ds.memory.gpus import GPUS, find_gpu  # noqa: E402
from rdtf_ds.memory.report import lines_of, report_of  # noqa: E402
from rdtf_ds.training.memory_plan import plan_experiment  # noqa: E402


def main() -> int:
    """Exit code 0 when it fits, 1 when it does not, 2 with one paragraph on standard error when nothing can be planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, help="JSON file of the experiment")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the run (1)")
    parser.add_argument("--gpu", default="v100-32gb", help=f"kind of GPU (v100-32gb): {', '.join(GPUS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a dotted key")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        gpu = find_gpu(arguments.gpu)
        experiment = load_experiment(arguments.deepspeed_config, arguments.overrides, require_data=False)
        experiment.check_device(True, arguments.gpus, gpu.capability)
        planned = plan_experiment(experiment, arguments.gpus, gpu)
        report = report_of(planned.plan, planned.sources, planned.encoders.assumed)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if arguments.json else "\n".join(lines_of(planned.plan, report)))
    return 0 if planned.plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
