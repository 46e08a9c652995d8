"""Processes that lose, wait for or contradict each other: who is named, and how the run ends."""

import os
import signal
import socket
import threading

import forks
import pytest
from host_runs import finish, launch

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.parallel import exit_report, hosts
from dcod_jax.parallel.monitor import EXIT_PEER, ExitReporter, Monitor, Peer, verdict

# ---------------------------------------------------------------- the judgement, without processes


def peer(**changes):
    known = {"host": "h", "state": "s", "waiting": False, "count": 5, "beat": 1, "ended": ""}
    return Peer(**(known | {"code": 0, "heard": 100.0, "moved": 100.0} | changes))


def judge(peers, now: float):
    return verdict(dict(enumerate(peers)), own=0, now=now, heartbeat=10.0, timeout=60.0)


def test_nobody_is_blamed_while_all_are_heard_and_one_moves():
    assert judge([peer(moved=0.0), peer(), peer(moved=0.0)], 109.0) is None


def test_a_silent_process_is_named_with_what_it_did():
    found = judge([peer(), peer(), peer(host="b", state="saving step 3", heard=85.0)], 100.0)
    assert found is not None
    assert found[0] == "lost: process 2 (b) sent no heartbeat for 15 s, last: saving step 3"
    assert found[1] == EXIT_PEER
    assert judge([peer(heard=0.0), peer()], 100.0) is None  # a process does not miss itself


def test_a_process_that_ended_is_named_with_its_reason_and_code():
    found = judge([peer(), peer(ended="no such file", code=1, heard=0.0)], 100.0)
    assert found == ("process 1 (h) ended: no such file", 1)
    found = judge([peer(), peer(ended="lost: process 2 (b)", judged=True, code=76)], 100.0)
    assert found == ("lost: process 2 (b)", 76)  # a verdict is passed on as it is


def test_a_stall_is_blamed_on_those_that_wait_for_nobody():
    numbers = {"waiting": True, "state": "the numbers of step 4", "heard": 160.0}
    behind = peer(host="b", state="reading the batch of step 5", heard=160.0)
    found = judge([peer(**numbers), behind, peer(**numbers)], 161.0)
    assert found is not None
    assert found[0].startswith("stuck: nothing moved for hosts.timeout=60 s, by process 1 (b):\n")
    assert "process 0 (h): waits for the numbers of step 4, for 61 s" in found[0]
    assert "process 1 (b): reading the batch of step 5, for 61 s" in found[0]
    assert found[1] == EXIT_PEER
    least = judge([peer(**numbers), peer(**numbers, count=4)], 161.0)
    assert least is not None
    assert "by process 1 (h):" in least[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hosts.processes=2"], r"hosts.processes=2 and hosts.process_id=-1 need hosts.coord"),
        (["hosts.coordinator=a:1", "hosts.processes=2"], "process_id=-1 must be one of 0 to 1"),
        (["hosts.coordinator=a", "hosts.processes=1", "hosts.process_id=0"], "must be host:port"),
        *(
            (
                [f"hosts.coordinator=a:{port}", "hosts.processes=1", "hosts.process_id=0"],
                "host:port",
            )
            for port in ("0", "65536", "\u00b2", "9" * 5000)
        ),
        (["hosts.cluster=slrum"], "did you mean 'slurm'"),
        (["hosts.heartbeat=0"], "hosts.heartbeat=0.0 must be greater than 0"),
    ],
)
def test_a_description_that_cannot_be_is_refused(words, message):
    argv = ["--config", str(configs.BASE), *(f"--config.{word}" for word in words)]
    with pytest.raises(DcodError, match=message):
        configs.load(argv, verb="train")


def test_a_verb_of_one_process_refuses_several_with_the_command():
    settings = load_base("hosts.coordinator=a:1", "hosts.processes=2", "hosts.process_id=1").hosts
    with pytest.raises(DcodError, match=r"drift runs in one process, hosts\.processes=2; .*=none"):
        hosts.refuse_peers(settings, "drift")
    hosts.refuse_peers(load_base().hosts, "drift")


def load_base(*words):
    argv = ["--config", str(configs.BASE), *(f"--config.{word}" for word in words)]
    return configs.load(argv, verb="train")


def test_an_exit_report_names_the_coordinator_or_the_process(monkeypatch):
    told = []
    reporter = ExitReporter.__new__(ExitReporter)
    monkeypatch.setattr(reporter, "_write", told.append)
    first = Peer("a", "saving step 4")
    reporter.update(2, "step 5", "a:1", first=first)
    reporter.update(2, "step 5", "a:1", first=first, joining=True)
    reporter.update(0, "step 5", "a:1", first=first)
    host = socket.gethostname()
    assert told[0] == {
        "coordinator": "a:1",
        "lost": f"process 2 ({host}) stops: lost: process 0 (a), the coordinator at a:1, "
        "last: saving step 4",
        "ended": f"process 2 ({host}) was killed or aborted (out of memory? see above and the "
        "kernel's log), last: step 5",
    }
    assert told[1]["ended"].startswith(f"process 2 ({host}) stops: step 5: not all did")
    assert told[2]["coordinator"] == ""
    assert exit_report.answers("")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert not exit_report.answers(address)
        listener.listen()
        assert exit_report.answers(address)


class FrozenClient:
    """A key-value store that stops to answer."""

    def __init__(self):
        self.frozen, self.thawed = False, threading.Event()

    def key_value_set(self, key, text, *, allow_overwrite):
        if self.frozen:
            self.thawed.wait()

    def key_value_dir_get(self, folder):
        return []


