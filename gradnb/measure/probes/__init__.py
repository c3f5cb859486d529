"What is measured while a run goes on, and when."
from gradnb.measure.probes.view import PROBES, Probe, View, at, every, log_spaced, probe

__all__ = ["PROBES", "Probe", "View", "at", "every", "log_spaced", "probe"]
