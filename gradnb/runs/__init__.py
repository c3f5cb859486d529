"Runs: what they depend on, how they are written, and where they are kept."
from gradnb.files import replace_file
from gradnb.roles import ESTIMATORS, KINDS, RULES, kind
from gradnb.rules.fromtorch import optimizer_class
from gradnb.runs.record import Lock, Recorder
from gradnb.runs.run import Run
from gradnb.runs.spec import Imported, Spec, decode, encode
from gradnb.runs.store import Store

__all__ = ["ESTIMATORS", "KINDS", "RULES", "Imported", "Lock", "Recorder", "Run", "Spec", "Store", "decode", "encode", "kind",
           "optimizer_class", "replace_file"]
