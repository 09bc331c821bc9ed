"""A candidate of an op: loaded from source, held against the reference on hard cases, timed beside ours and torch's."""

from mistral_nb_kernels.bench.candidate.check import check
from mistral_nb_kernels.bench.candidate.failure import Failure
from mistral_nb_kernels.bench.candidate.hard import Hard, hard_cases
from mistral_nb_kernels.bench.candidate.judge import Note, judge
from mistral_nb_kernels.bench.candidate.source import ALIASES, OPS, Candidate, CandidateError, load, named

__all__ = [
    "ALIASES",
    "OPS",
    "Candidate",
    "CandidateError",
    "Failure",
    "Hard",
    "Note",
    "check",
    "hard_cases",
    "judge",
    "load",
    "named",
]