def test_an_error_ends_a_process_whose_coordinator_is_frozen(monkeypatch, capsys):
    client, codes = FrozenClient(), []
    settings = {"coordinator": "", "reporter": ExitReporter(), "heartbeat": 0.5, "timeout": 60.0}
    monitor = Monitor(client, process=1, processes=2, **settings)
    monitor.closing.set()  # no verdict may come before the error
    monkeypatch.setattr(os, "_exit", codes.append)
    client.frozen = True
    failing = threading.Thread(
        target=monitor.fail, args=(DcodError("no file"),), kwargs={"code": 1}
    )
    failing.start()
    failing.join(10)
    assert codes == [1]
    assert "process 1" in (said := capsys.readouterr().err)
    assert "error: no file" in said
    client.thawed.set()
    failing.join()
    monitor.reporter.running.communicate()


def test_a_fork_ends_as_its_program_and_a_signal_is_the_programs(tmp_path):
    """Of tests/forks.py, in which the processes of a run are started."""
    code = "import os, sys; print(os.getcwd(), os.environ['OWN']); sys.exit(3)"
    done = forks.run(["-c", code], cwd=tmp_path, env=os.environ | {"OWN": "own"})
    assert (done.returncode, done.stdout) == (3, f"{tmp_path} own\n"), done.stderr
    with forks.Started(["-c", "import time; time.sleep(60)"]) as started:
        started.send_signal(signal.SIGKILL)
    assert started.returncode == -signal.SIGKILL


# ---------------------------------------------------------------- lost and stuck peers

SCRIPT = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dcod_jax import cli, errors
from dcod_jax.parallel import hosts

def work(settings):
    process = jax.process_index()
    mesh = jax.make_mesh((jax.process_count(),), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in range(1, 4):
        hosts.doing(f"reading the batch of step {{step}}")
        if step == 3 and process == {culprit}:
            {misdeed}
        x = jax.make_array_from_process_local_data(rows, np.ones(1, np.float32))
        if {meets} and step == 3:
            hosts.barrier("the middle")
        hosts.doing(f"the numbers of step {{step}}", waiting=True)
        assert float(total(x)) == jax.process_count()
    print("done")

sys.argv[0] = "train"
cli.run_config_verb("train", work)
"""


def misbehave(place, culprit, misdeed, *, meets=False, more=(), own=((), ()), wait=True):
    """[(exit code, stdout, stderr)] of two processes, one of which does something at step 3."""
    script = place / "script.py"
    script.write_text(SCRIPT.format(culprit=culprit, misdeed=misdeed, meets=meets))
    recipe = ["--config", str(configs.BASE), f"--config.run_dir={place / 'run'}"]
    command = [str(script), *recipe, "--config.hosts.heartbeat=8", *more]
    run = launch(2, command, own=own)
    return finish(run, timeout=90) if wait else run


KILL = "time.sleep(4); os.kill(os.getpid(), signal.SIGKILL)"


# With process 0 goes the coordinator, and JAX may abort the others before they heard its last word.
@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_process_is_named_and_the_other_ends(tmp_path, culprit):
    ends = misbehave(tmp_path, culprit, KILL)
    host = socket.gethostname()
    other = 1 - culprit
    # Process 0 takes the store with it: JAX aborts the others before they can end themselves.
    assert ends[other][0] == (-signal.SIGABRT if culprit == 0 else EXIT_PEER), ends
    assert f"process {other} ({host}) stops: lost: process {culprit} ({host})" in ends[other][2]
    assert "last: reading the batch of step 3" in ends[other][2]
    assert "start the same command on every host again" in ends[other][2]
    killed = ends[culprit][2]
    assert f"process {culprit} ({host}) was killed or aborted" in killed
    assert "last: reading the batch of step 3" in killed


@pytest.mark.parametrize(
    "meets",
    [False, pytest.param(True, marks=pytest.mark.long)],
    ids=["collective", "barrier"],
)
def test_a_straggler_is_named_after_the_time_out(tmp_path, meets):
    more = ["--config.hosts.timeout=6"]
    ends = misbehave(tmp_path, 1, "time.sleep(600)", meets=meets, more=more)
    assert [end[0] for end in ends] == [EXIT_PEER, EXIT_PEER], ends
    host = socket.gethostname()
    where = "the middle" if meets else "the numbers of step 3"
    for _, _, errors in ends:
        assert f"stuck: nothing moved for hosts.timeout=6 s, by process 1 ({host}):" in errors
        assert f"process 0 ({host}): waits for {where}" in errors
        assert f"process 1 ({host}): reading the batch of step 3" in errors


def test_an_error_of_one_is_told_to_all(tmp_path):
    misdeed = "raise errors.DcodError('no such file\\nset data.traces')"
    ends = misbehave(tmp_path, 1, misdeed)
    assert [end[0] for end in ends] == [1, 1], ends
    assert "error: no such file\nset data.traces" in ends[1][2]
    assert f"process 1 ({socket.gethostname()}) ended: no such file" in ends[0][2]


def test_another_config_is_refused_with_process_and_key(tmp_path):
    run = misbehave(tmp_path, None, "pass", own=((), ("--config.seed=3",)))
    assert [end[0] for end in run] == [1, 1], run
    for _, _, errors in run:
        assert "process 1 was started with another config:" in errors
        assert "seed: 0 on process 0, 3 on process 1" in errors


@pytest.mark.long
def test_a_frozen_coordinator_is_named(tmp_path):
    run = misbehave(tmp_path, 0, KILL.replace("SIGKILL", "SIGSTOP"), wait=False)
    try:
        errors = run[1].communicate(timeout=90)[1]
    finally:
        for process in run:
            process.kill()
        run[0].communicate()
    assert run[1].returncode == EXIT_PEER
    assert f"lost: process 0 ({socket.gethostname()}), the coordinator, did not answer" in errors
