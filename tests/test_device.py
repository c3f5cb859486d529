"Everything computes on a device that is not the CPU."
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration


@pytest.mark.skipif(not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch takes no device made in Python")
def test_on_a_device_of_its_own():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("elsewhere.py")], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
