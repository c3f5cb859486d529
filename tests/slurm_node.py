"A Slurm of one node on the loopback interface, for as long as a test lasts."
import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, ExitStack

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=50000
SlurmdParameters=config_overrides
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ReturnToService=2
KillWait=5
PropagateResourceLimits=NONE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    "What keeps Slurm from being tested here, or nothing."
    programs = [p for p in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel") if not shutil.which(p)]
    if programs: return f"needs {', '.join(programs)}: apt-get install slurm-wlm munge"
    if os.geteuid(): return "slurmd needs root"


def free_ports(n):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextmanager
def one_node_slurm(home):
    "Start munged, slurmctld and slurmd; SLURM_CONF names their configuration inside; all are gone afterwards."
    for name in ("munge", "state", "spool"): (home / name).mkdir(parents=True)
    key, conf = home / "munge" / "key", home / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf.write_text(CONF.format(home=home, host=socket.gethostname().split(".")[0], ports=free_ports(2)))
    munge = [f"--{what}={home}/munge/{file}" for what, file in
             (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
    daemons, before = [], os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(home / f"{command[0]}.err", "w")))
        deadline = time.monotonic() + 60
        while (said := subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)).stdout.strip() != "idle":
            assert time.monotonic() < deadline, (said, *(f.read_text()[-2000:] for f in [*home.glob("*.err"), *home.glob("*.log")]))
            time.sleep(0.1)
        yield
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--user=root"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            try: daemon.wait(20)
            except subprocess.TimeoutExpired: daemon.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None: os.environ["SLURM_CONF"] = before
