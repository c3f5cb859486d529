"What is measured, without disturbing: noise, curvature, tails, thresholds, flatness, and probes of them."
