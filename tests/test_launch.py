"""Launch scripts: the commands they print, the manifest they render, restarts that stop."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "tools" / "launch"
RUN = (
    "train",
    "--config",
    "configs/my recipe.py",
    "--config.run_dir=gs://b/run",
    '--config.x="1&2"',
)


def call(script, *words, code=0, **settings):
    """Output of a script; its own settings come from `settings` alone."""
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def commands(text):
    """Each printed line as the words that a shell would make of it."""
    return [shlex.split(line) for line in text.splitlines()]


def test_the_scripts_are_what_shellcheck_wants():
    scripts = sorted(map(str, LAUNCH.parent.rglob("*.sh")))
    assert len(scripts) == 6
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(checker), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for script in scripts:
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "again.sh"])
def test_help_says_how_to_start_watch_stop_and_resume(script):
    text = call(script, "--help")
    wanted = ("75", "76") if script == "again.sh" else ("start", "watch", "stop", "resume")
    assert all(word in text for word in wanted)
    assert "set -" not in text


# ---------------------------------------------------------------- TPU VMs


def test_a_queued_resource_of_one_slice():
    [command] = commands(call("tpu_vm.sh", "--dry-run", "create", ZONE="z", PROJECT="p"))
    assert command == [
        *("gcloud compute tpus queued-resources create dcod-jax".split()),
        "--zone=z",
        "--project=p",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=dcod-jax",
    ]


def test_several_spot_slices_are_one_request_and_one_command_each():
    settings = {"SLICES": "3", "SPOT": "yes", "NAME": "n"}
    [command] = commands(call("tpu_vm.sh", "--dry-run", "create", **settings))
    assert command[-3:] == ["--node-count=3", "--node-prefix=n", "--spot"]
    started = commands(call("tpu_vm.sh", "--dry-run", "start", *RUN, **settings))
    assert [words[5] for words in started] == ["n-0", "n-1", "n-2"]
    assert len({words[-1] for words in started}) == 1


def test_every_host_gets_the_same_words_under_again():
    for verb in ("start", "resume"):
        [words] = commands(call("tpu_vm.sh", "--dry-run", verb, *RUN))
        assert words[:8] == [
            *"gcloud compute tpus tpu-vm ssh dcod-jax".split(),
            "--zone=us-west4-a",
            "--worker=all",
        ]
        remote = words[8].removeprefix("--command=")
        line = next(part for part in remote.split(";") if "nohup" in part)
        inner = shlex.split(line[: line.index(">>")])
        verb_words = ["tools/launch/again.sh", ".venv/bin/python", "-m", "dcod_jax.train", *RUN[1:]]
        assert inner == ["nohup", *verb_words]
        assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0


def test_the_remote_start_runs_once_and_stop_reaches_it(tmp_path):
    """The command for a host, on this one: a second start is refused while the first runs."""
    bin_dir = tmp_path / "dcod_jax" / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").symlink_to(sys.executable)
    (tmp_path / "dcod_jax" / "tools").symlink_to(ROOT / "tools")
    package = tmp_path / "dcod_jax" / "dcod_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "wait.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)\n"
    )

    def host(verb, *words):
        [line] = commands(call("tpu_vm.sh", "--dry-run", verb, *words))
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        remote = line[-1].removeprefix("--command=")
        command = ["bash", "-c", remote]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    assert host("start", "wait").returncode == 0
    log = tmp_path / "dcod.log"
    until(lambda: "waiting" in log.read_text())
    second = host("start", "wait")
    assert (second.returncode, second.stdout.strip()) == (1, "already running")
    assert host("stop").returncode == 0
    pid = int((tmp_path / "dcod.pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert log.read_text().count("waiting") == 1  # told to stop, it is not started again


def until(done):
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_watch_setup_and_delete_of_a_tpu_vm():
    watched = commands(call("tpu_vm.sh", "--dry-run", "watch", SLICES="2"))
    assert watched[0][:5] == "gcloud compute tpus queued-resources describe".split()
    assert (watched[1][5], watched[1][7]) == ("dcod-jax-0", "--worker=0")
    setup = commands(call("tpu_vm.sh", "--dry-run", "setup", EXTRAS="tpu,gcs"))
    assert setup[0][:2] == ["git", "archive"]
    assert setup[1][4] == "scp"
    assert ".[tpu,gcs]" in setup[2][-1]
    [deleted] = commands(call("tpu_vm.sh", "--dry-run", "delete"))
    assert deleted[-2:] == ["--force", "--quiet"]


@pytest.mark.parametrize(
    ("script", "words", "settings", "message"),
    [
        ("tpu_vm.sh", ["fly"], {}, "unknown verb 'fly'"),
        ("tpu_vm.sh", ["start"], {}, "which verb?"),
        ("tpu_vm.sh", ["create"], {"SLICES": "0"}, "SLICES=0 must be a positive number"),
        ("gke.sh", ["fly"], {}, "unknown verb 'fly'"),
        ("gke.sh", ["start", "train"], {}, "set IMAGE"),
        ("gke.sh", ["start"], {"IMAGE": "i"}, "which verb?"),
        ("gke.sh", ["xpk-start", "train"], {"IMAGE": "i"}, "set CLUSTER"),
        ("gke.sh", ["start", "train"], {"IMAGE": "i", "TOPOLOGY": "4by4"}, "expected such as 4x4"),
        ("gke.sh", ["start", "train"], {"IMAGE": "i", "CHIPS": "3"}, "16 chips, no multiple of"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(script, words, settings, message):
    assert message in call(script, "--dry-run", *words, code=2, **settings)


# ---------------------------------------------------------------- GKE

# Fields by the APIs' own documentation (jobset.x-k8s.io/v1alpha2, batch/v1, v1), those used here.
# A type is a Python type, {name: type} an object without other fields, [type] a list of it.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": dict,
    "tolerations": [{"key": str, "operator": str}],
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "ports": [{"containerPort": int}],
            "resources": {"requests": dict, "limits": dict},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "emptyDir": dict}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": str,
                "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
            }
        ]
    },
    "template": {"spec": POD},
}
JOB_SET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def fits(value, schema, where="manifest"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert value.keys() <= schema.keys(), f"{where}: {value.keys() - schema.keys()}"
        for name, inner in value.items():
            fits(inner, schema[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            fits(item, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, f"{where}={value!r}"


def manifest(*words, **settings):
    text = call("gke.sh", "render", *(words or RUN), **({"IMAGE": "r/p/i:1"} | settings))
    return yaml.safe_load(text)


def test_the_manifest_is_a_job_set_of_one_job_a_slice_and_one_pod_a_host():
    found = manifest(SLICES="2", TOPOLOGY="2x2x4", ACCELERATOR="tpu-v5p-slice", ACCOUNT="me")
    fits(found, JOB_SET)
    assert "${" not in str(found)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [slices] = found["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["serviceAccountName"]) == ("Never", "me")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    [container] = pod["containers"]
    assert container["image"] == "r/p/i:1"
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_words_reach_the_container_as_they_were_given():
    odd = ("train", "--config=a b.py", 'say "hi"', "back\\slash", "${NAME}&", "$(id)", "")
    [container] = pod_of(manifest(*odd))["containers"]
    assert container["command"][:3] == ["python", "-m", "dcod_jax.train"]
    assert container["command"][3:] == [*odd[1:4], "${NAME}&", *odd[5:]]


def pod_of(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_errors_end_the_job_set_and_interruptions_restart_it():
    found = manifest(RESTARTS="7")
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1, 2]}
    assert pod_of(found)["containers"][0]["name"] == "train"
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    [outer] = policy["rules"]
    assert (outer["action"], outer["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_kubectl_and_xpk_commands():
    text = call("gke.sh", "--dry-run", "start", *RUN, IMAGE="r/p/i:1", NAMESPACE="n")
    first, _, rest = text.partition("<<EOT\n")
    assert shlex.split(first) == ["kubectl", "apply", "--namespace=n", "-f", "-"]
    assert yaml.safe_load(rest.removesuffix("EOT\n")) == manifest()
    [stopped] = commands(call("gke.sh", "--dry-run", "stop", NAME="n"))
    assert stopped == ["kubectl", "delete", "jobset", "n", "--namespace=default"]
    watched = commands(call("gke.sh", "--dry-run", "watch"))
    assert [words[1] for words in watched] == ["get", "get", "logs"]
    settings = {"IMAGE": "r/p/i:1", "CLUSTER": "c", "SLICES": "2"}
    [words] = commands(call("gke.sh", "--dry-run", "xpk-start", *RUN, **settings))
    assert words[:4] == ["xpk", "workload", "create", "--workload=dcod-jax"]
    assert {"--cluster=c", "--num-slices=2", "--restart-on-exit-codes=75,76"} <= set(words)
    inner = shlex.split(words[-1].removeprefix("--command="))
    assert inner == ["python", "-m", "dcod_jax.train", *RUN[1:]]
    [built, pushed] = commands(call("gke.sh", "--dry-run", "image", IMAGE="r/p/i:1"))
    assert (built[:2], pushed) == (["docker", "build"], ["docker", "push", "r/p/i:1"])


def test_the_image_copies_what_is_there():
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), line


# ---------------------------------------------------------------- restarts


def again(code, **settings):
    return subprocess.Popen(
        ["bash", str(LAUNCH / "again.sh"), sys.executable, "-c", code],
        env=os.environ | {"AGAIN_WAIT": "0"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_again_restarts_after_75_and_76_and_passes_on_the_rest(tmp_path):
    counter = tmp_path / "count"
    counter.write_text("")
    code = (
        f"p = {str(counter)!r}; n = len(open(p).read()); open(p, 'a').write('x'); "
        "raise SystemExit([75, 76, 75, 3][n])"
    )
    process = again(code)
    process.communicate(timeout=60)
    assert (process.returncode, counter.read_text()) == (3, "xxxx")


def test_again_gives_up_after_its_limit():
    process = again("raise SystemExit(76)", AGAIN_LIMIT="2")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 76
    assert "gave up after 2 restarts" in error


def test_a_signal_to_again_reaches_the_command_and_ends_both():
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print('up', flush=True); time.sleep(60)"
    )
    process = again(code)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (75, "", "")
