"""From a loss function to a verdict: evidence, rules, findings, words."""

from gradjax.core.names import suggest_names
from gradjax.diagnosis.rules import Finding as Finding
from gradjax.diagnosis.verdict import Diagnosis as Diagnosis
from gradjax.diagnosis.verdict import diagnose as diagnose

__getattr__ = suggest_names(__name__)
