"A run, what it may rely on, how it is kept, and a thousand of them."
from gradnb.ground.files import replace_file
from gradnb.ground.locks import Lock
from gradnb.ground.roles import ESTIMATORS, KINDS, RULES, kind
from gradnb.move.rules.fromtorch import optimizer_class
from gradnb.runs.record import Recorder
from gradnb.runs.run import Run
from gradnb.runs.spec import Imported, Spec, decode, encode
from gradnb.runs.store import Store

__all__ = ["ESTIMATORS", "KINDS", "RULES", "Imported", "Lock", "Recorder", "Run", "Spec", "Store", "decode", "encode", "kind",
           "optimizer_class", "replace_file"]
