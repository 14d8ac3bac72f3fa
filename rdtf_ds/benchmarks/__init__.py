"""Measurements beside what a user would pick instead: ``python tools/benchmark.py forward|train_step|attention|trim|memory|index|loader``.

Every benchmark is one module of this package, and every module offers the same two functions; ``tools/benchmark.py`` calls them and
prints what comes back::

    def add_arguments(parser: argparse.ArgumentParser) -> None    # its own options; --json is the tool's
    def run(arguments: argparse.Namespace) -> dict[str, Any]      # a report, made with report.make_report(name, rows, ...)

The first line of the module's docstring is the help of its sub-command. A report is JSON-able and has the keys

``benchmark``   the name of the sub-command
``machine``     where it was measured: `report.machine`
``rows``        a list of `report.Row` as dicts: ``name, value, unit, compared_with, ratio, bar, holds`` (+ ``spread``, ``predicted``)
``notes``       lines of text for the reader: what was left out and why

and whatever else a benchmark wants to say. ``holds`` is null where a row has no bar; a tool's exit code is 1 when a row does not hold.
Peers are called in the same process on the same input, in turns with ours (`timing.take_turns`).
"""
