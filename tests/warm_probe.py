"A probe for tests of what is stored: columns, and a tensor that the next measurement begins with."
import torch

from gradnb import PROBES, Probe


@PROBES.add("warm/μ")
def warm():
    "As a sharpness keeps one, for a hundredth of its time."
    def measure(view):
        last = view.memory.get("last", torch.zeros(()))
        view.memory["last"] = last = torch.cos(last + torch.randn(view.theta.shape, generator=view.stream.generator()) + view.grad)
        return {"value": last[0], "low": last.min(), "high": last.max()}
    return Probe("warm/μ", lambda step: step % 3 == 0, measure)
