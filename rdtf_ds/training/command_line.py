"""The command line of ``train.py``; its options beat the keys of the experiment's file."""

from __future__ import annotations

import argparse


def parse_arguments(arguments: list[str], about: str | None = None) -> argparse.Namespace:
    """The options of ``arguments``; ``about`` is what --help says first."""
    parser = argparse.ArgumentParser(prog="train.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="one experiment, such as ds_configs/v100.json")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of clips (rdtf.data.data_dir)")
    parser.add_argument("--output_dir", metavar="DIR", help="run folder (rdtf.output_dir)")
    parser.add_argument("--max_steps", type=int, metavar="N", help="attempted steps of the whole run (rdtf.max_steps)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of everything random (rdtf.seed)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, dotted; repeat for more")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved plan of the run and stop")
    parser.add_argument("--reindex", action="store_true", help="resume with the clips as they are now, not as the run began with them")
    parser.add_argument("--ignore_memory_plan", action="store_true", help="start a run that is predicted not to fit into memory")
    parser.add_argument("--traceback", action="store_true", help="show tracebacks of errors")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_args(arguments)
