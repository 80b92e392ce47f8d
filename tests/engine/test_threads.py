"""How many threads: what the user says, else what /proc and /sys, written here as files, say of the machine."""

import os

import pytest

from pruneofa import Engine
from pruneofa.engine.threads import allowed_cpus, choose_threads, cpu_quota, physical_cores, usable_threads
from pruneofa.errors import InputError
from tests.tiny import write_folder

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def write_siblings(root, lists, name="core_cpus_list"):
    return write(root, {f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": text for cpu, text in lists.items()})


def test_siblings_count_once(tmp_path):
    write_siblings(tmp_path, {0: "0,4\n", 4: "0,4\n", 1: "1,5\n", 5: "1,5\n", 2: "2-3\n", 3: "2-3\n"})
    assert physical_cores({0, 1, 2, 3, 4, 5}, tmp_path) == 3
    assert physical_cores({0, 4}, tmp_path) == 1
    assert physical_cores({0, 1}, tmp_path) == 2
    assert physical_cores({0, 9}, tmp_path) == 2  # a CPU that the files do not name


def test_the_older_name_of_the_siblings(tmp_path):
    write_siblings(tmp_path, {0: "0-1\n", 1: "0-1\n", 2: "2-3\n", 3: "2-3\n"}, "thread_siblings_list")
    assert physical_cores(range(4), tmp_path) == 2


@pytest.mark.parametrize("text", ["", "?", "0-", "-1", "3-1", "5,6", "0-1\x00"])
def test_a_topology_that_makes_no_sense_counts_every_cpu(tmp_path, text):
    assert physical_cores({0, 1}, write_siblings(tmp_path, {0: text, 1: text})) == 2


def test_a_machine_that_hides_everything(tmp_path):
    assert physical_cores({0, 1, 2}, tmp_path) == 3 and cpu_quota(tmp_path) is None
    chosen = choose_threads(None, environment={}, cpus={0, 1, 2}, root=tmp_path)
    assert (chosen.count, chosen.reason) == (3, "3 physical cores of 3 allowed CPUs")


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"a/cpu.max": "150000 100000\n"}, 1.5),
        ({"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "100000 50000\n", "cpu.max": "max 100000\n"}, 2.0),
        ({"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "100000 50000\n"}, 0.5),
        ({"a/b/c/cpu.max": "50000 100000\n", "x/cpu.max": "50000 100000\n"}, None),  # groups of other processes
        ({"a/b/cpu.max": "0 100000\n", "a/cpu.max": "100000 0\n", "cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_quota_of_version_2_is_the_least_of_all_levels(tmp_path, files, quota):
    write(tmp_path, {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2})
    assert cpu_quota(write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})) == quota


@pytest.mark.parametrize(
    ("levels", "quota"),
    [({}, None), ({"a": -1, "": -1}, None), ({"a/b": 250000, "a": -1}, 2.5), ({"a/b": 250000, "a": 100000}, 1.0)],
)
def test_the_quota_of_version_1(tmp_path, levels, quota):
    write(tmp_path, {"proc/self/cgroup": "5:cpuset:/other\n4:cpu,cpuacct:/a/b\n0::/\n", "proc/self/mountinfo": V1})
    for level, microseconds in levels.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{level}"
        files = {f"{folder}/cpu.cfs_quota_us": f"{microseconds}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
        write(tmp_path, files)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("group", "mounted"),
    [
        ("/docker/7f", "/docker/7f"),  # the host's path, and the group alone is mounted
        ("/", "/docker/7f"),  # a name space of groups, mounted before it was entered
        ("/../..", "/"),  # a group outside the name space
    ],
)
def test_a_container_that_sees_its_own_group_as_the_root(tmp_path, group, mounted):
    mount = f"31 23 0:28 {mounted} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    files = {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": mount,
        "sys/fs/cgroup/cpu.max": "70000 100000\n",
    }
    assert cpu_quota(write(tmp_path, files)) == 0.7


@pytest.mark.parametrize("mounts", ["", "\n \nx - y\n", "1 2 3 / /sys/fs/cgroup rw - cgroup2\n", "\xff"])
def test_mounts_that_make_no_sense(tmp_path, mounts):
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": mounts, "sys/fs/cgroup/cpu.max": "70000 100000\n"}
    assert cpu_quota(write(tmp_path, files)) is None


@pytest.mark.parametrize(
    ("quota", "count", "reason"),
    [
        (None, 2, "2 physical cores of 4 allowed CPUs"),
        ("800000", 2, "2 physical cores of 4 allowed CPUs"),
        ("150000", 1, "a quota of 1.5 CPUs; 2 physical cores of 4 allowed CPUs"),
        ("20000", 1, "a quota of 0.2 CPUs; 2 physical cores of 4 allowed CPUs"),
    ],
)
def test_the_default(tmp_path, quota, count, reason):
    write_siblings(tmp_path, {0: "0-1\n", 1: "0-1\n", 2: "2-3\n", 3: "2-3\n"})
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    write(tmp_path, files if quota else {})
    chosen = choose_threads(None, environment={"OMP_NUM_THREADS": ""}, cpus={0, 1, 2, 3}, root=tmp_path)
    assert (chosen.count, chosen.reason) == (count, reason)


@pytest.mark.parametrize(
    ("wanted", "environment", "count", "reason"),
    [
        (3, {"PRUNEOFA_THREADS": "2", "OMP_NUM_THREADS": "1"}, 3, "threads=3"),
        (None, {"PRUNEOFA_THREADS": " 2 ", "OMP_NUM_THREADS": "1"}, 2, "PRUNEOFA_THREADS=2"),
        (None, {"PRUNEOFA_THREADS": "", "OMP_NUM_THREADS": "4"}, 4, "OMP_NUM_THREADS=4"),
        (None, {"OMP_NUM_THREADS": " 4,2"}, 4, "OMP_NUM_THREADS=4"),
        (None, {"OMP_NUM_THREADS": "5000"}, 1024, "OMP_NUM_THREADS=5000"),
        (None, {"OMP_NUM_THREADS": "0"}, 1, "1 physical core of 1 allowed CPUs"),
        (None, {"OMP_NUM_THREADS": "many"}, 1, "1 physical core of 1 allowed CPUs"),
    ],
)
def test_what_the_user_says_comes_first(tmp_path, wanted, environment, count, reason):
    chosen = choose_threads(wanted, environment=environment, cpus={7}, root=tmp_path)
    assert (chosen.count, chosen.reason) == (count, reason)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "all", "1025", "9" * 40])
def test_a_wrong_variable_is_named(tmp_path, text):
    with pytest.raises(InputError, match=f"PRUNEOFA_THREADS is '{text}', wanted an integer from 1 to 1024; change or"):
        choose_threads(None, environment={"PRUNEOFA_THREADS": text}, root=tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not set affinities")
def test_the_affinity_of_this_process_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert set(allowed_cpus()) == {min(before)} and usable_threads(None) == 1
        assert choose_threads(None, environment={}).count == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_threads(None) == len(before)
    assert usable_threads(0.3) == 1 and usable_threads(1e6) == len(before)


def test_an_engine_says_which_number_and_why(tmp_path, monkeypatch):
    folder = write_folder(tmp_path)
    monkeypatch.setenv("PRUNEOFA_THREADS", "2")
    engine = Engine.from_pretrained(folder)
    assert (engine.threads, engine.threads_reason) == (2, "PRUNEOFA_THREADS=2")
    engine = Engine.from_pretrained(folder, threads=1)
    assert (engine.threads, engine.threads_reason) == (1, "threads=1")
    monkeypatch.delenv("PRUNEOFA_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine = Engine.from_pretrained(folder)
    assert engine.threads == choose_threads(None).count and "allowed CPUs" in engine.threads_reason
