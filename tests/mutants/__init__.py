"""Small named wrongs, one of which at a time must make the suite fail: what ``make mutants`` puts into a copy of the code.

A test that passes with the wrong in place would not have noticed it in a change either. ``tests`` are the files that speak of what
is broken, so that a wrong costs seconds and not a run of the whole suite. A file here tells of the package of ``rdtf_ds`` that has its
name, ``modules.py`` of the modules beside the packages.
"""

from __future__ import annotations

from tests.mutants.benchmarks import BENCHMARKS
from tests.mutants.checkpoints import CHECKPOINTS
from tests.mutants.curriculum import CURRICULUM
from tests.mutants.data import DATA
from tests.mutants.diffusion import DIFFUSION
from tests.mutants.evaluation import EVALUATION
from tests.mutants.export import EXPORT
from tests.mutants.generation import GENERATION
from tests.mutants.inspection import INSPECTION
from tests.mutants.machine import MACHINE
from tests.mutants.memory import MEMORY
from tests.mutants.models import MODELS
from tests.mutants.modules import MODULES
from tests.mutants.mutant import Mutant
from tests.mutants.training import TRAINING
from tests.mutants.web import WEB

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (
    *BENCHMARKS,
    *CHECKPOINTS,
    *CURRICULUM,
    *DATA,
    *DIFFUSION,
    *EVALUATION,
    *EXPORT,
    *GENERATION,
    *INSPECTION,
    *MACHINE,
    *MEMORY,
    *MODELS,
    *MODULES,
    *TRAINING,
    *WEB,
)
