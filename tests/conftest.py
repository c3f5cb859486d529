"One thread for each process of the tests: their networks are small, and threads that wait for each other cost more than they give."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
